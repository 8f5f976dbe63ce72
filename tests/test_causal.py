"""Convolutions over time on one frame at a time."""

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

from atlasvid_cli import causal
from tests.test_decode import RESIDUAL, build


@pytest.mark.parametrize("kernel", [(3, 3, 3), (3, 1, 1), (1, 1, 1)])
@torch.no_grad()
def test_frames_of_several_clips_in_turn_equal_the_whole_clips(kernel):
    torch.manual_seed(0)
    conv = WanCausalConv3d(4, 6, kernel, padding=tuple(k // 2 for k in kernel))
    clips, history = torch.randn(2, 4, 7, 5, 8), causal.History()
    frames = [causal.causal(conv, frame, history) for frame in clips.unbind(2)]
    torch.testing.assert_close(torch.stack(frames, dim=2), conv(clips), rtol=0, atol=1e-5)


@torch.no_grad()
def test_convolutions_held_still_do_the_same_to_a_clip_that_stands_still():
    vae = build(RESIDUAL, live=False)
    convs = causal.near_pixels(vae, 2)
    assert len(convs) == 1 + 4 + 8 + 1 and not any(map(causal.is_still, convs))
    clips = [torch.randn(1, conv.in_channels, 1, 5, 8).expand(-1, -1, 4, -1, -1) for conv in convs]
    before = [conv(clip) for conv, clip in zip(convs, clips, strict=True)]
    causal.hold_still(vae, 2)
    assert all(map(causal.is_still, convs)) and not causal.is_still(vae.decoder.conv_in)
    for conv, clip, made in zip(convs, clips, before, strict=True):
        torch.testing.assert_close(conv(clip)[:, :, 2:], made[:, :, 2:], rtol=0, atol=1e-5)
