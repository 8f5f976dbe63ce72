"""Shards of latents: one shape each, kept when they are there."""

import random
from fractions import Fraction

import pytest
import torch

from atlasvid_cli import dataset, train_vae
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
    dataset.build("image", 8, tmp_path, vae)
    assert shards[0].read_bytes() == before and shards[1].exists()
    samples = dataset.load("image", tmp_path)
    assert len(samples) == 8 and all(s["caption"] for s in samples)
    for first in range(0, 8, 3):
        assert len({tuple(s["latents"].shape) for s in samples[first : first + 3]}) == 1
    again = tmp_path / "again"
    dataset.build("image", 8, again, vae)
    assert all(
        torch.equal(a["latents"], b["latents"]) for a, b in zip(samples, dataset.load("image", again), strict=True)
    )


def test_a_detail_sample_comes_with_its_proxies(monkeypatch):
    monkeypatch.setattr(dataset, "DETAIL_TOKENS", 4)
    pixels, info = dataset.sample("detail", random.Random(0), (5, 8), Fraction(2))
    assert info["ratio"] == "2"
    assert pixels["latents"].shape == (3, 33, 128, 128)
    assert pixels["proxy_4"].shape == (3, 9, 64, 64) and pixels["proxy_1"].shape == (3, 33, 64, 64)
    # the proxy is the same scene: its frames are the detail's, every fourth, smaller
    small = torch.nn.functional.avg_pool2d(pixels["latents"][:, ::4].transpose(0, 1), 2).transpose(0, 1)
    assert (small - pixels["proxy_4"]).abs().mean() < 0.02
