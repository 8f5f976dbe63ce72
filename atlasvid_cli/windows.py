"""Window layouts: which tokens attend together in a block, and which proxy tokens they see (DESIGN §4).

Tokens lie in raster order (t, h, w). A layout cuts the grid into windows; windows of one shape form a dense batch.
An axis is cut into at most four lengths (two that differ by one, and shorter ones at its ends where windows are
shifted), so a layout has at most 64 shapes; no token is padded, no mask exists.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise, product

import torch

from .presets import Layout
from .shapes import Grid, Shape, proxy_latent


@dataclass(frozen=True)
class Windows:
    """Windows of one shape: `starts` (n, 3) int64, the first token of each along t, h, w."""

    shape: Shape
    starts: torch.Tensor

    def __len__(self) -> int:
        return len(self.starts)

    def split(self, count: int) -> Iterator["Windows"]:
        """The same windows, at most `count` at a time."""
        for part in self.starts.split(count):
            yield Windows(self.shape, part)

    def moved(self, origin: Shape) -> "Windows":
        """The same windows seen from a grid of which this one is the part that begins at `origin`."""
        return Windows(self.shape, self.starts + torch.tensor(origin))

    def axes(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Coordinates (n, length) along t, h, w."""
        t, h, w = (self.starts[:, i, None] + torch.arange(self.shape[i]) for i in range(3))
        return t, h, w

    def indices(self, grid: Grid) -> torch.Tensor:
        """Raster indices (n, tokens) of every token of every window."""
        t, h, w = self.axes()
        return ((t[:, :, None, None] * grid.h + h[:, None, :, None]) * grid.w + w[:, None, None, :]).flatten(1)


def cut(size: int, length: int, shifted: bool) -> list[tuple[int, int]]:
    """(start, length) pieces of an axis, as few as windows of at most `length` allow and alike to one token.

    Shifted they break in the middle of the plain ones, unless one window covers the axis. (Whole windows from one end
    on leave slivers at the other, of one row at times, which see next to nothing.)
    """
    count = -(-size // length)
    halves = range(1 if shifted and count > 1 else 2, 2 * count, 2)
    edges = {0, *(at * size // (2 * count) for at in halves), size}
    return [(a, b - a) for a, b in pairwise(sorted(edges))]


def borders(size: int, cuts: list[tuple[int, bool]]) -> list[int]:
    """Where windows meet along an axis that is `cut` in any of these ways: first token of the later one."""
    pieces = [piece for length, shifted in cuts for piece in cut(size, length, shifted)]
    return sorted({start for start, _ in pieces if start > 0})


def layout(grid: Grid, shape: Shape, shifted: bool) -> list[Windows]:
    """Every window of the grid, grouped by shape. Every token is in exactly one window."""
    groups: dict[Shape, list[Shape]] = {}
    cuts = [cut(size, length, shifted) for size, length in zip((grid.t, grid.h, grid.w), shape, strict=True)]
    for (t, lt), (h, lh), (w, lw) in product(*cuts):
        groups.setdefault((lt, lh, lw), []).append((t, h, w))
    return [Windows(s, torch.tensor(starts)) for s, starts in groups.items()]


def block_layout(block: int, layouts: Sequence[Layout], grid: Grid, phase: int = 0) -> list[Windows]:
    """The windows of a block: blocks cycle through the layouts.

    `phase` is where the cycle begins. Sampling begins one layout further at every step, so that no border stays in the
    same block: what one step leaves there, the next one attends across.
    """
    return layout(grid, *layouts[(block + phase) % len(layouts)])


def aligned_span(
    shape: Shape, proxy: Grid, ratio: Fraction, time_ratio: int, margin: tuple[int, int, int]
) -> tuple[int, int, int]:
    """Proxy tokens along t, h, w that a window of this shape sees."""
    wt, wh, ww = shape
    spans = ((wt + time_ratio - 2) // time_ratio + 1, math.ceil(wh / ratio) + 1, math.ceil(ww / ratio) + 1)
    t, h, w = (min(s, n + 2 * m) for s, n, m in zip((proxy.t, proxy.h, proxy.w), spans, margin, strict=True))
    return t, h, w


def aligned_proxy(
    windows: Windows, proxy: Grid, ratio: Fraction, time_ratio: int, margin: tuple[int, int, int]
) -> torch.Tensor:
    """Raster indices (n, keys) of the proxy tokens aligned with each window, plus `margin` proxy tokens a side.

    The number of keys is the same for all windows of a shape: at a border the box moves inward instead of shrinking.
    """
    counts = aligned_span(windows.shape, proxy, ratio, time_ratio, margin)
    t, h, w = windows.starts.unbind(1)
    firsts = (
        proxy_latent(t, time_ratio),
        h * ratio.denominator // ratio.numerator,
        w * ratio.denominator // ratio.numerator,
    )
    sizes = (proxy.t, proxy.h, proxy.w)
    starts = [
        (first - side).clamp(0, size - count)
        for first, side, size, count in zip(firsts, margin, sizes, counts, strict=True)
    ]
    return Windows(counts, torch.stack(starts, dim=1)).indices(proxy)
