"""A frame through 2D convolutions a band of rows at a time: what lies between two of them stays in a CPU's cache.

Frames of 4K are larger than any cache, and fetching them anew for each layer takes longer than computing them. As
`causal` does over time, each convolution keeps the last rows that it has seen, so that nothing is computed twice.
A frame of `height` rows is told as its bands (n, C, rows, w) from the top, taken one by one; elsewhere than on a CPU it
is one band. A generator holds what it has names for while it waits, so bands are handed on without one.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from .vae_cost import BAND

Module = Any  # diffusers' modules, whose attributes are not typed
Bands = Iterable[torch.Tensor]


def bands(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Views of the rows of (..., h, w), as many at a time as `BAND` allows on a CPU; elsewhere all."""
    height = x.shape[-2]
    return x.split(height if x.is_cuda else max(1, BAND * height // x.numel()), dim=-2)


def cut(parts: Bands, height: int) -> Iterator[torch.Tensor]:
    """A frame that comes whole in bands, and bands as they come."""
    for part in parts:
        ready = list(bands(part)) if part.shape[2] == height else [part]
        del part
        while ready:
            yield ready.pop(0)


def joined(parts: Bands, height: int) -> torch.Tensor:
    """The frame whose bands these are: the band itself where it is one."""
    whole, top = torch.empty(0), 0
    for part in parts:
        _, c, rows, w = part.shape
        if rows == height:
            whole = part
            continue  # to the end of `parts`, which then hold nothing
        if not top:
            whole = empty_frame(part, c, height, w)
        whole[:, :, top : top + rows] = part
        top += rows
    return whole


def empty_frame(like: torch.Tensor, channels: int, rows: int, columns: int) -> torch.Tensor:
    """An uninitialised (n, channels, rows, columns), channels last, of the batch, dtype and device of `like`."""
    return like.new_empty((like.shape[0], rows, columns, channels)).permute(0, 3, 1, 2)


def resnet(block: Module, parts: Bands, height: int) -> Iterator[torch.Tensor]:
    """diffusers' WanResidualBlock, of a block that is still."""
    waiting: list[torch.Tensor] = []  # rows that the convolutions have not come to

    def passing() -> Iterator[torch.Tensor]:
        shortcut = block.conv_shortcut
        for part in cut(parts, height):
            own = isinstance(shortcut, torch.nn.Identity)
            waiting.append(part if own else F.conv2d(part, shortcut.weight[:, :, -1], shortcut.bias))
            ready = [part]
            del part
            yield ready.pop()

    first = activated(block.norm1, block.conv1, passing(), height)
    for made in activated(block.norm2, block.conv2, first, height):
        rows = waiting[0] if len(waiting) == 1 else torch.cat(waiting, dim=2)
        made += rows[:, :, : made.shape[2]]
        waiting[:] = [rows[:, :, made.shape[2] :].clone()]
        ready = [made]
        del rows, made
        yield ready.pop()


def activated(norm: Module, conv: Module, parts: Bands, height: int) -> Iterator[torch.Tensor]:
    """`convolved` at SiLU of WanRMS_norm."""
    return convolved(conv, parts, height, partial(normed, norm))


def convolved(
    conv: Module,
    parts: Bands,
    height: int,
    before: Callable[[torch.Tensor, torch.Tensor], object] = lambda x, out: out.copy_(x),
) -> Iterator[torch.Tensor]:
    """A still 3x3 WanCausalConv3d at what `before` writes of each band into its second argument."""
    weight = conv.weight[:, :, -1].contiguous(memory_format=torch.channels_last)
    above, left = None, height
    for part in cut(parts, height):
        _, c, rows, w = part.shape
        left -= rows
        kept, below = 1 if above is None else above.shape[2], 0 if left else 1
        seen = empty_frame(part, c, kept + rows + below, w)
        seen[:, :, :kept] = 0 if above is None else above
        before(part, seen[:, :, kept : kept + rows])
        if below:
            seen[:, :, -1] = 0
        del part
        made = [F.conv2d(seen, weight, conv.bias, padding=(0, 1))] if seen.shape[2] > 2 else []
        above = seen[:, :, -2:].clone()
        del seen
        if made:
            yield made.pop()


def normed(norm: Module, x: torch.Tensor, out: torch.Tensor) -> None:
    """SiLU of WanRMS_norm of `x` (n, C, h, w) into `out`."""
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min_(1e-12)
    torch.mul(x, length.reciprocal_(), out=out).mul_(norm.gamma.view(1, -1, 1, 1) * norm.scale)
    if torch.is_tensor(norm.bias):
        out.add_(norm.bias.view(1, -1, 1, 1))
    F.silu(out, inplace=True)


def halved(layers: Module, parts: Bands, height: int) -> Iterator[torch.Tensor]:
    """The padding (a column and a row of zeros after the last) and 3x3 convolution of stride 2 of diffusers'
    WanResample."""
    conv, kept, left = layers[1], None, height
    for part in parts:
        left -= part.shape[2]
        below = 0 if left else 1
        seen = F.pad(part if kept is None else torch.cat([kept, part], dim=2), (0, 1, 0, below))
        count = (seen.shape[2] - 1) // 2
        made = [F.conv2d(seen, conv.weight, conv.bias, stride=2)] if count else []
        kept = seen[:, :, 2 * count :, :-1].clone()
        del part, seen
        if made:
            yield made.pop()


def pooled(parts: Bands, height: int, side: int, pools: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    """`parts` as they are; the means of their squares of `side` pixels join `pools`, in bands."""
    kept = None
    for part in cut(parts, height):
        seen = part if kept is None else torch.cat([kept, part], dim=2)
        rows = seen.shape[2] // side * side
        if rows:
            pools.append(F.avg_pool2d(seen[:, :, :rows], side) if side > 1 else seen)
        kept = seen[:, :, rows:].clone() if rows < seen.shape[2] else None
        ready = [part]
        del part, seen
        yield ready.pop()
