"""Pixels to normalised latents, one frame at a time through diffusers' own VAE parameters, with bounded memory.

As in `decode`, frames are apart (`causal`): that equals `vae._encode`. A frame that a temporal downsampler merges with
the next one goes no deeper, and waits in the history.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F

from .causal import History, Module, activated, causal, middle, resnet


@torch.no_grad()
def encode_clips(vae: Module, pixels: torch.Tensor) -> torch.Tensor:
    """Normalised latents (n, C, T, h, w) fp32 on CPU of clips (n, 3, 4k+1, H, W) in -1..1.

    `vae` is an `AutoencoderKLWan`.
    """
    return _encoded(vae, pixels.unbind(2))


@torch.no_grad()
def encode_stream(vae: Module, frames: Iterable[torch.Tensor]) -> torch.Tensor:
    """Normalised latents (C, T, h, w) fp32 on CPU of 4k+1 frames (3, H, W) in -1..1, taken one by one."""
    return _encoded(vae, (frame[None] for frame in frames))[0]


def _encoded(vae: Module, frames: Iterable[torch.Tensor]) -> torch.Tensor:
    history: History = {}
    made = []
    for frame in frames:
        # bound to no name, so that it is gone after the first convolution
        moments = _latent(vae.encoder, _patched(frame.to(vae.device, vae.dtype), vae.config.patch_size or 1), history)
        if moments is not None:
            made.append(causal(vae.quant_conv, moments, history).chunk(2, dim=1)[0].float().cpu())
    latents = torch.stack(made, dim=2)
    mean, std = (torch.tensor(v).view(-1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    return ((latents - mean) / std).contiguous()


def _patched(frame: torch.Tensor, patch: int) -> torch.Tensor:
    """diffusers' patchify of a frame (n, 3, H, W): a patch's column is the slower channel index, its row the faster."""
    n, channels, height, width = frame.shape
    x = frame.view(n, channels, height // patch, patch, width // patch, patch).permute(0, 2, 4, 1, 5, 3)
    return x.flatten(3).permute(0, 3, 1, 2)  # channels last


def _latent(encoder: Module, x: torch.Tensor, history: History) -> torch.Tensor | None:
    """The moments (n, 2 z_dim, h, w) that frame `x` completes, or None where it waits for the next one."""
    x = causal(encoder.conv_in, x, history)
    for block in encoder.down_blocks:
        made: torch.Tensor | None
        if hasattr(block, "avg_shortcut"):  # Wan 2.2's
            made = x
            for part in block.resnets:
                made = resnet(part, made, history)
            if block.downsampler is not None:
                made = _smaller(block.downsampler, made, history)
            added = _averaged(block.avg_shortcut, x, history)
            made = None if made is None or added is None else made + added
        elif hasattr(block, "resample"):
            made = _smaller(block, x, history)
        else:
            made = resnet(block, x, history)
        if made is None:
            return None
        x = made
    x = middle(encoder.mid_block, x, history)
    return activated(encoder.norm_out, encoder.conv_out, x, history)


def _smaller(downsampler: Module, x: torch.Tensor, history: History) -> torch.Tensor | None:
    """diffusers' WanResample at frame `x`: half the height and width, and after the first frame every other frame."""
    conv = downsampler.resample[1]
    x = F.conv2d(F.pad(x, (0, 1, 0, 1)).contiguous(memory_format=torch.channels_last), conv.weight, conv.bias, stride=2)
    if downsampler.mode == "downsample2d":
        return x
    merge = downsampler.time_conv
    frames = [*history.get(merge, []), x]
    if len(frames) == 2:  # the last merged one and half a pair
        history[merge] = frames
        return None
    history[merge] = [x]
    if len(frames) == 1:
        return x
    made = F.conv2d(frames[0], merge.weight[:, :, 0], merge.bias)
    for frame, weight in zip(frames[1:], merge.weight.unbind(2)[1:], strict=True):
        made += F.conv2d(frame, weight)
    return made


def _averaged(shortcut: Module, x: torch.Tensor, history: History) -> torch.Tensor | None:
    """diffusers' AvgDown3D at frame `x`, whose pairs begin one frame before the first, with zero."""
    frames, side = [x], shortcut.factor_s
    if shortcut.factor_t == 2:
        waiting = history.get(shortcut, [torch.zeros_like(x)])
        history[shortcut] = [] if waiting else [x]
        if not waiting:
            return None
        frames = [*waiting, x]
    if shortcut.group_size % side**2:  # groups that part a square of pixels: slower
        return shortcut(torch.stack(frames, dim=2)).squeeze(2)
    pooled = torch.stack([F.avg_pool2d(frame, side) for frame in frames], dim=2).flatten(1, 2)
    return pooled.unflatten(1, (shortcut.out_channels, -1)).mean(2).contiguous(memory_format=torch.channels_last)
