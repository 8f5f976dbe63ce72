"""Shards of latents: one shape each, kept when they are there."""

import random
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F

from atlasvid_cli import dataset, train_vae, world
from tests.test_train_vae import CONFIG


@pytest.fixture(scope="module")
def vae():
    return train_vae.build(CONFIG)


def test_shards_are_made_once_and_have_one_shape(vae, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "SHARD", 3)
    monkeypatch.setattr(dataset, "FRAME_GRIDS", (((2, 3), 1), ((3, 2), 1)))
    dataset.build("image", 8, tmp_path, vae)
    shards = sorted(tmp_path.glob("image-*.safetensors"))
    assert len(shards) == 3
    before = shards[0].read_bytes()
    shards[1].unlink()
    samples = dataset.build("image", 8, tmp_path, vae)
    assert shards[0].read_bytes() == before and shards[1].exists()
    assert len(samples) == 8 and all(s["caption"] for s in samples)
    for first in range(0, 8, 3):
        assert len({tuple(s["latents"].shape) for s in samples[first : first + 3]}) == 1
    again = dataset.build("image", 8, tmp_path / "again", vae)
    assert all(torch.equal(a["latents"], b["latents"]) for a, b in zip(samples, again, strict=True))


def test_a_count_gives_so_many_whatever_else_lies_in_the_folder(vae, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "SHARD", 3)
    monkeypatch.setattr(dataset, "FRAME_GRIDS", (((2, 3), 1),))
    alone = dataset.build("image", 5, tmp_path / "alone", vae)
    few, many = (dataset.build("image", count, tmp_path / "shared", vae) for count in (2, 5))
    assert len(few) == 2 and len(many) == 5
    assert all(torch.equal(a["latents"], b["latents"]) for a, b in zip(alone, many, strict=True))
    assert len(dataset.build("image", 2, tmp_path / "shared", vae)) == 2


def test_a_crop_of_an_upper_level_comes_with_its_own_proxy(monkeypatch):
    monkeypatch.setattr(dataset, "DETAIL_TOKENS", 4)
    pixels, _, info = dataset.sample("upper", random.Random(0), (5, 8), Fraction(2))
    assert info["ratio"] == "2"
    assert pixels["latents"].shape == (3, 33, 128, 128) and pixels["proxy_1"].shape == (3, 33, 64, 64)
    # the proxy is the same scene, smaller
    small = torch.nn.functional.avg_pool2d(pixels["latents"].transpose(0, 1), 2).transpose(0, 1)
    assert (small - pixels["proxy_1"]).abs().mean() < 0.02


@pytest.mark.parametrize("ratio", sorted(set(dataset.DETAIL_RATIOS)))
def test_a_crop_of_the_first_level_is_a_part_of_the_whole_frames_proxy(ratio):
    touched = 0
    for seed in range(12):
        pixels, _, info = dataset.sample("first_still", random.Random(seed), (7, 12), ratio)
        (y, x), side = info["at"], int(dataset.DETAIL_TOKENS / ratio)
        assert pixels["whole_4"].shape == (3, 1, 224, 384) and 0 <= y <= 7 - side and 0 <= x <= 12 - side
        part = pixels["whole_4"][:, :, 32 * y : 32 * (y + side), 32 * x : 32 * (x + side)]
        size = (32 * side, 32 * side)
        small = torch.nn.functional.interpolate(pixels["latents"].transpose(0, 1), size, mode="area").transpose(0, 1)
        assert (small - part).abs().mean() < 0.02
        touched += bool((small.amax((1, 2, 3)) - small.amin((1, 2, 3))).amax() > 0.5)
    assert touched >= 6


def test_the_proxy_of_a_crop_is_cut_from_the_whole_frames_latents(vae, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "DETAIL_TOKENS", 4)
    monkeypatch.setattr(dataset, "DETAIL_RATIOS", (Fraction(2),))
    monkeypatch.setattr(dataset, "PROXY_GRIDS", (((3, 5), 1),))
    for sample in dataset.build("first_still", 3, tmp_path, vae):
        y, x = sample["at"]
        assert sample["whole_4"].shape[1:] == (1, 6, 10) and sample["latents"].shape[1:] == (1, 8, 8)
        assert torch.equal(sample["proxy_4"], sample["whole_4"][..., 2 * y : 2 * y + 4, 2 * x : 2 * x + 4])
        assert "proxy_1" not in sample


def test_a_latent_frame_is_near_where_any_of_its_frames_is():
    scene = world.sample_scene(random.Random(0), 1.6, 4.0, ("red", "ball", "right", "blue", "hills"), haste=4.0)
    times, grid = torch.arange(9) / 4, (5, 8)
    found = dataset.near(scene, times, grid)
    frames = world.near_object(scene, times, *grid)
    assert found.shape == (1, 3, 5, 8) and torch.equal(found[0, 0], frames[0])
    assert torch.equal(found[0, 2], frames[5:].any(0)) and not torch.equal(found[0, 2], frames[8])


@pytest.mark.parametrize("kind", ["proxy", "clip", "first", "upper"])
def test_a_sample_tells_where_its_object_is(kind, monkeypatch):
    """By the pixels that are others when the object has another colour."""
    shown, seen = [], dataset._seen
    monkeypatch.setattr(dataset, "_seen", lambda *a: shown.append(a) or seen(*a))
    for seed in range(4):
        shown.clear()
        pixels, near, _ = dataset.sample(kind, random.Random(seed), (5, 8), Fraction(3))
        scene, *where = shown[0]
        assert torch.equal(seen(scene, *where), pixels["latents"])
        red, blue = (seen(replace(scene, colour=colour), *where) for colour in ("red", "blue"))
        touched = F.max_pool2d((red - blue).abs().amax(0), 32) > 0
        touched = torch.cat((touched[:1], touched[1:].unflatten(0, (-1, 4)).any(1)))[None]
        assert near.shape == touched.shape and near.dtype == torch.bool and not (touched & ~near).any()
        if kind != "upper":  # of a close-up the gaps of a star or ring are many tokens
            assert not (near[0] & ~F.max_pool2d(touched[0].float(), 5, 1, 2).bool()).any(), "nor what is far from it"
