"""A frame through 2D convolutions a band of rows at a time: what lies between two of them stays in a CPU's cache.

Frames of 4K are larger than any cache, and going over memory anew for each layer takes as long as much of the work. As
`causal` does over time, each convolution keeps the last rows that it has seen, so that nothing is computed twice.
A frame of `height` rows is told as its bands (n, C, rows, w) from the top, taken one by one; elsewhere than on a CPU it
is one band.
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


def empty_like(x: torch.Tensor, channels: int, rows: int, columns: int) -> torch.Tensor:
    """An uninitialised (n, channels, rows, columns), channels last."""
    return x.new_empty((x.shape[0], rows, columns, channels)).permute(0, 3, 1, 2)


def joined(parts: Bands, height: int) -> torch.Tensor:
    """The frame whose bands these are: the band itself where it is one."""
    whole, top = torch.empty(0), 0
    for part in parts:
        _, c, rows, w = part.shape
        if rows == height:
            whole = part
            continue  # to the end of `parts`, which then hold nothing
        if not top:
            whole = empty_like(part, c, height, w)
        whole[:, :, top : top + rows] = part
        top += rows
    return whole


def resnet(block: Module, parts: Bands, height: int) -> Iterator[torch.Tensor]:
    """diffusers' WanResidualBlock, of a block that is still."""
    waiting: list[torch.Tensor] = []  # rows that the convolutions have not come to

    def seen() -> Iterator[torch.Tensor]:
        shortcut = block.conv_shortcut
        for part in parts:
            own = isinstance(shortcut, torch.nn.Identity)
            waiting.append(part if own else F.conv2d(part, shortcut.weight[:, :, -1], shortcut.bias))
            yield part

    first = activated(block.norm1, block.conv1, seen(), height)
    for made in activated(block.norm2, block.conv2, first, height):
        rows = waiting[0] if len(waiting) == 1 else torch.cat(waiting, dim=2)
        made += rows[:, :, : made.shape[2]]
        waiting[:] = [rows[:, :, made.shape[2] :].clone()]
        del rows
        yield made


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
    for part in parts:
        _, c, rows, w = part.shape
        left -= rows
        kept, below = 1 if above is None else above.shape[2], 0 if left else 1
        seen = empty_like(part, c, kept + rows + below, w)
        seen[:, :, :kept] = 0 if above is None else above
        before(part, seen[:, :, kept : kept + rows])
        if below:
            seen[:, :, -1] = 0
        made = F.conv2d(seen, weight, conv.bias, padding=(0, 1)) if seen.shape[2] > 2 else None
        above = seen[:, :, -2:].clone()
        del part, seen  # what a generator has a name for it holds while it waits
        if made is not None:
            yield made


def normed(norm: Module, x: torch.Tensor, out: torch.Tensor) -> None:
    """SiLU of WanRMS_norm of `x` (n, C, h, w) into `out`."""
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min_(1e-12)
    torch.mul(x, length.reciprocal_(), out=out).mul_(norm.gamma.view(1, -1, 1, 1) * norm.scale)
    if torch.is_tensor(norm.bias):
        out.add_(norm.bias.view(1, -1, 1, 1))
    F.silu(out, inplace=True)


def halved(layers: Module, parts: Bands) -> Iterator[torch.Tensor]:
    """The padding and 3x3 convolution of stride 2 of diffusers' WanResample, of a frame of an even height."""
    conv, kept = layers[1], None
    for part in parts:
        seen = part if kept is None else torch.cat([kept, part], dim=2)
        made = (seen.shape[2] - 1) // 2
        if made:
            yield F.conv2d(F.pad(seen, (0, 1)), conv.weight, conv.bias, stride=2)
        kept = seen[:, :, 2 * made :]
    if kept is not None:
        yield F.conv2d(F.pad(kept, (0, 1, 0, 1)), conv.weight, conv.bias, stride=2)


def pooled(parts: Bands, side: int, pools: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    """`parts` as they are; the means of their squares of `side` pixels join `pools`, in bands."""
    kept = None
    for part in parts:
        seen = part if kept is None else torch.cat([kept, part], dim=2)
        rows = seen.shape[2] // side * side
        if rows:
            pools.append(F.avg_pool2d(seen[:, :, :rows], side))
        kept = seen[:, :, rows:] if rows < seen.shape[2] else None
        yield part
