"""An encoder for frames half as large: its own first level, the rest the VAE's."""

import pytest
import torch

from atlasvid_cli import banded
from atlasvid_cli.encode import encode_stream
from atlasvid_cli.half import HalfEncoder
from atlasvid_cli.vae_clips import clip_moments
from tests.test_decode import EMBEDDED, STILL, WAN22, build


@pytest.mark.parametrize("config", [EMBEDDED, STILL, WAN22], ids=["embedded", "still", "wan2.2"])
@pytest.mark.parametrize("band", [1 << 12, 1 << 20], ids=["bands", "whole"])
@torch.no_grad()
def test_a_stream_is_encoded_as_a_whole_clip_and_to_twice_the_size(config, band, monkeypatch):
    monkeypatch.setattr(banded, "BAND", band)
    vae = build(config, live=False)
    encoder = HalfEncoder(vae.encoder)
    clip = torch.rand(3, 9, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = encode_stream(vae, iter(clip.unbind(1)), encoder)
    whole = clip_moments(vae, clip[None], encoder)[0, : vae.config.z_dim]
    mean, std = (torch.tensor(v).view(-1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    torch.testing.assert_close(found * std + mean, whole, atol=1e-5, rtol=1e-4)
    at_its_size = encode_stream(vae, iter(clip.unbind(1)))
    assert found.shape == (*at_its_size.shape[:2], *(2 * side for side in at_its_size.shape[2:]))


def test_deeper_levels_are_the_vaes_own():
    encoder = build(STILL, live=False).encoder
    half = HalfEncoder(encoder)
    shared = {id(p) for p in encoder.parameters()} & {id(p) for p in half.parameters()}
    assert {name for name, p in half.named_parameters() if id(p) not in shared} == set(half.own())
    assert all(name.startswith(("conv_in.", "down_blocks.0.")) for name in half.own())
