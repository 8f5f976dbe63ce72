"""A level below made as large in pixels: decoded, interpolated, encoded again.

An outline that latents hold does not survive interpolating them; its pixels do (docs/LOG.md).
"""

from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan

from .decode import decode_stream
from .encode import encode_stream


def enlarge(
    vae: AutoencoderKLWan,
    latents: torch.Tensor,
    ratio: Fraction,
    time_ratio: int,
    size: tuple[int, int],
    frames: int,
    tile: int | None = None,
    spool: Path | None = None,
    on_frame: Callable[[], None] | None = None,
) -> torch.Tensor:
    """Latents (C, T, h, w) fp32 of `frames` frames of `size` (height, width) in pixels, `ratio` times as large and
    `time_ratio` times as dense as what normalised `latents` (C, t, y, x) decode to; `tile`, `spool` as there.
    """
    decoded = (frame for chunk in decode_stream(vae, latents, tile, spool) for frame in chunk)

    def made() -> Iterator[torch.Tensor]:
        for frame in islice(_between(decoded, time_ratio), frames):
            yield _resized(frame, ratio, size).mul_(2).sub_(1)
            if on_frame:
                on_frame()

    return encode_stream(vae, made())


def _between(frames: Iterator[torch.Tensor], time_ratio: int) -> Iterator[torch.Tensor]:
    """Frames, and `time_ratio` - 1 between any two, interpolated linearly."""
    last = next(frames)
    yield last
    for frame in frames:
        for i in range(1, time_ratio):
            yield torch.lerp(last, frame, i / time_ratio)
        yield frame
        last = frame


def _resized(frame: torch.Tensor, ratio: Fraction, size: tuple[int, int]) -> torch.Tensor:
    """The top left `size` of a frame (3, H, W) in 0..1 made `ratio` times as large: no pixel of it moves to fit."""
    height, width = size
    large = F.interpolate(frame[None], scale_factor=float(ratio), mode="bicubic").clamp_(0, 1)
    missing = (0, max(0, width - large.shape[-1]), 0, max(0, height - large.shape[-2]))  # by rounding, at most a pixel
    if any(missing):
        large = F.pad(large, missing, "replicate")
    return large[0, :, :height, :width]
