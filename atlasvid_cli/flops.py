"""FLOPs of the transformer from shapes alone: linear layers, QK^T and PV, two for each multiply-add (DESIGN §9).

Norms, rotations, softmax and the once-a-video projections of the text are left out.
"""

import dataclasses
import math
from fractions import Fraction

from .presets import Detail, Layout, Transformer, window_cycle
from .shapes import Grid, Shape

PROMPT_KEYS = 24  # of an ordinary prompt, once its padding is one key


def linear_flops(size: Transformer, patch: int, layers: int | None = None) -> int:
    """Of a token in one forward: eight projections less the text's two, FFN, patch embedding and output projection."""
    block = 2 * (size.block_parameters - 2 * size.dim**2)
    return (size.layers if layers is None else layers) * block + 4 * size.dim * size.channels * patch**2


def attention_flops(size: Transformer, pairs: int) -> int:
    """Of QK^T and PV for so many pairs of a query and a key, all heads together."""
    return 4 * size.dim * pairs


def full_flops(size: Transformer, patch: int, tokens: int, text: int = PROMPT_KEYS) -> int:
    """Of one forward in which every token attends to all tokens and to `text` keys."""
    pairs = size.layers * tokens * (tokens + text)
    return tokens * linear_flops(size, patch) + attention_flops(size, pairs)


def detail_flops(
    size: Transformer,
    patch: int,
    detail: Detail,
    grid: Grid,
    below: Grid,
    ratio: Fraction,
    time_ratio: int,
    layers: int | None = None,
    text: int = PROMPT_KEYS,
) -> int:
    """Of one forward of the first `layers` blocks on the detail, each window with its aligned proxy of `below`."""
    from .windows import aligned_span

    layers = size.layers if layers is None else layers
    pairs = layers * grid.tokens * text
    for block in range(layers):
        lengths = _lengths(grid, detail.layouts[block % len(detail.layouts)])
        pairs += math.prod(sum(n * n for n in axis) for axis in lengths)
        if not detail.proxy_attention:
            continue
        # the span of an axis depends on the window's length along it alone, so the sum over windows is a product
        guided = 1
        for axis, axis_lengths in enumerate(lengths):
            spans = (aligned_span((n, n, n), below, ratio, time_ratio, detail.margin)[axis] for n in axis_lengths)
            guided *= sum(n * span for n, span in zip(axis_lengths, spans, strict=True))
        pairs += guided
    return grid.tokens * linear_flops(size, patch, layers) + attention_flops(size, pairs)


def context_flops(size: Transformer, patch: int, window: Shape, grid: Grid, text: int = PROMPT_KEYS) -> int:
    """Of the proxy stream: `grid` once through all blocks, in windows of one shape."""
    pairs, layouts = size.layers * grid.tokens * text, window_cycle([window])
    for block in range(size.layers):
        lengths = _lengths(grid, layouts[block % len(layouts)])
        pairs += math.prod(sum(n * n for n in axis) for axis in lengths)
    return grid.tokens * linear_flops(size, patch) + attention_flops(size, pairs)


def _lengths(grid: Grid, layout: Layout) -> list[list[int]]:
    """Tokens of the windows along t, h and w."""
    from .windows import cut

    (shape, shifted), sizes = layout, dataclasses.astuple(grid)
    return [[n for _, n in cut(size, window, shifted)] for size, window in zip(sizes, shape, strict=True)]
