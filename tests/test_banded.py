"""Frames in bands of any heights are what they are as a whole."""

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, WanResample, WanResidualBlock, WanRMS_norm
from hypothesis import given, settings
from hypothesis import strategies as st

from atlasvid_cli import banded
from atlasvid_cli.decode import decode_stream
from atlasvid_cli.encode import encode_clips
from tests.test_decode import RESIDUAL, STILL, WAN21, WAN22, build, latents, reference

HEIGHTS = st.lists(st.integers(1, 9), min_size=1, max_size=6)


def frame(channels, heights, seed=0):
    """A frame and its bands."""
    x = torch.randn(1, channels, sum(heights), 5, generator=torch.Generator().manual_seed(seed))
    return x, iter(x.split(heights, dim=2))


def held_still(*convs):
    for conv in convs:
        conv.weight.data[:, :, :-1] = 0


@given(HEIGHTS)
@settings(max_examples=30, deadline=None)
@torch.no_grad()
def test_a_residual_block(heights):
    torch.manual_seed(1)
    for channels in (6, 4):  # with a shortcut of its own, and without
        block = WanResidualBlock(channels, 4)
        held_still(block.conv1, block.conv2)
        x, parts = frame(channels, heights)
        made = banded.joined(banded.resnet(block, parts, sum(heights)), sum(heights))
        torch.testing.assert_close(made, block(x.unsqueeze(2)).squeeze(2), rtol=0, atol=1e-5)


@given(HEIGHTS)
@settings(max_examples=30, deadline=None)
@torch.no_grad()
def test_a_convolution_of_what_is_normed(heights):
    torch.manual_seed(1)
    norm, conv = WanRMS_norm(4, images=False), WanCausalConv3d(4, 3, 3, padding=1)
    norm.gamma.data.uniform_(0.5, 2)
    held_still(conv)
    x, parts = frame(4, heights)
    made = banded.joined(banded.activated(norm, conv, parts, sum(heights)), sum(heights))
    torch.testing.assert_close(made, conv(F.silu(norm(x.unsqueeze(2)))).squeeze(2), rtol=0, atol=1e-5)


@given(HEIGHTS)
@settings(max_examples=30, deadline=None)
@torch.no_grad()
def test_half_the_height(heights):
    heights = [*heights, 1]
    torch.manual_seed(1)
    resample, pools, height = WanResample(4, "downsample2d"), [], sum(heights)
    x, parts = frame(4, heights)
    made = banded.joined(banded.halved(resample.resample, banded.pooled(parts, height, 2, pools), height), height // 2)
    torch.testing.assert_close(made, resample(x.unsqueeze(2)).squeeze(2), rtol=0, atol=1e-5)
    torch.testing.assert_close(banded.joined(pools, height // 2), F.avg_pool2d(x, 2), rtol=0, atol=1e-6)


@pytest.mark.parametrize("band", [500, 5000])  # rows that are one here and some there
@pytest.mark.parametrize("config", [RESIDUAL, STILL, WAN21, WAN22], ids=["residual", "still", "wan2.1", "wan2.2"])
@torch.no_grad()
def test_a_vae(config, band, monkeypatch):
    monkeypatch.setattr(banded, "BAND", band)
    vae, z = build(config), latents(config, 2, 5, 6)
    pixels = reference(vae, z)
    torch.testing.assert_close(torch.stack(list(decode_stream(vae, z))), pixels, rtol=0, atol=1e-5)
    clip = pixels.mul(2).sub(1).transpose(0, 1)
    clips = torch.stack([clip, clip.flip(2)])
    made = encode_clips(vae, clips)
    monkeypatch.undo()
    torch.testing.assert_close(made, encode_clips(vae, clips), rtol=0, atol=1e-4)
