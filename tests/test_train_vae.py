"""The VAE's training: compression keeps what the latents hold, runs resume to the same weights."""

import json
import random
from copy import deepcopy

import pytest
import torch

from atlasvid_cli import causal, train_tiny, train_vae

CONFIG = train_tiny.VAE_CONFIG | {
    "base_dim": 8,
    "decoder_base_dim": 8,
    "dim_mult": [1, 1, 1],
    "z_dim": 6,
    "latents_mean": [0.0] * 6,
    "latents_std": [1.0] * 6,
}


@pytest.mark.parametrize("channels", [6, 4])
@torch.no_grad()
def test_compressing_keeps_the_principal_components(channels):
    vae = train_vae.build(CONFIG)
    small = train_vae.compress(vae, channels)
    assert small.config.z_dim == channels
    old, new = [], []
    for i in range(10):
        x = train_vae.batch(-1, i, 6, 96, 9)
        old.append(vae.encode(x).latent_dist.mode().transpose(0, 1).flatten(1))
        new.append(small.encode(x).latent_dist.mode().transpose(0, 1).flatten(1))
    variance = torch.linalg.eigvalsh(torch.cov(torch.cat(old, 1))).flip(0)[:channels]
    covariance = torch.cov(torch.cat(new, 1))
    torch.testing.assert_close(covariance.diagonal(), variance.sqrt(), rtol=2e-2, atol=1e-4)
    assert (covariance - covariance.diagonal().diag()).abs().max() < 1e-2 * covariance.max()
    if channels == CONFIG["z_dim"]:  # nothing was dropped: away from borders the decoder sees what it saw
        a = vae.decoder.conv_in(vae.post_quant_conv(vae.encode(x).latent_dist.mode()))
        b = small.decoder.conv_in(small.post_quant_conv(small.encode(x).latent_dist.mode()))
        torch.testing.assert_close(b[:, :, 2:, 1:-1, 1:-1], a[:, :, 2:, 1:-1, 1:-1], atol=1e-4, rtol=1e-4)


def test_a_resumed_training_ends_with_the_same_weights(tmp_path, monkeypatch):
    def run(folder, steps):
        vae, shapes = train_vae.build(CONFIG), ((1, 32, 5), (2, 32, 1))
        teacher = deepcopy(vae).requires_grad_(False)
        return train_vae.train(vae, folder, steps, lr=1e-3, noise=0.2, shapes=shapes, teacher=teacher)

    monkeypatch.setattr(train_vae, "evaluate", lambda vae: {})
    monkeypatch.setattr(train_vae, "learning_rate", lambda step, steps, lr: lr)  # the same whatever the goal
    whole = run(tmp_path / "whole", 6).state_dict()
    run(tmp_path / "parts", 3)
    resumed = run(tmp_path / "parts", 6).state_dict()
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, atol=1e-6, rtol=0)


def test_held_out_clips_are_evaluated_as_diffusers_codes_them(monkeypatch):
    """By the way that training runs, which is some times as fast."""
    vae = train_vae.build(CONFIG)
    zooms = (1.0, 2.0, 4.0, 8.0, 13.5)
    expected = {}
    with torch.no_grad():
        for zoom in zooms:
            rng = random.Random(f"held-out/{zoom}")
            x = torch.stack([train_vae.crop(rng, 32, 5, zoom) for _ in range(2)])
            made = vae.decode(vae.encode(x).latent_dist.mode()).sample
            expected[f"{zoom:g}"] = sum(map(train_vae.psnr, made, x)) / 2
    for name in ("encode", "decode"):
        monkeypatch.setattr(vae, name, lambda *_: pytest.fail("diffusers' own way"))
    found = train_vae.evaluate(vae, clips=2, size=32, frames=5)
    assert found.pop("mean") == pytest.approx(sum(expected.values()) / 5, abs=0.01)
    assert found == pytest.approx(expected, abs=0.01)


def test_a_checkpoint_has_its_line_in_the_log(tmp_path, monkeypatch):
    """Also where a training dies right after it: what follows is logged as if it had not."""

    def run(folder):
        train_vae.train(train_vae.build(CONFIG), folder, 4, lr=1e-3, shapes=((1, 32, 1),))
        rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        return [(row["step"], row["loss"], row["held_out"]) for row in rows]

    def dies(*arguments):
        save(*arguments)
        raise KeyboardInterrupt

    save = train_vae.save_checkpoint
    monkeypatch.setattr(train_vae, "SAVE_STEPS", 2)
    monkeypatch.setattr(train_vae, "evaluate", lambda vae: {})
    whole = run(tmp_path / "whole")
    assert [step for step, *_ in whole] == [2, 4]
    monkeypatch.setattr(train_vae, "save_checkpoint", dies)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed")
    monkeypatch.setattr(train_vae, "save_checkpoint", save)
    assert run(tmp_path / "killed") == whole


def test_settled_latents_of_a_still_clip_are_nearly_still():
    still = train_vae.batch(0, 0, 8, 32, 1).expand(-1, -1, 9, -1, -1)
    vae = train_vae.build(CONFIG)
    settled, raw = train_vae.settled(vae, still), vae.encode(still).latent_dist.mean
    assert settled.shape == raw.shape
    moved, raw_moved = ((x - x[:, :, -1:]).square().mean() for x in (settled, raw))
    assert moved < 0.25 * raw_moved


@pytest.mark.parametrize(("cut", "side", "part"), [(False, 32, 0.7), (True, 64, 0.9)])
def test_a_teacher_draws_the_encoder_towards_settled_latents(tmp_path, monkeypatch, cut, side, part):
    monkeypatch.setattr(train_vae, "evaluate", lambda vae: {})
    vae = train_vae.build(CONFIG)
    teacher = deepcopy(vae).requires_grad_(False)
    train_vae.train(vae, tmp_path, 100, lr=2e-3, shapes=((1, side, 9),), teacher=teacher, cut=cut)
    first, *_, last = (json.loads(line)["drift"] for line in (tmp_path / "log.jsonl").read_text().splitlines())
    assert last < part * first


def test_levels_held_still_and_idle_blocks_stay_so_where_the_decoder_learns(tmp_path, monkeypatch):
    monkeypatch.setattr(train_vae, "evaluate", lambda vae: {})
    vae = train_vae.build(CONFIG)
    causal.hold_still(vae, 2)
    causal.make_idle(vae, 1)
    train_vae.train(train_vae.let_learn(vae, "decoder."), tmp_path, 4, lr=2e-3, shapes=((2, 32, 9),))
    assert all(map(causal.is_still, causal.near_pixels(vae, 2)))
    assert [causal.is_idle(block) for block in vae.decoder.up_blocks[-1].resnets] == [False, True]


@pytest.mark.parametrize("seed", range(5))
def test_cut_sides_are_cut_from_latents_and_pixels_alike(seed):
    y, x = torch.meshgrid(torch.arange(4), torch.arange(5), indexing="ij")
    places = (y * 5 + x).float()[None, None, None]
    pixels = places.repeat_interleave(16, dim=-1).repeat_interleave(16, dim=-2)
    latents, cut = train_vae.cut_sides(places, pixels, random.Random(seed))
    assert latents.shape[-2] in (2, 3, 4) and latents.shape[-1] in (3, 4, 5)
    assert torch.equal(latents.repeat_interleave(16, dim=-1).repeat_interleave(16, dim=-2), cut)


def test_only_the_decoder_learns_where_the_encoder_is_frozen(tmp_path, monkeypatch):
    """And what it learns with `slopes` are the steps between pixels."""
    monkeypatch.setattr(train_vae, "evaluate", lambda vae: {})
    vae = train_vae.let_learn(train_vae.build(CONFIG), "decoder.", "post_quant_conv.")
    before = {k: v.clone() for k, v in vae.state_dict().items()}
    x = train_vae.batch(1, 0, 2, 64, 1)

    def error():
        with torch.no_grad():
            wrong = vae.decode(vae.encode(x).latent_dist.mode()).sample - x
        return sum(wrong.diff(dim=axis).abs().mean().item() for axis in (-2, -1))

    first = error()
    train_vae.train(vae, tmp_path, 60, lr=2e-3, shapes=((2, 64, 1),), slopes=1.0, cut=True)
    changed = {k.split(".")[0] for k, v in vae.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"decoder", "post_quant_conv"} and error() < first
