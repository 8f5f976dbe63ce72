"""Frames in bands of any heights are what they are as a whole."""

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, WanResample, WanResidualBlock, WanRMS_norm
from hypothesis import given, settings
from hypothesis import strategies as st

from atlasvid_cli import rows
from atlasvid_cli.decode import decode_stream
from atlasvid_cli.encode import encode_clips
from tests.test_decode import RESIDUAL, STILL, WAN21, build, latents, reference

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
        made = rows.joined(rows.resnet(block, parts, sum(heights)), sum(heights))
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
    made = rows.joined(rows.activated(norm, conv, parts, sum(heights)), sum(heights))
    torch.testing.assert_close(made, conv(F.silu(norm(x.unsqueeze(2)))).squeeze(2), rtol=0, atol=1e-5)


@given(HEIGHTS)
@settings(max_examples=30, deadline=None)
@torch.no_grad()
def test_half_the_height(heights):
    heights = [*heights, 2 - sum(heights) % 2]  # even in all
    torch.manual_seed(1)
    resample, pools = WanResample(4, "downsample2d"), []
    x, parts = frame(4, heights)
    made = rows.joined(rows.halved(resample.resample, rows.pooled(parts, 2, pools)), sum(heights) // 2)
    torch.testing.assert_close(made, resample(x.unsqueeze(2)).squeeze(2), rtol=0, atol=1e-5)
    torch.testing.assert_close(rows.joined(pools, sum(heights) // 2), F.avg_pool2d(x, 2), rtol=0, atol=1e-6)


@pytest.mark.parametrize("config", [RESIDUAL, STILL, WAN21], ids=["residual", "still", "wan2.1"])
@torch.no_grad()
def test_a_vae(config, monkeypatch):
    monkeypatch.setattr(rows, "BAND", 500)  # some rows where there are few channels, one where there are many
    vae, z = build(config), latents(config, 2, 4, 6)
    pixels = reference(vae, z)
    torch.testing.assert_close(torch.cat(list(decode_stream(vae, z))), pixels, rtol=0, atol=1e-5)
    clip = pixels.mul(2).sub(1).transpose(0, 1)[None]
    banded = encode_clips(vae, clip)
    monkeypatch.undo()
    torch.testing.assert_close(banded, encode_clips(vae, clip), rtol=0, atol=1e-4)
