"""A level below made as large by way of its pixels."""

from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F

from atlasvid_cli import enlarge as module
from atlasvid_cli.dataset import TOKEN
from atlasvid_cli.encode import encode_clips
from atlasvid_cli.enlarge import enlarge
from atlasvid_cli.presets import load_preset, presets_folder
from atlasvid_cli.schedule import upsample
from atlasvid_cli.weights import load_half_encoder, load_vae
from atlasvid_cli.world import Scene, render


@pytest.fixture(scope="module")
def vae():
    return load_vae(presets_folder() / "tiny")


def test_frames_between_are_interpolated_and_the_first_and_last_kept():
    frames = iter([torch.full((3, 1, 1), v) for v in (0.0, 0.4, 0.8)])
    made = [frame.mean().item() for frame in module._between(frames, 4)]
    assert made == pytest.approx([i / 10 for i in range(9)])


@pytest.mark.parametrize("ratio", [Fraction(5, 2), Fraction(17, 7), Fraction(51, 16)])
def test_a_pixel_lands_where_the_ratio_says(ratio):
    """Whatever rounds: the size is exact, and a ramp has the value of its place."""
    height, width = 14, 21
    ramp = (torch.arange(width) + 0.5).expand(3, height, width) / width
    size = int(height * ratio), int(width * ratio)
    made = module.resized(ramp, ratio, size)
    assert made.shape == (3, *size)
    places = (torch.arange(size[1]) + 0.5) / float(ratio) / width
    inner = slice(8, size[1] - 8)
    torch.testing.assert_close(made[0, 5, inner], places[inner], atol=5e-3, rtol=0)


@pytest.mark.parametrize("ratio", [Fraction(1), Fraction(17, 16), Fraction(5, 2), Fraction(3), Fraction(51, 16)])
def test_resizing_is_pytorchs_bicubic(ratio):
    frame = torch.rand(3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = F.interpolate(frame[None], scale_factor=float(ratio), mode="bicubic")[0].clamp(-1, 1)
    made = module.resized(frame, ratio, tuple(expected.shape[1:]))
    torch.testing.assert_close(made, expected, atol=5e-5, rtol=0)  # PyTorch finds places in float32


def test_resizing_is_the_same_where_a_cpu_computes_in_bfloat16():
    frame, args = torch.rand(3, 32, 48) * 2 - 1, (Fraction(51, 16), (100, 150))
    expected = module.resized(frame, *args)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module.resized(frame, *args), expected)


def test_outlines_survive_it_better_than_interpolated_latents(vae):
    """A star seen small and slow, made as large and dense, against itself rendered so: half the error or less."""
    ratio, tokens, frames = Fraction(2), 4, 17
    scene = Scene("red", "star", "right", "blue", "gradient", 1.0, 0.2, (0.4, 0.5), 0.05, (0.1, 0.2))
    times, small, large = torch.arange(frames) / 16, tokens * TOKEN, int(tokens * ratio) * TOKEN
    truth = encode_clips(vae, render(scene, times, large, large)[None])[0]
    below = encode_clips(vae, render(scene, times[::4], small, small)[None])[0]
    seen = []
    made = enlarge(vae, below, ratio, 4, (large, large), frames, on_frame=lambda: seen.append(1))
    assert made.shape == truth.shape and made.dtype == torch.float32 and len(seen) == frames
    latents = upsample(below, ratio, 4, tuple(map(range, truth.shape[1:])))
    half = load_half_encoder(presets_folder() / "tiny", load_preset("tiny").detail.upper.entry, vae)
    by_half = enlarge(vae, below, ratio, 4, (large, large), frames, encoder=half)
    assert F.mse_loss(by_half, made) < 0.1 * F.mse_loss(latents, made)
    assert F.mse_loss(made, truth) < 0.5 * F.mse_loss(latents, truth)
