"""Pixels to normalised latents, through diffusers' own VAE."""

import itertools
from collections.abc import Iterator

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import patchify


@torch.no_grad()
def encode_clips(vae: AutoencoderKLWan, pixels: torch.Tensor) -> torch.Tensor:
    """Normalised latents (n, C, T, h, w) fp32 of whole clips (n, 3, frames, H, W) in -1..1.

    Several clips at a time: PyTorch's conv3d takes its slow path on CPU at batch 1.
    """
    return normalised(vae, vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode().float().cpu())


@torch.no_grad()
def encode_stream(vae: AutoencoderKLWan, frames: Iterator[torch.Tensor]) -> torch.Tensor:
    """Normalised latents (C, T, h, w) fp32 of 4k+1 frames (3, H, W) in -1..1, of which four are in memory at a time.

    The walk of `AutoencoderKLWan._encode`, whose caches carry the encoder from one group to the next.
    """
    vae.clear_cache()
    parts: list[torch.Tensor] = []
    while group := list(itertools.islice(frames, 4 if parts else 1)):
        x = torch.stack(group, dim=1)[None].to(vae.device, vae.dtype)
        if vae.config.patch_size is not None:
            x = patchify(x, patch_size=vae.config.patch_size)
        vae._enc_conv_idx = [0]
        moments = vae.quant_conv(vae.encoder(x, feat_cache=vae._enc_feat_map, feat_idx=vae._enc_conv_idx))
        parts.append(moments.chunk(2, dim=1)[0].float().cpu())
    vae.clear_cache()
    return normalised(vae, torch.cat(parts, dim=2))[0]


def normalised(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """(latents - mean) / std by channel, as the transformer takes them."""
    mean, std = (torch.tensor(v).view(-1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    return (latents - mean) / std
