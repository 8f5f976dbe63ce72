"""Counts from shapes equal what the layouts hold, window by window."""

from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from atlasvid_cli import flops
from atlasvid_cli.plan import Request, make_plan
from atlasvid_cli.presets import load_preset, window_cycle
from atlasvid_cli.shapes import Grid, proxy_grid
from atlasvid_cli.windows import aligned_proxy, block_layout

TINY = load_preset("tiny")


def counted(run):
    """FLOPs of all matrix products in `run`, as PyTorch's own counter sees them."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("ratio", [Fraction(4), Fraction(5, 2)])
@pytest.mark.parametrize("time_ratio", [1, 4])
def test_pairs_of_the_detail_equal_those_of_its_layouts(ratio, time_ratio):
    grid, size, detail = Grid(9, 19, 30), TINY.transformer, TINY.detail
    below = proxy_grid(grid, ratio, time_ratio)
    pairs = size.layers * grid.tokens * 7
    for block in range(size.layers):
        for windows in block_layout(block, detail.layouts, grid):
            own = len(windows.indices(grid)[0])
            proxy = aligned_proxy(windows, below, ratio, time_ratio, detail.margin).shape[1]
            pairs += len(windows) * own * (own + proxy)
    found = flops.detail_flops(size, 2, detail, grid, below, ratio, time_ratio, text=7)
    assert found == grid.tokens * flops.linear_flops(size, 2) + flops.attention_flops(size, pairs)


def test_pairs_of_the_proxy_stream_equal_those_of_its_layouts():
    grid, size = Grid(13, 17, 30), TINY.transformer
    layouts = [w for block in range(size.layers) for w in block_layout(block, window_cycle([(13, 9, 9)]), grid)]
    pairs = size.layers * grid.tokens * 7 + sum(len(w) * len(w.indices(grid)[0]) ** 2 for w in layouts)
    found = flops.context_flops(size, 2, (13, 9, 9), grid, 7)
    assert found == grid.tokens * flops.linear_flops(size, 2) + flops.attention_flops(size, pairs)


def test_a_native_forward_equals_what_pytorch_counts(transformer, padded):
    size = replace(TINY.transformer, dim=48, ffn=96, layers=3, heads=2, channels=4)
    grid = Grid(3, 6, 8)
    latents = torch.zeros(1, 4, grid.t, grid.h * 2, grid.w * 2)
    found = counted(lambda: transformer(latents, torch.tensor([5]), padded))
    text = 512 * size.layers * 4 * size.dim**2 + 2 * 512 * (16 + 48) * 48  # projections of the text, left out by us
    time = 2 * (32 * 48 + 48 * 48 + 6 * 48 * 48)
    assert flops.full_flops(size, 2, grid.tokens, 512) + text + time == found


def test_the_ceiling_of_published_models_is_that_of_the_design():
    wan = replace(TINY.transformer, dim=1536, ffn=8960, layers=30, heads=12)
    geometry = replace(TINY.geometry, spatial=8)
    plan = make_plan(Request("tiny", 3840, 2160, Fraction(81, 16)))
    plan = replace(plan, preset=replace(TINY, transformer=wan, geometry=geometry))
    assert plan.native_grid.tokens == 21 * 135 * 240
    assert plan.attention_free_ceiling == pytest.approx(50, rel=0.04)


def test_equal_steps_means_steps_and_guidance():
    plan = make_plan(Request("tiny", 3840, 2160, Fraction(12)))
    equal = plan.at_equal_steps(20)
    assert {(s.steps, s.passes) for _, s in equal.named_stages()} == {(20, 2)}
    assert [s.grid for s in equal.levels] == [s.grid for s in plan.levels]
    level = plan.levels[-1]
    context = flops.context_flops(TINY.transformer, 2, TINY.detail.proxy_window, plan.below(level))
    assert equal.flops(equal.levels[-1]) - 2 * context == 40 // level.steps * (plan.flops(level) - context)
