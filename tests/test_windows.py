from fractions import Fraction

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atlasvid_cli.presets import window_cycle
from atlasvid_cli.shapes import Grid, proxy_grid
from atlasvid_cli.windows import Windows, aligned_proxy, block_layout, borders, cut, layout

sizes = st.tuples(st.integers(1, 9), st.integers(1, 12), st.integers(1, 12))


@given(sizes, sizes, st.booleans())
def test_what_windows_take_they_put_back_and_every_token_is_in_one_window(size, shape, shifted):
    """As a block reads and writes them."""
    grid = Grid(*size)
    windows = layout(grid, shape, shifted)
    x, out = torch.arange(grid.tokens), torch.full((grid.tokens,), -1)
    for group in windows:
        out[group.indices(grid)] = x[group.indices(grid)]
    assert torch.equal(out, x)
    assert sum(group.indices(grid).numel() for group in windows) == grid.tokens
    assert len(windows) <= 64


@given(st.integers(1, 40), st.integers(1, 12), st.booleans())
def test_pieces_are_no_longer_than_the_window(size, length, shifted):
    pieces = cut(size, length, shifted)
    assert sum(n for _, n in pieces) == size
    assert all(0 < n <= length for _, n in pieces)
    assert [start for start, _ in pieces] == [sum(n for _, n in pieces[:i]) for i in range(len(pieces))]


@given(st.integers(1, 240), st.integers(1, 60))
def test_plain_windows_are_as_few_as_can_be_and_alike(size, length):
    lengths = [n for _, n in cut(size, length, False)]
    assert len(lengths) == -(-size // length) and max(lengths) - min(lengths) <= 1


@given(st.integers(2, 240), st.integers(1, 60))
def test_a_shifted_axis_breaks_in_the_middle_of_the_plain_windows(size, length):
    plain, moved = cut(size, length, False), cut(size, length, True)
    if len(plain) == 1:
        assert moved == plain
        return
    middles = {int(start + n / 2 + d) for start, n in plain for d in (-0.5, 0, 0.5)}
    assert {start for start, _ in moved[1:]} <= middles
    assert len({n for _, n in moved[1:-1]}) <= 2


def test_no_sliver_is_left_at_the_end():
    assert [n for _, n in cut(240, 52, True)] == [24, 48, 48, 48, 48, 24]  # 4K of Wan2.1, which had 6 beside 52
    assert [n for _, n in cut(23, 22, False)] == [11, 12]  # 720p of Wan2.2 5B, which had 22 and 1


def test_blocks_cycle_through_the_shapes_plain_then_shifted():
    grid = Grid(4, 8, 8)
    layouts = window_cycle([(4, 4, 4), (2, 8, 8)])
    first = [block_layout(i, layouts, grid)[0].shape for i in range(5)]
    assert first[0] == (4, 4, 4) and first[2] == (2, 8, 8) and first[4] == first[0]


def test_a_phase_begins_the_cycle_later_so_that_no_border_stays_in_its_block():
    grid, layouts = Grid(4, 8, 8), window_cycle([(4, 4, 4), (2, 8, 8)])
    for phase in range(5):
        moved, plain = block_layout(1, layouts, grid, phase), block_layout(1 + phase, layouts, grid)
        assert [w.shape for w in moved] == [w.shape for w in plain]
        assert all(torch.equal(a.starts, b.starts) for a, b in zip(moved, plain, strict=True))


@settings(max_examples=50)
@given(sizes, st.sampled_from([Fraction(4), Fraction(3), Fraction(5, 2), Fraction(15, 4)]), st.sampled_from([1, 4]))
def test_the_aligned_proxy_covers_the_window(shape, ratio, time_ratio):
    grid = Grid(17, 20, 24)
    proxy = proxy_grid(grid, ratio, time_ratio)
    for group in layout(grid, shape, True):
        index = aligned_proxy(group, proxy, ratio, time_ratio, (0, 0, 0))
        for (t, h, w), seen in zip(group.starts.tolist(), index.tolist(), strict=True):
            last = (t + group.shape[0] - 1, h + group.shape[1] - 1, w + group.shape[2] - 1)
            for a, b, c in ((t, h, w), last):
                p = (-(-a // time_ratio) * proxy.h + int(b / ratio)) * proxy.w + int(c / ratio)
                assert p in seen


def test_a_margin_moves_inward_at_the_border():
    group = Windows((4, 8, 8), torch.tensor([[0, 0, 0], [0, 8, 8]]))
    index = aligned_proxy(group, Grid(2, 5, 8), Fraction(4), 4, (0, 1, 1))
    assert index.shape == (2, 2 * 5 * 5)


def test_borders_are_the_inner_edges_of_plain_and_shifted_windows():
    assert borders(12, [(4, False)]) == [4, 8]
    assert borders(12, [(4, False), (4, True)]) == [2, 4, 6, 8, 10]
    assert borders(12, [(4, False), (4, True), (6, False), (6, True)]) == [2, 3, 4, 6, 8, 9, 10]
    assert borders(4, [(8, True)]) == []
