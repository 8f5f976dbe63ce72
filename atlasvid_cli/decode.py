"""Latents to frames as a stream: one frame at a time through diffusers' own VAE parameters, with bounded memory.

We walk the decoder's modules one frame at a time (`causal`), depth first: the two frames that a temporal upsampler
makes go through the rest of the decoder one after the other. That equals `vae._decode`, and the largest activation is
one frame, not four.
"""

import errno
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from .causal import History, Module, activated, bands, causal, is_live, middle, resnet
from .errors import RenderError, ResourceError
from .vae_cost import BLEND, receptive_radius, space_factor, spans, time_factor


@torch.no_grad()
def decode_stream(
    vae: Module,
    latents: torch.Tensor,
    tile: int | None = None,
    spool: Path | None = None,
    on_tile: Callable[[], None] = lambda: None,
) -> Iterator[torch.Tensor]:
    """Frames (f, 3, H, W), fp32 on CPU in 0..1, of normalised latents (C, T, h, w): f is 1, then 4 a latent frame.

    `vae` is an `AutoencoderKLWan`. With `tile` (side in latents) tiles are decoded one after the other, each through
    all of time, into a file of uint16 in the folder `spool` (`spool_bytes` large), from which the frames are then read:
    the caches of one tile are all that is in memory, and `on_tile` is called for each latent frame of each tile, before
    the first frame is there. Whole frames stream as they are made. `ResourceError` when the spool does not fit on the
    disk, `RenderError` when the latents are not finite or not this VAE's.
    """
    if latents.ndim != 4 or latents.shape[0] != vae.config.z_dim:
        raise RenderError(
            f"The latents have shape {tuple(latents.shape)}, but this VAE decodes {vae.config.z_dim} x T x h x w."
        )
    if not bool(torch.isfinite(latents).all()):
        raise RenderError("The latents hold NaN or infinity, so there is nothing to decode: sample them again.")
    if tile is None or not tile_steps(latents, tile):
        history: History = {}
        for t in range(latents.shape[1]):
            yield _step(vae, latents[:, t], history, first=t == 0)
    else:
        yield from _spooled(vae, latents, tile, spool, on_tile)


def tile_steps(latents: torch.Tensor, tile: int | None) -> int:
    """Latent frames that tiles of side `tile` decode, all together: 0 where frames are decoded whole."""
    _, steps, h, w = latents.shape
    return 0 if tile is None or tile >= max(h, w) else steps * len(spans(h, tile)) * len(spans(w, tile))


def _step(vae: Module, latent: torch.Tensor, history: History, first: bool) -> torch.Tensor:
    """The frames (f, 3, H, W) fp32 0..1 on CPU of one latent frame (C, h, w), going on from `history`."""
    config = vae.config
    weight = vae.post_quant_conv.weight
    mean, std = (torch.tensor(v, dtype=torch.float32).view(-1, 1, 1) for v in (config.latents_mean, config.latents_std))
    z = (latent.float().cpu() * std + mean).to(weight.device, weight.dtype)[None]
    z = causal(vae.post_quant_conv, z.contiguous(memory_format=torch.channels_last), history)
    p = config.patch_size or 1
    count = 1 if first else time_factor(config)
    h, w = (side * space_factor(config) for side in latent.shape[-2:])
    out = torch.empty(count, 3, h, w)
    x = middle(vae.decoder.mid_block, causal(vae.decoder.conv_in, z, history), history)
    for i, frame in enumerate(_frames(vae.decoder, x, history, first)):
        top = 0
        for band in bands(frame):
            values = band.float().clamp_(-1.0, 1.0).add_(1.0).mul_(0.5)
            bottom = top + p * band.shape[2]
            # diffusers' unpatchify: the column within a patch is the slower channel index, the row the faster one
            pixels = values.view(3, p, p, *band.shape[2:]).permute(0, 3, 2, 4, 1)
            out[i, :, top:bottom].view(pixels.shape).copy_(pixels)
            top = bottom
    return out


def _frames(decoder: Module, x: torch.Tensor, history: History, first: bool, level: int = 0) -> Iterator[torch.Tensor]:
    """Frames (1, out_channels, H, W) that come from one frame `x` at up block `level`, in order."""
    if level == len(decoder.up_blocks):
        yield activated(decoder.norm_out, decoder.conv_out, x, history)
        return
    block = decoder.up_blocks[level]
    shortcut = getattr(block, "avg_shortcut", None)
    source = x if shortcut is not None else None
    for part in block.resnets:
        x = resnet(part, x, history)
    upsampler = block.upsampler if hasattr(block, "upsampler") else (block.upsamplers or [None])[0]
    if upsampler is None:
        yield from _frames(decoder, x, history, first, level + 1)
        return
    parts = [x]
    if upsampler.mode == "upsample3d" and not first:  # Wan: the first frame neither doubles nor enters the history
        parts = list(causal(upsampler.time_conv, x, history).chunk(2, dim=1))
    del x
    for i in range(len(parts)):
        # nothing below is bound to a name: the next level owns its input and can drop it
        phase = 0 if shortcut is None else shortcut.factor_t - len(parts) + i
        yield from _frames(decoder, _upsample(upsampler, parts[i], shortcut, source, phase), history, first, level + 1)


def _upsample(upsampler: Module, x: torch.Tensor, shortcut: Module | None, source: Any, phase: int) -> torch.Tensor:
    """Twice the height and width of `x`, plus diffusers' DupUp3D of `source` at frame `phase` of its time factor.

    A 3x3 convolution of a picture whose pixels are doubled is four 2x2 ones of the picture itself, one for each place
    of a pixel's copies: 4 multiply-adds where the doubled picture takes 9.
    """
    conv = upsampler.resample[1]
    (n, _, h, w), c = x.shape, conv.out_channels
    y = torch.empty((n, c, 2 * h, 2 * w), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    kernels = torch.cat([kernel for tall in _folded(conv.weight, 2) for kernel in _folded(tall, 3)])
    bias = conv.bias.repeat(4)
    padded = F.pad(x, (1, 1, 1, 1)).contiguous(memory_format=torch.channels_last)
    top = 0
    for band in bands(x):
        bottom = top + band.shape[2]
        parts = F.conv2d(padded[:, :, top : bottom + 2], kernels, bias).view(n, 4, c, bottom - top + 1, w + 1)
        for place in range(4):
            row, column = divmod(place, 2)
            part = parts[:, place, :, row : row + bottom - top, column : column + w]
            if shortcut is not None:
                added = source[:, :, top:bottom]
                if shortcut.in_channels != shortcut.out_channels:
                    copy = shortcut.factor * torch.arange(shortcut.out_channels, device=x.device)
                    added = added[:, (copy + 4 * phase + place) // shortcut.repeats]
                part += added
            y[:, :, 2 * top + row : 2 * bottom : 2, column::2] = part
        top = bottom
    return y


def _folded(kernel: torch.Tensor, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What three taps on doubled pixels are on single ones: (pixel before, own) for the first copy, (own, next)."""
    before, own, after = kernel.split(1, dim=axis)
    return torch.cat((before, own + after), dim=axis), torch.cat((before + own, after), dim=axis)


# --- tiles ---------------------------------------------------------------------------------------------------------


def _ramp(span: tuple[int, int], blend: int, size: int) -> torch.Tensor:
    """Weights (size,) of a tile over all pixels: 1 on [a, b), linear over `blend` pixels on each side of inner ends.

    Over all tiles of an axis they sum to one.
    """
    a, b = span
    at = torch.arange(size) + 0.5
    if blend == 0:
        return ((at > a) & (at < b)).float()
    rise = torch.ones(size) if a == 0 else ((at - a) / (2 * blend) + 0.5).clamp(0, 1)
    fall = torch.ones(size) if b == size else ((b - at) / (2 * blend) + 0.5).clamp(0, 1)
    return rise + fall - 1


def _spooled(
    vae: Module, latents: torch.Tensor, tile: int, spool: Path | None, on_tile: Callable[[], None]
) -> Iterator[torch.Tensor]:
    """`decode_stream` tile by tile. Tiles see a halo as wide as the receptive field, so only attention can differ."""
    _, steps, h, w = latents.shape
    factor, halo = space_factor(vae.config), receptive_radius(vae.config)
    live = any(is_live(a) for a in vae.decoder.mid_block.attentions)
    blend = min(BLEND, *(b - a for side in (h, w) for a, b in spans(side, tile))) // 2 * 2 if live else 0
    with tempfile.TemporaryFile(dir=spool, prefix=".atlasvid-spool-") as file:
        shape = (1 + time_factor(vae.config) * (steps - 1), 3, h * factor, w * factor)
        frames = _reserve(file, shape)
        for rows in spans(h, tile):
            for columns in spans(w, tile):
                _decode_tile(vae, latents, rows, columns, halo, blend / 2, frames, on_tile)
        start = 0
        for t in range(steps):
            stop = start + (1 if t == 0 else time_factor(vae.config))
            yield torch.from_numpy(frames[start:stop].astype(np.float32)).div_(65535.0)
            start = stop


def _reserve(file: Any, shape: tuple[int, ...]) -> np.ndarray:
    """A zeroed uint16 array over `file`, whose blocks are allocated now: a full disk under a map is a SIGBUS."""
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, math.prod(shape) * 2)
        else:  # macOS: written
            for _ in range(shape[0]):
                file.write(bytes(2 * math.prod(shape[1:])))
            file.flush()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ResourceError(
                f"Decoding in tiles needs {math.prod(shape) * 2 / 1e9:.1f} GB of temporary disk space, "
                "which is not there: free some, or choose another output folder."
            ) from error
        raise
    return np.memmap(file, np.uint16, "r+", shape=shape)


def _decode_tile(
    vae: Module,
    latents: torch.Tensor,
    rows: tuple[int, int],
    columns: tuple[int, int],
    halo: int,
    blend: float,
    frames: np.ndarray,
    on_tile: Callable[[], None],
) -> None:
    """Adds one tile, weighted, to `frames` (F, 3, H, W) uint16. `blend`: latents of ramp on each side of a border."""
    _, steps, h, w = latents.shape
    factor = space_factor(vae.config)
    ramp = round(blend * factor)
    reach = halo + math.ceil(blend)
    seen, kept, weights = [], [], []
    for (a, b), size in ((rows, h), (columns, w)):
        seen.append((max(0, a - reach), min(size, b + reach)))
        kept.append((max(0, a * factor - ramp), min(size * factor, b * factor + ramp)))
        weights.append(_ramp((a * factor, b * factor), ramp, size * factor)[kept[-1][0] : kept[-1][1]])
    inside = tuple(slice(k[0] - s[0] * factor, k[1] - s[0] * factor) for k, s in zip(kept, seen, strict=True))
    where = tuple(slice(*k) for k in kept)
    weight = weights[0][:, None] * weights[1][None, :] * 65535.0
    history: History = {}
    start = 0
    for t in range(steps):
        part = latents[:, t, slice(*seen[0]), slice(*seen[1])]
        decoded = _step(vae, part, history, first=t == 0)[..., inside[0], inside[1]]
        target = frames[(slice(start, start + len(decoded)), slice(None), *where)]
        added = (decoded * weight).round_().int().numpy()
        target[...] = np.minimum(target + added, 65535)  # roundings of several tiles may add up to 65536
        start += len(decoded)
        on_tile()
