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
from .half import HalfEncoder


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
    encoder: HalfEncoder | None = None,
) -> torch.Tensor:
    """Latents (C, T, h, w) fp32 of `frames` frames of `size` (height, width) in pixels, `ratio` times as large and
    `time_ratio` times as dense as what normalised `latents` (C, t, y, x) decode to; `tile` and `spool` are as
    `decode_stream` takes them. With an `encoder` for frames half as large, they are made so.
    """
    if encoder:
        ratio, size = ratio / 2, (size[0] // 2, size[1] // 2)
    decoded = (frame.mul_(2).sub_(1) for frame in decode_stream(vae, latents, tile, spool))

    def made() -> Iterator[torch.Tensor]:
        for frame in islice(_between(decoded, time_ratio), frames):
            yield resized(frame, ratio, size)
            if on_frame:
                on_frame()

    return encode_stream(vae, made(), encoder)


def _between(frames: Iterator[torch.Tensor], time_ratio: int) -> Iterator[torch.Tensor]:
    """Frames, and `time_ratio` - 1 between any two, interpolated linearly."""
    last = next(frames)
    yield last
    for frame in frames:
        for i in range(1, time_ratio):
            yield torch.lerp(last, frame, i / time_ratio)
        yield frame
        last = frame


@torch.autocast("cpu", enabled=False)  # a product into a tensor of fp32 is one of fp32
def resized(frame: torch.Tensor, ratio: Fraction, size: tuple[int, int]) -> torch.Tensor:
    """The top left `size` of a frame (3, H, W) in -1..1 made `ratio` times as large by PyTorch's bicubic, whose pixels
    stay where they are.

    Every `ratio.numerator` rows weigh the same place of as many periods of `ratio.denominator` rows, and two to either
    side, so that they are products with one small matrix, and so are columns: less than a third of the time that
    `F.interpolate` takes on a CPU.
    """
    made, period = ratio.numerator, ratio.denominator
    places = (torch.arange(made, dtype=torch.float64) + 0.5) / float(ratio) - 0.5
    weights = _cubic(places[:, None] - torch.arange(-2, period + 2)).to(frame)
    down, across = (-(-side // made) for side in size)
    inner = frame[:, : down * period + 2, : across * period + 2]
    missing = (max(0, n * period + 2 - have) for n, have in ((across, inner.shape[2]), (down, inner.shape[1])))
    right, below = missing
    padded = F.pad(inner, (2, right, 2, below), "replicate")
    wide = (padded.unfold(2, period + 4, period).contiguous() @ weights.mT).flatten(2)
    tall = frame.new_empty(3, down, made, across * made)
    for plane, out in zip(wide.unfold(1, period + 4, period), tall, strict=True):  # all at once they would be copied
        torch.matmul(weights, plane.mT, out=out)
    height, width = size
    return tall.flatten(1, 2)[:, :height, :width].clamp_(-1, 1)


def _cubic(distance: torch.Tensor, a: float = -0.75) -> torch.Tensor:
    """Keys' kernel of cubic convolution (IEEE Trans. ASSP 29(6), 1981), whose `a` is PyTorch's."""
    x = distance.abs()
    near, far = ((a + 2) * x - (a + 3)) * x * x + 1, (((x - 5) * x + 8) * x - 4) * a
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
