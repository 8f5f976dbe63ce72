"""Geometry in integers: pixels -> latents -> tokens, and the cascade of grids that climbs to the target (DESIGN §2).

No torch here. A token covers `spatial * patch` pixels; a causal VAE turns 4k+1 frames into k+1 latent frames.
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, NamedTuple, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

RATIO_STEPS = 16  # ratios r_s are multiples of 1/16

Shape = tuple[int, int, int]  # along t, h, w
Latent = TypeVar("Latent", int, "Tensor")  # its number, or those of many


class Spacing(NamedTuple):
    """Positions from one token of a clip to the next: r_t between latent frames (paper §3.2) and, within a frame, fewer
    than one where it is larger than the base knows (position interpolation, arXiv 2306.15595)."""

    time: int = 1
    space: float = 1.0


NATIVE = Spacing()  # as bases are trained


@dataclass(frozen=True)
class Grid:
    """Tokens along time, height and width."""

    t: int
    h: int
    w: int

    @property
    def tokens(self) -> int:
        return self.t * self.h * self.w


@dataclass(frozen=True)
class Geometry:
    """Compression of the VAE (`temporal`, `spatial`) and the transformer's spatial `patch`."""

    temporal: int
    spatial: int
    patch: int

    @property
    def token_pixels(self) -> int:
        return self.spatial * self.patch


def frames_to_write(seconds: Fraction, fps: int) -> int:
    """Frames in `seconds` at `fps`; a fraction of a frame counts as one."""
    return math.ceil(seconds * fps)


def frames_to_generate(written: int, temporal: int) -> int:
    """The smallest temporal*k + 1 that is at least `written`."""
    return math.ceil((written - 1) / temporal) * temporal + 1


def latent_frames(frames: int, temporal: int) -> int:
    return (frames - 1) // temporal + 1


def video_grid(width: int, height: int, frames: int, geometry: Geometry) -> Grid:
    """Token grid of a clip of `frames` (temporal*k + 1); sizes are rounded up to the next token."""
    pixels = geometry.token_pixels
    return Grid(latent_frames(frames, geometry.temporal), -(-height // pixels), -(-width // pixels))


def proxy_grid(detail: Grid, ratio: Fraction, time_ratio: int) -> Grid:
    """The grid of the proxy that a detail grid is aligned with: ceil(detail / ratio); latent 0 is frame 0 in both."""
    return Grid(
        -(-(detail.t - 1) // time_ratio) + 1,
        math.ceil(detail.h / ratio),
        math.ceil(detail.w / ratio),
    )


def proxy_latent(t: Latent, time_ratio: int) -> Latent:
    """The proxy latent that covers each detail latent t: P covers time_ratio*(P-1)+1 .. time_ratio*P."""
    return -(-t // time_ratio)


def tokens_of(
    box: tuple[int, int, int, int], frames: tuple[int, int], grid: Grid, geometry: Geometry
) -> tuple[Shape, Shape]:
    """The first and the end tokens (t, h, w) of a grid that hold a box (x, y, w, h) in pixels of frames first..end."""
    (x, y, w, h), (first, end), pixels, temporal = box, frames, geometry.token_pixels, geometry.temporal
    # latent t > 0 holds frames temporal*(t-1)+1 .. temporal*t
    start = (-(-first // temporal), y // pixels, x // pixels)
    stop = (-(-(end - 1) // temporal) + 1, -(-(y + h) // pixels), -(-(x + w) // pixels))
    return start, (min(stop[0], grid.t), min(stop[1], grid.h), min(stop[2], grid.w))


def box_of(start: Shape, end: Shape, geometry: Geometry) -> tuple[tuple[int, int, int, int], tuple[int, int]]:
    """The box (x, y, w, h) in pixels and the frames first..end that tokens `start`..`end` (t, h, w) hold."""
    (t, h, w), (to_t, to_h, to_w), pixels = start, end, geometry.token_pixels
    first, last = (geometry.temporal * (at - 1) + 1 if at else 0 for at in (t, to_t))
    return (w * pixels, h * pixels, (to_w - w) * pixels, (to_h - h) * pixels), (first, last)


def with_halo(start: Shape, end: Shape, grid: Grid, halo: Shape) -> tuple[Shape, Shape]:
    """A box of tokens (t, h, w) and `halo` of them to either side, within the grid."""
    (t, h, w), (to_t, to_h, to_w), (a, b, c) = start, end, halo
    low = max(0, t - a), max(0, h - b), max(0, w - c)
    return low, (min(grid.t, to_t + a), min(grid.h, to_h + b), min(grid.w, to_w + c))


def base_grid(target: Grid, base_tokens: int, max_ratio: float, time_ratio: int) -> Grid:
    """The grid of the global proxy of `target`: about `base_tokens` tokens a latent frame, whatever the target's size.

    The target is divided by one ratio, in sixteenths, for as many levels as keep the ratio within `max_ratio`: by the
    one that hides the least of the proxy, which is rounded up to tokens, and strays the least from `base_tokens`. What
    is hidden may be what the prompt asked for.
    """
    reach = max(1.0, math.sqrt(target.h * target.w / base_tokens))
    count = max(1, math.ceil(math.log(reach, max_ratio) - 1e-9))

    def misfit(grid: Grid) -> float:
        climbed = math.prod(float(ratio) for _, ratio in climb(grid, target, max_ratio))
        shown = target.h * target.w / climbed**2 / (grid.h * grid.w)
        return (1 - shown) + abs(math.log(grid.h * grid.w / base_tokens))

    ratios = (Fraction(k, RATIO_STEPS) for k in range(RATIO_STEPS, math.floor(max_ratio * RATIO_STEPS) + 1))
    return min((proxy_grid(target, ratio**count, time_ratio) for ratio in ratios), key=misfit)


def shown_size(size: tuple[int, int], ratio: Fraction, proxy: Grid, geometry: Geometry) -> tuple[int, int]:
    """Pixels (width, height) of a proxy that a video of `size`, `ratio` times larger, shows: its top left part, without
    what rounding up to tokens added."""
    limits = proxy.w * geometry.token_pixels, proxy.h * geometry.token_pixels
    width, height = (min(max(1, round(side / ratio)), limit) for side, limit in zip(size, limits, strict=True))
    return width, height


def climb(proxy: Grid, target: Grid, max_ratio: float, known: Fraction | None = None) -> list[tuple[Grid, Fraction]]:
    """The detail levels [(grid, ratio to the level below)] from `proxy` to `target`: fewest levels, one ratio, which is
    rounded up to sixteenths; of a `known` ratio between the two, to forty-eighths of that.

    Rounding up to tokens at every level may ask for a row or column more than the proxy has: it holds nothing that the
    video shows, and what lies beyond a level is its border again.
    """
    reach = known or max(1.0, target.h / proxy.h, target.w / proxy.w)
    steps = 3 * RATIO_STEPS if known else RATIO_STEPS
    count = max(1, math.ceil(math.log(reach, max_ratio) - 1e-9))
    ratio = Fraction(math.ceil(reach ** (1 / count) * steps - 1e-9), steps)
    levels = [(target, ratio)]
    for _ in range(count - 1):
        levels.insert(0, (proxy_grid(levels[0][0], ratio, 1), ratio))
    return levels


def supersample(width: int, height: int, token_pixels: int, base_tokens: int, min_ratio: float) -> int:
    """The factor at which a small video is generated and then box-filtered down, so that its proxy is not starved."""
    tokens = (width / token_pixels) * (height / token_pixels)
    return max(1, math.ceil(min_ratio * math.sqrt(base_tokens / tokens) - 1e-9))
