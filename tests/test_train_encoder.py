"""Encoders that learn what the VAE's knows."""

import json
import random
from copy import deepcopy

import pytest
import torch

from atlasvid_cli import causal, train_encoder, train_vae
from atlasvid_cli.vae_clips import clip_moments
from tests.test_train_vae import CONFIG


def errors(folder):
    return [json.loads(line)["error"] for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("seed", range(20))
def test_disturbed_clips_are_clips(seed):
    clips = train_vae.batch(0, 0, 2, 32, 9)
    disturbed = train_encoder.disturbed(clips, random.Random(seed))
    assert disturbed.shape == clips.shape and disturbed.abs().max() <= 1
    assert torch.equal(disturbed, train_encoder.disturbed(clips, random.Random(seed)))
    still = train_vae.batch(0, 0, 2, 32, 1)
    assert train_encoder.disturbed(still, random.Random(seed)).shape == still.shape


@pytest.mark.parametrize("seed", range(4))
def test_enlarged_clips_are_the_same_at_both_sizes(seed):
    vae = train_vae.build(CONFIG)
    large, small = train_encoder.enlarged(vae, random.Random(seed), 2, 64, 5)
    assert large.shape == (2, 3, 5, 64, 64) and small.shape == (2, 3, 5, 32, 32)
    assert large.abs().max() <= 1 and large.std() > 0.05
    pooled = torch.nn.functional.avg_pool2d(large.flatten(0, 1), 2).view_as(small)
    assert (pooled - small).square().mean() < 0.05 * small.var()
    again = train_encoder.enlarged(vae, random.Random(seed), 2, 64, 5)
    assert torch.equal(again[0], large) and torch.equal(again[1], small)


def test_levels_held_still_stay_so_and_learn_what_their_teacher_knows(tmp_path):
    vae, shapes = train_vae.build(CONFIG), ((2, 32, 9),)
    teacher = deepcopy(vae)
    causal.hold_still(vae, 2)
    train_encoder.distil_encoder(vae, teacher, tmp_path, 100, lr=2e-3, shapes=shapes)
    first, *_, last = errors(tmp_path)
    assert last < 0.8 * first
    assert all(map(causal.is_still, causal.near_pixels(vae, 2)))


def test_an_entry_for_half_size_frames_learns_and_the_rest_stays(tmp_path):
    vae, shapes = train_vae.build(CONFIG), ((2, 64, 5),)
    causal.hold_still(vae, 2)
    before = deepcopy(vae.state_dict())
    half = train_encoder.distil_entry(vae, tmp_path, 100, lr=2e-3, shapes=shapes)
    first, *_, last = errors(tmp_path)
    assert last < 0.6 * first
    assert all(torch.equal(before[name], value) for name, value in vae.state_dict().items())
    assert causal.still(half.down_blocks[0].resnets, causal.History())
    large, small = train_encoder.enlarged(vae, random.Random("held out"), 2, 64, 5)
    with torch.no_grad():
        expected, made = (clip_moments(vae, x, e)[:, :6] for x, e in ((large, None), (small, half)))
    assert (made - expected).square().mean() < 0.5 * expected.var()
