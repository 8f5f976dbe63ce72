"""Latents to frames as a stream: one frame at a time through diffusers' own VAE parameters, with bounded memory.

We walk the decoder's modules one frame at a time (`causal`), depth first: the two frames that a temporal upsampler
makes go through the rest of the decoder one after the other. That equals `vae._decode`, and the largest activation, and
what comes out at a time, is one frame, not four.
"""

import copy
import errno
import itertools
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from . import banded
from .banded import Bands, Module, bands, empty_frame, joined
from .causal import History, activated, causal, is_live, middle, resnets, still
from .errors import RenderError, ResourceError
from .vae_cost import BLEND, receptive_radius, space_factor, spans, time_factor

ROW_OF_PATCH = {2: torch.complex64, 4: torch.complex128}  # so many floats as one number, to be copied as one


@torch.no_grad()
def decode_stream(
    vae: Module,
    latents: torch.Tensor,
    tile: int | None = None,
    spool: Path | None = None,
    on_tile: Callable[[], None] = lambda: None,
) -> Iterator[torch.Tensor]:
    """Frames (3, H, W), fp32 on CPU in 0..1, of normalised latents (C, T, h, w): one, then four a latent frame.

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
        history = _Decoding(out=_by_rows(vae))
        for t in range(latents.shape[1]):
            yield from _step(vae, latents[:, t], history, first=t == 0)
    else:
        yield from _spooled(vae, latents, tile, spool, on_tile)


def tile_steps(latents: torch.Tensor, tile: int | None) -> int:
    """Latent frames that tiles of side `tile` decode, all together: 0 where frames are decoded whole."""
    _, steps, h, w = latents.shape
    return 0 if tile is None or tile >= max(h, w) else steps * len(spans(h, tile)) * len(spans(w, tile))


@dataclass(kw_only=True)
class _Decoding(History):
    """The history of what is decoded, and the last convolution as `_by_rows` has it."""

    out: Module


def _step(vae: Module, latent: torch.Tensor, history: _Decoding, first: bool) -> Iterator[torch.Tensor]:
    """The frames (3, H, W) fp32 0..1 on CPU of one latent frame (C, h, w), going on from `history`."""
    config = vae.config
    weight = vae.post_quant_conv.weight
    mean, std = (torch.tensor(v, dtype=torch.float32).view(-1, 1, 1) for v in (config.latents_mean, config.latents_std))
    z = (latent.float().cpu() * std + mean).to(weight.device, weight.dtype)[None]
    z = causal(vae.post_quant_conv, z.contiguous(memory_format=torch.channels_last), history)
    p = config.patch_size or 1
    number = ROW_OF_PATCH.get(p, torch.float32)
    h, w = (side * space_factor(config) for side in latent.shape[-2:])
    x = middle(vae.decoder.mid_block, causal(vae.decoder.conv_in, z, history), history)
    for frame in _frames(vae.decoder, [x], x.shape[2], history, first):
        made, top = [torch.empty(3, h, w)], 0
        for band in frame:
            values = band.float().clamp_(-1.0, 1.0).add_(1.0).mul_(0.5)
            bottom, columns = top + p * band.shape[2], band.shape[3]
            rows = values.permute(0, 2, 3, 1).contiguous().view(-1, columns, 3, p, p).view(number)
            rows = rows.permute(2, 0, 3, 1, 4)
            made[0][:, top:bottom].view(number).view(rows.shape).copy_(rows)
            top = bottom
            del band, values, rows  # while the next ones are made
        yield made.pop()


def _by_rows(vae: Module) -> Module:
    """The decoder's last convolution, its channels by colour, row and column of a patch, where diffusers has columns
    before rows: a row then lies together in memory, as in a frame."""
    made, patch = copy.deepcopy(vae.decoder.conv_out), vae.config.patch_size or 1
    for values in made.parameters():
        values.copy_(values.unflatten(0, (-1, patch, patch)).transpose(1, 2).flatten(0, 2))
    return made


def _frames(
    decoder: Module, parts: Bands, height: int, history: _Decoding, first: bool, level: int = 0
) -> Iterator[Bands]:
    """The frames that come from one of `height` rows, in bands, at up block `level`, in order: bands of out_channels
    channels, to be taken before the next frame."""
    block = decoder.up_blocks[level]
    if level == len(decoder.up_blocks) - 1:
        parts = resnets(block.resnets, parts, height, history)
        if still(history.out, history):
            yield banded.activated(decoder.norm_out, history.out, parts, height)
        else:
            yield bands(activated(decoder.norm_out, history.out, joined(parts, height), history))
        return
    x = joined(parts, height)
    shortcut = getattr(block, "avg_shortcut", None)
    source = x if shortcut is not None else None
    x = joined(resnets(block.resnets, [x], height, history), height)
    upsampler = block.upsampler if hasattr(block, "upsampler") else block.upsamplers[0]
    frames = [x]
    if upsampler.mode == "upsample3d" and not first:  # Wan: the first frame neither doubles nor enters the history
        frames = list(causal(upsampler.time_conv, x, history).chunk(2, dim=1))
    del x
    for i, frame in enumerate(frames):
        phase = 0 if shortcut is None else shortcut.factor_t - len(frames) + i
        upsampled = _upsampled(upsampler, frame, shortcut, source, phase)
        yield from _frames(decoder, upsampled, 2 * height, history, first, level + 1)


def _upsampled(
    upsampler: Module, x: torch.Tensor, shortcut: Module | None, source: Any, phase: int
) -> Iterator[torch.Tensor]:
    """Twice the height and width of `x` in bands, plus diffusers' DupUp3D of `source` at frame `phase` of its time
    factor.

    A 3x3 convolution of a picture whose pixels are doubled is four 2x2 ones of the picture itself, one for each place
    of a pixel's copies: 4 multiply-adds where the doubled picture takes 9. Those of a row are one of twice the
    channels: all four in one are slower.
    """
    conv = upsampler.resample[1]
    (_, _, height, w), c = x.shape, conv.out_channels
    kernels = [torch.cat(_folded(tall, 3)) for tall in _folded(conv.weight, 2)]
    bias = conv.bias.repeat(2)
    top = 0
    for band in bands(x):
        bottom = top + band.shape[2]
        y = empty_frame(x, c, 2 * (bottom - top), 2 * w)
        for row, kernel in enumerate(kernels):
            above, below = top + row - 1, bottom + row
            seen = F.pad(x[:, :, max(0, above) : below], (0, 0, max(0, -above), max(0, below - height)))
            made = F.conv2d(seen, kernel, bias, padding=(0, 1)).unflatten(1, (2, c))
            for column in range(2):
                own, place = made[:, column, ..., column : column + w], y[:, :, row::2, column::2]
                if shortcut is None:
                    place.copy_(own)
                    continue
                added = source[:, :, top:bottom]
                if shortcut.in_channels != shortcut.out_channels:
                    first = shortcut.factor * torch.arange(shortcut.out_channels, device=x.device)
                    added = added[:, (first + 4 * phase + 2 * row + column) // shortcut.repeats]
                torch.add(own, added, out=place)
            del seen, made, own, place
        top, ready = bottom, [y]
        del y
        yield ready.pop()


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
        for frame in frames:
            yield torch.from_numpy(frame.astype(np.float32)).div_(65535.0)


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
    history = _Decoding(out=_by_rows(vae))
    count = itertools.count()
    for t in range(steps):
        part = latents[:, t, slice(*seen[0]), slice(*seen[1])]
        for decoded in _step(vae, part, history, first=t == 0):
            target = frames[next(count)][:, where[0], where[1]]
            added = (decoded[:, inside[0], inside[1]] * weight).round_().int().numpy()
            target[...] = np.minimum(target + added, 65535)  # roundings of several tiles may add up to 65536
        on_tile()
