"""The oracles of DESIGN §4, against diffusers' own forward where one exists."""

import copy
from fractions import Fraction
from functools import cache, partial

import pytest
import torch
from diffusers import WanTransformer3DModel

from atlasvid_cli import block
from atlasvid_cli.block import EAGER, Kernels
from atlasvid_cli.model import clip_forward, patchify, text_context, unpatchify
from atlasvid_cli.presets import window_cycle
from atlasvid_cli.shapes import Grid
from atlasvid_cli.streams import Alignment, ProxyStream, detail_forward, proxy_context
from atlasvid_cli.windows import layout
from tests.dense import dense_velocity

GRID = Grid(5, 6, 7)
WHOLE = window_cycle([(9, 9, 9)])
LAYOUTS = window_cycle([(3, 4, 4), (5, 2, 3)])


@pytest.fixture
def latents():
    return torch.randn(4, GRID.t, GRID.h * 2, GRID.w * 2, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def text(transformer, prompt):
    return text_context(transformer, [prompt], 512)


def proxy_of(model, text, seed=3, time_ratio=4, ratio=Fraction(3), scaled=True):
    grid = Grid(2 if time_ratio == 4 else 5, 2, 3)
    tokens = torch.randn(grid.tokens, 16, generator=torch.Generator().manual_seed(seed))
    return proxy_context(model, tokens, grid, text, Alignment(ratio, time_ratio, (0, 1, 1), (13, 9, 9), scaled=scaled))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    ("heads", "ffn", "channels"), [(12, 8960, 16), (24, 14336, 48)], ids=["wan2.1-1.3b", "wan2.2-5b"]
)
def test_the_published_blocks_equal_diffusers(heads, ffn, channels, device, monkeypatch):
    """One block of exactly the published size, whole and as a single window."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # diffusers embeds patches by a convolution
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=heads, ffn_dim=ffn, in_channels=channels, out_channels=channels, num_layers=1
    )
    model.to(device).eval().requires_grad_(False)
    grid = Grid(2, 3, 4)
    latents, prompt = torch.randn(channels, 2, 6, 8), torch.randn(5, 4096)
    padded = torch.cat((prompt, torch.zeros(507, 4096)))[None].to(device)
    expected = model(latents[None].to(device), torch.tensor([600], device=device), padded, return_dict=False)[0][0]
    text, tokens = text_context(model, [prompt], 512), patchify(latents, 2)
    whole = clip_forward(model, tokens[None], grid, torch.tensor([600]), text)[0]
    single = detail_forward(model, tokens, grid, 600, text, None, WHOLE, 1)
    for out in (whole, single):
        torch.testing.assert_close(unpatchify(out, grid, 2), expected.cpu(), atol=1e-5, rtol=0)


def test_bfloat16_equals_diffusers_in_bfloat16(transformer, latents, prompt, padded):
    model = WanTransformer3DModel.from_config(transformer.config)
    model.load_state_dict(transformer.state_dict())
    model.to(torch.bfloat16).eval()
    for name, parameter in model.named_parameters():  # as from_pretrained does
        if any(part in name.split(".") for part in model._keep_in_fp32_modules):
            parameter.data = parameter.data.float()
    latents, padded = latents.bfloat16(), padded.bfloat16()
    with torch.no_grad():
        expected = model(latents[None], torch.tensor([400]), padded, return_dict=False)[0][0].float()
        text, tokens = text_context(model, [prompt], 512), patchify(latents, 2).float()
        out = detail_forward(model, tokens, GRID, 400, text, None, WHOLE, 1)
    assert out.dtype == torch.float32
    error = (unpatchify(out, GRID, 2) - expected).norm() / expected.norm()
    assert error < 0.02


def test_one_window_without_proxy_equals_diffusers(transformer, latents, text, padded):
    expected = transformer(latents[None], torch.tensor([400]), padded, return_dict=False)[0][0]
    out = detail_forward(transformer, patchify(latents, 2), GRID, 400, text, None, WHOLE, 1)
    torch.testing.assert_close(unpatchify(out, GRID, 2), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("centre", [False, True])
@pytest.mark.parametrize(
    ("ratio", "time_ratio", "below", "margin", "phase"),
    [(Fraction(5, 2), 4, Grid(3, 5, 7), (0, 1, 1), 1), (Fraction(2), 1, Grid(6, 6, 9), (0, 0, 1), 2)],
)
def test_both_streams_equal_masked_full_attention(
    transformer, padded, text, ratio, time_ratio, below, margin, phase, centre
):
    """Windows, alignment, margins, positions and modulations of the method, at sizes that nothing divides."""
    grid, generator = Grid(6, 11, 17), torch.Generator().manual_seed(4)
    latents, proxy = (torch.randn(4, g.t, g.h * 2, g.w * 2, generator=generator) for g in (grid, below))
    figures = ratio, time_ratio, margin, (2, 3, 4), centre
    expected = dense_velocity(transformer, latents, 600, padded, proxy, *figures, LAYOUTS, phase)
    context = proxy_context(transformer, patchify(proxy, 2), below, text, Alignment(*figures))
    out = detail_forward(transformer, patchify(latents, 2), grid, 600, text, context, LAYOUTS, 5, phase)
    torch.testing.assert_close(unpatchify(out, grid, 2), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_several_samples_together_are_what_they_are_alone(transformer, prompt, chunk):
    """Each with its own timestep, prompt and proxy."""
    generator, below = torch.Generator().manual_seed(0), Grid(2, 2, 3)
    tokens, proxies = (torch.randn(3, g.tokens, 16, generator=generator) for g in (GRID, below))
    prompts, times = [prompt, prompt[:2], prompt.flip(0)], torch.tensor([700, 31, 400])
    alignment = Alignment(Fraction(3), 4, (0, 1, 1), (1, 2, 2))

    def velocity(i):
        text = text_context(transformer, prompts[i], 512)
        proxy = proxy_context(transformer, proxies[i], below, text, alignment)
        return detail_forward(transformer, tokens[i], GRID, times[i], text, proxy, LAYOUTS, chunk)

    together = velocity(slice(None))
    for i in range(3):
        torch.testing.assert_close(together[i], velocity(slice(i, i + 1))[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("chunk", [1, 2, 5, 64])
def test_any_chunk_size_gives_the_same(transformer, latents, text, chunk):
    proxy = proxy_of(transformer, text)
    tokens = patchify(latents, 2)
    expected = detail_forward(transformer, tokens, GRID, 500, text, proxy, LAYOUTS, 64)
    out = detail_forward(transformer, tokens, GRID, 500, text, proxy, LAYOUTS, chunk)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)


def test_compiled_blocks_give_the_same_and_serve_windows_of_any_shape(transformer, text, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # needs no C++ compiler
    monkeypatch.setattr(block, "_compiled_block", cache(block._compiled_block.__wrapped__))
    torch._dynamo.reset()
    counters, counts = torch._dynamo.utils.counters, []
    counters.clear()
    layouts, below, ratio = window_cycle([(2, 5, 5), (4, 3, 6)]), Grid(2, 3, 3), Fraction(3)
    generator = torch.Generator().manual_seed(0)
    proxy = torch.randn(below.tokens, 16, generator=generator)

    def velocity(kernels):
        alignment = Alignment(ratio, 4, (0, 1, 1), (13, 9, 9))
        context = proxy_context(transformer, proxy, below, text, alignment, kernels=kernels)
        return detail_forward(transformer, tokens, grid, 500, text, context, layouts, 3, kernels=kernels)

    with torch.no_grad(), torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for grid in (Grid(4, 7, 9), Grid(5, 9, 8), Grid(3, 8, 14)):  # two of them to see sides of one and of more
            tokens = torch.randn(grid.tokens, 16, generator=generator)
            torch.testing.assert_close(velocity(Kernels(compiled=True)), velocity(EAGER), atol=1e-5, rtol=0)
            counts.append(counters["stats"]["unique_graphs"])
    assert counts[1] == counts[2]


def test_window_order_does_not_matter(transformer, latents, text, monkeypatch):
    proxy = proxy_of(transformer, text)
    tokens = patchify(latents, 2)
    expected = detail_forward(transformer, tokens, GRID, 500, text, proxy, LAYOUTS, 3)

    def backwards(block, layouts, grid, phase):
        groups = layout(grid, *layouts[block % len(layouts)])
        return [type(g)(g.shape, g.starts.flip(0)) for g in reversed(groups)]

    monkeypatch.setattr("atlasvid_cli.streams.block_layout", backwards)
    out = detail_forward(transformer, tokens, GRID, 500, text, proxy, LAYOUTS, 3)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)


def test_with_gradients_the_result_is_the_same(transformer, latents, text):
    proxy = proxy_of(transformer, text)
    tokens = patchify(latents, 2)
    with torch.enable_grad():
        trained = detail_forward(transformer, tokens.requires_grad_(), GRID, 500, text, proxy, LAYOUTS, 3)
    with torch.no_grad():
        sampled = detail_forward(transformer, tokens, GRID, 500, text, proxy, LAYOUTS, 3)
    torch.testing.assert_close(trained, sampled, atol=1e-6, rtol=0)


def test_the_proxy_guides_and_is_never_touched_by_the_detail(transformer, latents, text):
    proxy = proxy_of(transformer, text)
    kept = [(k.clone(), v.clone()) for k, v in proxy.keys_values]
    tokens = patchify(latents, 2)
    out = detail_forward(transformer, tokens, GRID, 500, text, proxy, LAYOUTS, 4)
    alone = detail_forward(transformer, tokens, GRID, 500, text, None, LAYOUTS, 4)
    other = detail_forward(transformer, tokens, GRID, 500, text, proxy_of(transformer, text, seed=4), LAYOUTS, 4)
    assert (out - alone).abs().max() > 1e-3
    assert (out - other).abs().max() > 1e-4
    for (k, v), (k0, v0) in zip(proxy.keys_values, kept, strict=True):
        assert torch.equal(k, k0) and torch.equal(v, v0)


def test_without_scaled_positions_the_keys_are_those_at_ratio_one(transformer, text):
    plain = proxy_of(transformer, text, ratio=Fraction(1)).keys_values
    own, scaled = (proxy_of(transformer, text, scaled=s).keys_values for s in (False, True))
    for (key, value), (own_key, own_value), (scaled_key, scaled_value) in zip(plain, own, scaled, strict=True):
        assert torch.equal(key, own_key) and torch.equal(value, own_value) and torch.equal(value, scaled_value)
        assert (key - scaled_key).abs().max() > 0.1


def test_a_change_reaches_no_further_than_the_shifts_allow(transformer, text):
    grid = Grid(1, 1, 40)
    tokens = torch.randn(grid.tokens, 16, generator=torch.Generator().manual_seed(5))
    changed = tokens.clone()
    changed[0] += 1.0
    layouts = window_cycle([(1, 1, 8)])
    a, b = (detail_forward(transformer, x, grid, 500, text, None, layouts, 4) for x in (tokens, changed))
    moved = (a - b).abs().amax(1) > 0
    # plain windows end at 8, shifted ones at 12, plain ones at 16: three blocks reach token 15
    assert moved[:8].all() and moved[15]
    assert not moved[16:].any()


def test_a_region_sees_the_positions_of_the_whole_video(transformer, text):
    """A region that starts on a window border of every block is computed exactly as within the whole."""
    grid, part = Grid(1, 8, 8), Grid(1, 4, 8)
    proxy_grid_tokens = torch.randn(6, 16, generator=torch.Generator().manual_seed(3))
    alignment = Alignment(Fraction(4), 4, (0, 0, 0), (13, 9, 9))
    proxy = proxy_context(transformer, proxy_grid_tokens, Grid(1, 2, 3), text, alignment)
    tokens = torch.randn(grid.tokens, 16, generator=torch.Generator().manual_seed(6))
    layouts = window_cycle([(1, 1, 8)])
    whole = detail_forward(transformer, tokens, grid, 500, text, proxy, layouts, 4)
    region = detail_forward(transformer, tokens[32:], part, 500, text, proxy, layouts, 4, origin=(0, 4, 0))
    torch.testing.assert_close(region, whole[32:], atol=1e-5, rtol=0)


def test_blocks_computed_again_backwards_give_the_same_gradients(transformer, text):
    proxy_tokens = torch.randn(1 * 2 * 3, 16, generator=torch.Generator().manual_seed(5))
    tokens = torch.randn(GRID.tokens, 16, generator=torch.Generator().manual_seed(6))

    def gradients(model):
        inputs = [t.clone().requires_grad_() for t in (tokens, proxy_tokens)]
        context = proxy_context(model, inputs[1], Grid(1, 2, 3), text, Alignment(Fraction(2), 4, (0, 1, 1), (13, 9, 9)))
        out = detail_forward(model, inputs[0], GRID, 500, text, context, LAYOUTS, 3)
        out = out.sum() + clip_forward(model, inputs[0][None], GRID, torch.tensor([300]), text).square().sum()
        return torch.autograd.grad(out, inputs)

    again = copy.deepcopy(transformer)
    again.enable_gradient_checkpointing()
    for a, b in zip(gradients(transformer), gradients(again), strict=True):
        assert a.abs().max() > 0
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("serves_both", [True, False])
@pytest.mark.parametrize("count", [1, 2])
def test_a_proxy_stream_beside_the_detail_guides_as_one_that_is_kept(transformer, prompt, serves_both, count):
    """At every forward anew, whether one model serves both streams or each has its own; the first of two proxies is
    that of the first prompt."""
    below, generator = Grid(2, 2, 3), torch.Generator().manual_seed(3)
    tokens, proxies = (torch.randn(count, g.tokens, 16, generator=generator) for g in (GRID, below))
    text = text_context(transformer, [prompt, prompt[:2]][:count], 512)
    model = transformer if serves_both else copy.deepcopy(transformer)
    given = model, proxies, below, text, Alignment(Fraction(3), 4, (0, 1, 1), (2, 2, 2), centre=True)

    def forward(guide, x, text):
        with torch.no_grad():
            return detail_forward(transformer, x, GRID, [500] * len(x), text, guide, LAYOUTS, 3)

    with torch.no_grad():
        kept, beside = proxy_context(*given), ProxyStream(*given)
    expected = forward(kept, tokens, text)
    for _ in range(2):
        assert torch.equal(forward(beside, tokens, text), expected)
    one = tokens[:1], text.first()
    assert torch.equal(forward(beside.first(), *one), forward(kept.first(), *one))
    assert (forward(None, tokens, text) - expected).abs().max() > 1e-4
