"""Worn proxies: what stage 1 knows is kept, what it does not is drawn anew, in the place where it was."""

import random
from itertools import pairwise

import pytest
import torch

from atlasvid_cli import train, wear
from atlasvid_cli.train import PATCH, patchify
from tests.test_train import DETAIL, clips, details, embed, model


def test_a_model_that_knows_the_truth_wears_nothing(monkeypatch):
    latents = torch.stack([s["latents"] for s in clips()])
    clean = torch.stack([patchify(each, PATCH) for each in latents])
    seen = []

    def knowing(_, x, grid, timestep, text, time_ratio):
        seen.append(timestep / 1000)
        return (x - clean) / seen[-1][:, None, None]

    monkeypatch.setattr(wear, "clip_forward", knowing)
    made = wear.wear(model(), latents, [embed("x")] * 3, 4, 2.0, [0.3, 0.8, 1.0], torch.Generator())
    torch.testing.assert_close(made, latents, atol=2e-2, rtol=0)  # timesteps are whole thousandths
    assert seen[0].tolist() == pytest.approx([0.3, 0.8, 1.0], abs=1e-3)
    assert all((now > then).all() for now, then in pairwise(seen))


def test_a_model_that_knows_nothing_wears_more_from_a_higher_sigma():
    [sample] = details()
    worn = [
        wear.wear(model(), sample["proxy_1"][None], [embed("x")], 1, 3.0, [sigma], torch.Generator().manual_seed(0))
        for sigma in (0.01, 0.3, 0.9)
    ]
    changed = [(x[0] - sample["proxy_1"]).square().mean().item() for x in worn]
    assert changed[0] < 1e-2 and changed == sorted(changed)


def test_every_sample_gets_its_own_worn_proxies_of_both_time_ratios():
    data = details() + details()
    data[1] |= {"caption": "other", "proxy_4": data[1]["proxy_4"][:, :1]}
    passes = []
    for _ in range(2):
        for time_ratio in (1, 4):
            wear.add_worn(model(), data, embed, time_ratio, lambda latents: 3.0)
        for sample in data:
            for time_ratio in (1, 4):
                worn, true = sample[f"worn_{time_ratio}"], sample[f"proxy_{time_ratio}"]
                assert worn.shape == true.shape and worn.dtype == torch.float16
                assert 0.05 < (worn - true).std() < 2.0
        passes.append([s["worn_1"] for s in data])
    assert not torch.equal(*passes[0])
    assert all(map(torch.equal, *passes))  # the same again


def test_half_of_the_draws_of_stage_2_see_the_worn_proxy(monkeypatch):
    [sample] = details()
    sample |= {f"worn_{r}": torch.full_like(sample[f"proxy_{r}"], 7.0) for r in (1, 4)}
    seen = []
    monkeypatch.setattr(train, "PROXY_NOISE", 0.0)
    monkeypatch.setattr(train, "proxy_context", lambda _, tokens, *rest: seen.append((tokens == 7.0).all().item()))
    monkeypatch.setattr(train, "detail_forward", lambda _, x, *rest, **named: x)

    bare = model()
    for seed in range(60):
        train.detail_loss(bare, bare, sample, embed("x"), random.Random(seed), torch.Generator(), DETAIL, 4)
    assert 0.3 < sum(seen) / len(seen) < 0.7
