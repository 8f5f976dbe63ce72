"""Pixels to normalised latents, one frame at a time through diffusers' own VAE parameters, with bounded memory.

As in `decode`, frames are apart (`causal`): that equals `vae._encode`. A frame that a temporal downsampler merges with
the next one goes no deeper, and waits in the history.
"""

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F

from . import banded
from .banded import Bands, Module, bands, joined
from .causal import History, activated, causal, middle, plus, resnet, resnets, still


@torch.no_grad()
def encode_clips(vae: Module, pixels: torch.Tensor) -> torch.Tensor:
    """Normalised latents (n, C, T, h, w) fp32 on CPU of clips (n, 3, 4k+1, H, W) in -1..1.

    `vae` is an `AutoencoderKLWan`.
    """
    return _encoded(vae, vae.encoder, pixels.unbind(2))


@torch.no_grad()
def encode_stream(vae: Module, frames: Iterable[torch.Tensor], encoder: Module | None = None) -> torch.Tensor:
    """Normalised latents (C, T, h, w) fp32 on CPU of 4k+1 frames (3, H, W) in -1..1, taken one by one; by another
    `encoder` than the VAE's, if need be."""
    return _encoded(vae, encoder or vae.encoder, (frame[None] for frame in frames))[0]


def _encoded(vae: Module, encoder: Module, frames: Iterable[torch.Tensor]) -> torch.Tensor:
    history = History()
    made = []
    for frame in frames:
        patch = vae.config.patch_size or 1
        parts = _patched(frame.to(vae.device, vae.dtype), patch)
        moments = _latent(encoder, parts, frame.shape[2] // patch, history)
        if moments is not None:
            made.append(causal(vae.quant_conv, moments, history).chunk(2, dim=1)[0].float().cpu())
    latents = torch.stack(made, dim=2)
    mean, std = (torch.tensor(v).view(-1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    return ((latents - mean) / std).contiguous()


def _patched(frame: torch.Tensor, patch: int) -> Iterator[torch.Tensor]:
    """diffusers' patchify of a frame (n, 3, H, W), in bands: a patch's column is the slower channel index, its row the
    faster."""
    for band in bands(frame.unflatten(3, (-1, patch)).unflatten(2, (-1, patch)).permute(0, 1, 5, 3, 2, 4)):
        yield band.permute(0, 4, 5, 1, 2, 3).flatten(3).permute(0, 3, 1, 2)  # channels last


def _latent(encoder: Module, parts: Bands, height: int, history: History) -> torch.Tensor | None:
    """The moments (n, 2 z_dim, h, w) that a frame in bands completes, or None where it waits for the next one."""
    if still(encoder.conv_in, history):
        parts = banded.convolved(encoder.conv_in, parts, height)
    else:
        parts = [causal(encoder.conv_in, joined(parts, height), history)]
    for block in encoder.down_blocks:
        if hasattr(block, "avg_shortcut"):  # Wan 2.2's
            x = _level(block, parts, height, history)
        elif hasattr(block, "resample"):
            x = _smaller(block, parts, height, history)
        else:
            x = resnet(block, joined(parts, height), history)
        if x is None:
            return None
        parts, height = [x], x.shape[2]
    x = middle(encoder.mid_block, joined(parts, height), history)
    return activated(encoder.norm_out, encoder.conv_out, x, history)


def _level(block: Module, parts: Bands, height: int, history: History) -> torch.Tensor | None:
    """diffusers' WanResidualDownBlock at a frame in bands, with its AvgDown3D."""
    shortcut = block.avg_shortcut
    # groups that part a square of pixels wait for diffusers' own code
    side = 1 if shortcut.group_size % shortcut.factor_s**2 else shortcut.factor_s
    pools: list[torch.Tensor] = []
    parts = resnets(block.resnets, banded.pooled(parts, height, side, pools), height, history)
    made = joined(parts, height) if block.downsampler is None else _smaller(block.downsampler, parts, height, history)
    added = _averaged(shortcut, joined(pools, height // side), history)
    return None if made is None or added is None else made + added


def _smaller(downsampler: Module, parts: Bands, height: int, history: History) -> torch.Tensor | None:
    """diffusers' WanResample at a frame in bands: half the height and width, after the first one every other frame."""
    if isinstance(downsampler.resample, torch.nn.Identity):  # a half-size picture's
        x = joined(parts, height)
    else:
        x = joined(banded.halved(downsampler.resample, parts, height), height // 2)
    if downsampler.mode == "downsample2d":
        return x
    merge = downsampler.time_conv
    frames = [*history.waiting.get(merge, []), x]
    if len(frames) == 2:  # the last merged one and half a pair
        history.waiting[merge] = frames
        return None
    history.waiting[merge] = [x]
    if len(frames) == 1:
        return x
    made = F.conv2d(frames[0], merge.weight[:, :, 0], merge.bias)
    for frame, weight in zip(frames[1:], merge.weight.unbind(2)[1:], strict=True):
        made = plus(made, frame, weight)
    return made


def _averaged(shortcut: Module, pooled: torch.Tensor, history: History) -> torch.Tensor | None:
    """diffusers' AvgDown3D at a frame that is pooled where its groups allow it. Pairs begin one frame before the first,
    with zero."""
    frames = [pooled]
    if shortcut.factor_t == 2:
        waiting = history.waiting[shortcut] if shortcut in history.waiting else [torch.zeros_like(pooled)]
        history.waiting[shortcut] = [] if waiting else frames
        if not waiting:
            return None
        frames = [*waiting, pooled]
    if shortcut.group_size % shortcut.factor_s**2:
        return shortcut(torch.stack(frames, dim=2)).squeeze(2)
    if len(frames) == 2 and shortcut.group_size == 2 * shortcut.factor_s**2:  # a channel of both at a time
        return torch.add(*frames).mul_(0.5)
    values = torch.stack([frame.permute(0, 2, 3, 1) for frame in frames], dim=-1).flatten(3)
    return values.unflatten(3, (shortcut.out_channels, -1)).mean(4).permute(0, 3, 1, 2)
