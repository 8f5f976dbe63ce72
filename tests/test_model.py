"""Stage 1's forward, and what surrounds the blocks, against diffusers' own."""

import pytest
import torch

from atlasvid_cli.model import clip_forward, patchify, text_context, unpatchify
from atlasvid_cli.shapes import NATIVE, Grid, Spacing

GRID = Grid(5, 6, 7)


@pytest.fixture
def latents():
    return torch.randn(4, GRID.t, GRID.h * 2, GRID.w * 2, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def text(transformer, prompt):
    return text_context(transformer, [prompt], 512)


def test_patchify_round_trip(latents):
    assert torch.equal(unpatchify(patchify(latents, 2), GRID, 2), latents)


def test_clip_equals_diffusers(transformer, latents, text, padded):
    expected = transformer(latents[None], torch.tensor([700]), padded, return_dict=False)[0][0]
    out = clip_forward(transformer, patchify(latents, 2)[None], GRID, torch.tensor([700]), text)
    torch.testing.assert_close(unpatchify(out[0], GRID, 2), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 1, 20, 77, 120, 511, 512])
def test_what_pads_a_prompt_weighs_what_it_did_in_any_dtype(transformer, dtype, tokens):
    model = type(transformer).from_config(transformer.config).to(dtype)
    with torch.no_grad():
        bias = text_context(model, [torch.zeros(tokens, 16)], 512).bias
    assert bias.dtype == dtype
    assert bias.double().exp().sum().item() == pytest.approx(512, rel=5e-4)


def test_batched_clips_with_prompts_of_different_lengths_equal_diffusers(transformer, latents, prompt):
    prompts = [prompt, prompt[:2]]
    padded = torch.stack([torch.cat((p, torch.zeros(512 - len(p), 16))) for p in prompts])
    times = torch.tensor([700, 31])
    both = torch.stack((latents, latents.flip(1)))
    expected = transformer(both, times, padded, return_dict=False)[0]
    tokens = torch.stack([patchify(x, 2) for x in both])
    out = clip_forward(transformer, tokens, GRID, times, text_context(transformer, prompts, 512))
    for a, b in zip(out, expected, strict=True):
        torch.testing.assert_close(unpatchify(a, GRID, 2), b, atol=1e-5, rtol=0)


@pytest.mark.parametrize("spacing", [NATIVE, Spacing(4), Spacing(3, 2.0)])
def test_positions_of_a_spacing_are_some_of_a_larger_clip(transformer, latents, text, padded, spacing, monkeypatch):
    """Diffusers' own positions of a clip so many times as large, of which every so many-th token is there."""
    whole, space = transformer.rope.forward, int(spacing.space)

    def spread(latents):
        t, h, w = latents.shape[2:]
        larger = latents.new_empty(1, 1, t * spacing.time, h * space, w * space)
        sizes = t * spacing.time, h // 2 * space, w // 2 * space
        return [x.unflatten(1, sizes)[:, :: spacing.time, ::space, ::space].flatten(1, 3) for x in whole(larger)]

    monkeypatch.setattr(transformer.rope, "forward", spread)
    expected = transformer(latents[None], torch.tensor([700]), padded, return_dict=False)[0][0]
    out = clip_forward(transformer, patchify(latents, 2)[None], GRID, torch.tensor([700]), text, spacing)
    torch.testing.assert_close(unpatchify(out[0], GRID, 2), expected, atol=1e-5, rtol=0)
    if spacing != NATIVE:
        assert (
            out - clip_forward(transformer, patchify(latents, 2)[None], GRID, torch.tensor([700]), text)
        ).abs().max() > 1e-4
