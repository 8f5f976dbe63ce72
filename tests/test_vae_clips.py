"""Whole clips at once: what diffusers' VAE makes of them, and of its gradients."""

import pytest
import torch

from atlasvid_cli import causal
from atlasvid_cli.vae_clips import clip_moments, clip_pixels
from tests.test_decode import RESIDUAL, WAN22, build


@pytest.mark.parametrize(("still", "idle"), [(0, 0), (2, 0), (2, 1)])
@pytest.mark.parametrize("config", [RESIDUAL, WAN22], ids=["embedded", "wan2.2"])
@pytest.mark.parametrize("frames", [1, 13])
@torch.no_grad()
def test_clips_are_coded_as_by_diffusers(config, frames, still, idle):
    vae = build(config, live=False)
    causal.hold_still(vae, still)
    causal.make_idle(vae, idle)
    pixels = torch.rand(2, 3, frames, 64, 96, generator=torch.Generator().manual_seed(1)) * 2 - 1
    moments = vae._encode(pixels)
    torch.testing.assert_close(clip_moments(vae, pixels), moments, rtol=0, atol=1e-5)
    latents = moments[:, : config["z_dim"]]
    torch.testing.assert_close(clip_pixels(vae, latents), vae._decode(latents).sample, rtol=0, atol=1e-5)


def test_gradients_are_those_of_diffusers():
    vae = build(RESIDUAL, live=False)
    pixels = torch.rand(1, 3, 9, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    names, parameters = zip(*(pair for pair in vae.named_parameters() if "attentions" not in pair[0]), strict=True)
    again = clip_pixels(vae, clip_moments(vae, pixels)[:, :4]), vae._decode(vae._encode(pixels)[:, :4]).sample
    ours, theirs = (torch.autograd.grad(x.square().mean(), parameters) for x in again)
    for name, a, b in zip(names, ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=name)
