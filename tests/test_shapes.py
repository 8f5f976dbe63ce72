import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atlasvid_cli.presets import load_preset
from atlasvid_cli.shapes import (
    Geometry,
    Grid,
    base_grid,
    box_of,
    climb,
    frames_to_generate,
    frames_to_write,
    latent_frames,
    proxy_grid,
    proxy_latent,
    shown_size,
    supersample,
    tokens_of,
    video_grid,
)

WAN = Geometry(4, 8, 2)
TINY = Geometry(4, 16, 2)


def test_4k_12_seconds_on_wan_is_the_design_figure():
    frames = frames_to_generate(frames_to_write(Fraction(12), 16), 4)
    grid = video_grid(3840, 2160, frames, WAN)
    assert frames == 193
    assert grid == Grid(49, 135, 240)
    assert grid.tokens == 1_587_600


@given(st.integers(1, 2000))
def test_generated_frames_are_the_smallest_4k_plus_1(written):
    frames = frames_to_generate(written, 4)
    assert frames % 4 == 1
    assert written <= frames < written + 4
    assert latent_frames(frames, 4) == (frames - 1) // 4 + 1


@given(st.integers(1, 200), st.integers(1, 8))
def test_a_proxy_latent_covers_its_detail_latents(t, ratio):
    p = proxy_latent(t, ratio)
    assert ratio * (p - 1) + 1 <= t <= ratio * p
    assert proxy_latent(0, ratio) == 0


def test_the_4k_cascade_of_the_embedded_model():
    target = video_grid(3840, 2160, 193, TINY)
    base = base_grid(target, load_preset("tiny").proxy.base_tokens, 4, 4)
    assert base == Grid(13, 7, 12)
    ratio = Fraction(51, 16)
    assert climb(base, target, 4) == [(Grid(49, 22, 38), ratio), (Grid(49, 68, 120), ratio)]


@pytest.mark.parametrize(
    ("width", "height"), [(960, 540), (1920, 1080), (3840, 2160), (1080, 1080), (540, 960), (1080, 1920)]
)
def test_little_of_the_embedded_models_proxies_is_hidden(width, height):
    """Its proxy adapter was trained near so many tokens a latent frame; what a video hides may be its object."""
    tokens = load_preset("tiny").proxy.base_tokens
    target = video_grid(width, height, 65, TINY)
    base = base_grid(target, tokens, 4, 4)
    ratio = math.prod(step for _, step in climb(base, target, 4))
    assert 0.9 * tokens <= base.h * base.w <= 1.125 * tokens
    assert target.h * target.w / ratio**2 > 0.9 * base.h * base.w


@given(st.integers(64, 8000), st.integers(64, 8000), st.integers(1, 60))
def test_the_cascade_fits_any_size(width, height, latents):
    target = Grid(latents, -(-height // 32), -(-width // 32))
    base = base_grid(target, 40, 4, 4)
    levels = climb(base, target, 4)
    assert levels[-1][0] == target
    below, time_ratio, climbed = base, 4, Fraction(1)
    for grid, ratio in levels:
        assert 1 <= ratio <= 4
        aligned = proxy_grid(grid, ratio, time_ratio)
        # a row or column that rounding up asks for and no video shows
        assert aligned.t <= below.t and aligned.h <= below.h + 1 and aligned.w <= below.w + 1
        below, time_ratio, climbed = grid, 1, climbed * ratio
    assert target.h / climbed <= base.h and target.w / climbed <= base.w


@given(st.integers(64, 2000), st.integers(64, 2000), st.integers(1, 40), st.integers(1, 600))
def test_a_box_of_tokens_holds_what_they_were_asked_for(x, y, size, first):
    grid, last = Grid(200, 80, 80), first + size
    start, end = tokens_of((x, y, size, size), (first, last), grid, TINY)
    (left, top, wide, high), (begin, until) = box_of(start, end, TINY)
    assert left <= x and top <= y and x + size <= left + wide and y + size <= top + high
    assert begin <= first and last <= until and (until - begin) - size < 2 * TINY.temporal
    assert wide - size < 2 * TINY.token_pixels and tokens_of((left, top, wide, high), (begin, until), grid, TINY) == (
        start,
        end,
    )


@pytest.mark.parametrize(("width", "height", "scale"), [(64, 64, 7), (640, 360, 1), (3840, 2160, 1)])
def test_small_videos_are_generated_larger(width, height, scale):
    assert supersample(width, height, 32, 40, 2.0) == scale


@given(st.integers(16, 8000), st.integers(16, 8000))
def test_a_video_shows_its_share_of_the_proxy(width, height):
    scale = supersample(width, height, 32, 40, 2.0)
    target = video_grid(width * scale, height * scale, 33, TINY)
    proxy = base_grid(target, 40, 4, 4)
    ratio = Fraction(1)
    for _, step in climb(proxy, target, 4):
        ratio *= step
    shown = shown_size((width * scale, height * scale), ratio, proxy, TINY)
    for side, pixels, tokens in zip((width, height), shown, (proxy.w, proxy.h), strict=True):
        assert 1 <= pixels <= tokens * 32
        assert pixels == 1 or abs(pixels * ratio - side * scale) <= ratio / 2
