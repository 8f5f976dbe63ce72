"""Whole clips at once through diffusers' Wan VAE (its residual kind), with gradients: what its training runs.

diffusers takes four frames at a time through conv3d; here all frames of all clips go through channels-last conv2d
together, which on CPUs takes little over half the time. `decode` and `encode` are for long videos in bounded memory.
"""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_wan import patchify, unpatchify

from .causal import is_idle, is_live, is_still

Module = Any  # diffusers' modules, whose attributes are not typed


def clip_moments(vae: Module, pixels: torch.Tensor, encoder: Module | None = None) -> torch.Tensor:
    """What `vae._encode` gives, if need be by another `encoder`: means and log variances (n, 2 z_dim, T, h, w) of clips
    (n, 3, 4k+1, H, W) in -1..1."""
    encoder = encoder or vae.encoder
    x = _conv(encoder.conv_in, _channels_last(patchify(pixels, vae.config.patch_size)))
    for block in encoder.down_blocks:
        added = block.avg_shortcut(x)
        for part in block.resnets:
            x = _resnet(part, x)
        if block.downsampler is not None:
            x = _by_frame(block.downsampler.resample, x)
            if block.downsampler.mode == "downsample3d" and x.shape[2] > 1:
                merge = block.downsampler.time_conv
                merged = F.conv3d(x, merge.weight, merge.bias, stride=merge.stride)
                x = torch.cat([x[:, :, :1], merged], dim=2)
        x = x + added
    x = _activated(encoder.norm_out, encoder.conv_out, _middle(encoder.mid_block, x))
    return _conv(vae.quant_conv, x)


def clip_pixels(vae: Module, latents: torch.Tensor) -> torch.Tensor:
    """What `vae._decode` gives: pixels (n, 3, 4T-3, H, W) in -1..1 of latents (n, z_dim, T, h, w), not normalised."""
    decoder = vae.decoder
    x = _middle(decoder.mid_block, _conv(decoder.conv_in, _conv(vae.post_quant_conv, _channels_last(latents))))
    for block in decoder.up_blocks:
        source = x
        for part in block.resnets:
            x = _resnet(part, x)
        if block.upsampler is None:
            continue
        if block.upsampler.mode == "upsample3d" and x.shape[2] > 1:
            # Wan: the first frame neither doubles nor enters the history
            doubled = _conv(block.upsampler.time_conv, x[:, :, 1:]).unflatten(1, (2, x.shape[1]))
            x = torch.cat([x[:, :, :1], doubled.movedim(1, 3).flatten(2, 3)], dim=2)
        x = _by_frame(block.upsampler.resample, x)
        if block.avg_shortcut is not None:
            x = x + block.avg_shortcut(source, first_chunk=True)
    x = _activated(decoder.norm_out, decoder.conv_out, x)
    return unpatchify(x, vae.config.patch_size).clamp(-1.0, 1.0)


def _middle(block: Module, x: torch.Tensor) -> torch.Tensor:
    x = _resnet(block.resnets[0], x)
    for attention, last in zip(block.attentions, block.resnets[1:], strict=True):
        x = _resnet(last, attention(x) if is_live(attention) else x)
    return x


def _resnet(block: Module, x: torch.Tensor) -> torch.Tensor:
    if is_idle(block):
        return x
    added = x if isinstance(block.conv_shortcut, torch.nn.Identity) else _conv(block.conv_shortcut, x)
    h = _activated(block.norm1, block.conv1, x)
    return _activated(block.norm2, block.conv2, h) + added


def _activated(norm: Module, conv: Module, x: torch.Tensor) -> torch.Tensor:
    return _conv(conv, F.silu(norm(x)))


def _conv(conv: Module, x: torch.Tensor) -> torch.Tensor:
    """WanCausalConv3d at stride 1 on whole clips: one 2D convolution of each frame with those before it beside it."""
    kernel, (n, _, frames, _, _) = conv.weight, x.shape
    if is_still(conv):
        kernel = kernel[:, :, -1:]
    past = kernel.shape[2] - 1
    padded = F.pad(x, (0, 0, 0, 0, past, 0)) if past else x
    beside = torch.cat([_frames(padded[:, :, i : i + frames]) for i in range(past + 1)], dim=1)
    flat = kernel.transpose(1, 2).flatten(1, 2)
    return _clips(F.conv2d(beside, flat, conv.bias, padding=kernel.shape[-1] // 2), n)


def _by_frame(layers: Module, x: torch.Tensor) -> torch.Tensor:
    """2D `layers` on every frame of (n, C, f, h, w)."""
    return _clips(layers(_frames(x)), x.shape[0])


def _channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last_3d)


def _frames(x: torch.Tensor) -> torch.Tensor:
    """(n, C, f, h, w) as (n f, C, h, w): a view where channels lie last."""
    n, c, f, h, w = x.shape
    return x.permute(0, 2, 3, 4, 1).reshape(n * f, h, w, c).permute(0, 3, 1, 2)


def _clips(frames: torch.Tensor, n: int) -> torch.Tensor:
    """(n f, C, h, w) as (n, C, f, h, w), the other way."""
    return frames.unflatten(0, (n, -1)).transpose(1, 2)
