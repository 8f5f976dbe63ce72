"""Worn proxies: what stage 1 knows is kept, what it does not is drawn anew, in the place where it was."""

import random
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from atlasvid_cli import train, wear
from atlasvid_cli.schedule import sigmas
from atlasvid_cli.shapes import NATIVE, Spacing
from atlasvid_cli.train import PATCH, patchify
from atlasvid_cli.wear import Stage1
from tests.test_train import DETAIL, clips, details, embed, model


def stage1(time_ratio):
    return Stage1(Spacing(time_ratio), lambda latents: 3.0)


def test_a_model_that_knows_the_truth_wears_nothing(monkeypatch):
    latents = torch.stack([s["latents"] for s in clips()])
    clean = torch.stack([patchify(each, PATCH) for each in latents])
    seen = []

    def knowing(_, x, grid, timestep, text, time_ratio):
        seen.append(timestep / 1000)
        return (x - clean) / seen[-1][:, None, None]

    monkeypatch.setattr(wear, "clip_forward", knowing)
    schedules = [sigmas(4, strength, 2.0) for strength in (0.3, 0.8, 1.0)]
    made = wear.wear(model(), latents, [embed("x")] * 3, Spacing(4), schedules, torch.Generator())
    torch.testing.assert_close(made, latents, atol=2e-2, rtol=0)  # timesteps are whole thousandths
    assert seen[0].tolist() == pytest.approx([0.3, 0.8, 1.0], abs=1e-3)
    assert all((now > then).all() for now, then in pairwise(seen))


def test_a_model_that_knows_nothing_wears_more_from_a_higher_sigma():
    [sample] = details()
    worn = [
        wear.wear(
            model(),
            sample["proxy_1"][None],
            [embed("x")],
            NATIVE,
            [sigmas(4, sigma, 3.0)],
            torch.Generator().manual_seed(0),
        )
        for sigma in (0.01, 0.3, 0.9)
    ]
    changed = [(x[0] - sample["proxy_1"]).square().mean().item() for x in worn]
    assert changed[0] < 1e-2 and changed == sorted(changed)


def test_every_sample_gets_its_own_worn_proxies_of_both_time_ratios():
    passes = []
    for _ in range(2):
        data = details() + details()
        data[1] |= {"caption": "other", "proxy_4": data[1]["proxy_4"][:, :1]}
        for time_ratio in (1, 4):
            wear.add_worn(model(), data, embed, stage1(time_ratio))
        for sample in data:
            for time_ratio in (1, 4):
                worn, true = sample[f"worn_{time_ratio}"], sample[f"proxy_{time_ratio}"]
                assert worn.shape == true.shape and worn.dtype == torch.float16
                assert 0.05 < (worn - true).std() < 2.0
        passes.append([s["worn_1"] for s in data])
    assert not torch.equal(*passes[0])
    assert all(map(torch.equal, *passes))  # the same again


def many():
    """Samples that are worn one by one."""
    return [details()[0] | {"caption": "x" * i} for i in range(6)]


@pytest.fixture
def interrupted(tmp_path, monkeypatch, console):
    """Completes samples as `add` makes them, first a run that dies after two, then another: what the second made."""
    monkeypatch.setattr(wear, "BATCH_TOKENS", 1)
    monkeypatch.setattr(wear, "CHECKPOINT_SECONDS", -1)

    def complete(kind, add, first, second):
        path, made = tmp_path / f"{kind}.safetensors", []

        def dying(samples):
            made.append(samples)
            if len(made) == 3:  # the third is made and not kept
                raise KeyboardInterrupt

        def told(data, after):
            return lambda on_done: add(data, lambda n: (after(n), on_done(n)))

        with pytest.raises(KeyboardInterrupt):
            wear.complete(path, first, kind, 4, told(first, dying), console)
        made.clear()
        wear.complete(path, second, kind, 4, told(second, made.append), console)
        wear.complete(path, many(), kind, 4, lambda on_done: pytest.fail("made again"), console)
        return made

    return complete


def test_wearing_that_is_interrupted_goes_on_to_the_same(interrupted):
    def add(data, on_done):
        wear.add_worn(model(), data, embed, stage1(4), on_done)

    whole, second = many(), many()
    assert interrupted("worn", add, many(), second) == [1] * 4
    add(whole, lambda n: None)
    assert all(torch.equal(a["worn_4"], b["worn_4"]) for a, b in zip(whole, second, strict=True))


def test_enlarging_that_is_interrupted_goes_on_to_the_same(interrupted, monkeypatch):
    """From the same proxies, true or worn, as without the interruption; of both it leaves the one."""
    monkeypatch.setattr(wear, "enlarge", lambda vae, low, *figures: low * 2)
    vae = SimpleNamespace(config=SimpleNamespace(dim_mult=[1], temperal_downsample=[True], patch_size=None))

    def worn():
        data = [s | {"worn_4": torch.full_like(s["proxy_4"], 7.0)} for s in many()]
        wear.settle_worn(data, 4)
        return data

    def add(data, on_done):
        wear.add_enlarged(vae, data, 4, on_done)

    whole, second = worn(), worn()
    assert interrupted("enlarged", add, worn(), second) == [1] * 4
    add(whole, lambda n: None)
    for one, other in zip(whole, second, strict=True):
        assert one.keys() == other.keys() and "worn_4" not in one
        assert torch.equal(one["proxy_4"], other["proxy_4"]) and torch.equal(one["enlarged_4"], other["enlarged_4"])
    assert len({(s["proxy_4"] == 7.0).all().item() for s in whole}) == 2


def test_proxies_are_kept_and_nothing_is_loaded_for_them_again(tmp_path, monkeypatch, console):
    """Worn ones, and what is made in pixels of the one that each sample is left with."""
    monkeypatch.setattr(wear, "enlarge", lambda vae, low, *figures: low * 2)
    vae = SimpleNamespace(config=SimpleNamespace(dim_mult=[1], temperal_downsample=[True], patch_size=None))
    passes = []
    for load_model, load_vae in ((model, lambda: vae), (pytest.fail, pytest.fail)):
        data = many()
        wear.complete_proxies(tmp_path / "kept", data, embed, stage1(1), load_model, None, console)
        wear.complete_proxies(tmp_path / "kept", data, embed, stage1(4), load_model, load_vae, console)
        passes.append(data)
    for one, other, true in zip(*passes, many(), strict=True):
        assert one.keys() == other.keys() == true.keys() | {"worn_1", "enlarged_4"}
        assert torch.equal(one["enlarged_4"], one["proxy_4"].float().half() * 2)
        assert all(torch.equal(one[n], other[n]) for n in ("worn_1", "proxy_4", "enlarged_4"))
        assert torch.equal(one["proxy_1"], true["proxy_1"])
    changed = [not torch.equal(one["proxy_4"], true["proxy_4"]) for one, true in zip(passes[0], many(), strict=True)]
    assert set(changed) == {False, True}


def test_a_crop_of_a_whole_frame_gets_its_part_of_the_frame_as_worn():
    """Two crops of one frame agree where they overlap; a sample without a proxy of the time ratio is left alone."""
    whole = torch.randn(4, 2, 6, 10, generator=torch.Generator().manual_seed(3))
    data = [
        {"caption": "x", "latents": torch.zeros(4, 5, 8, 8), "ratio": "2", "at": at, "whole_4": whole}
        for at in ([0, 1], [1, 2])
    ]
    for sample in data:
        sample["proxy_4"] = wear.own_part(sample, whole)
    for only in data:  # each as the first of its batch, so under the same noise
        wear.add_worn(model(), [only], embed, stage1(4))
    wear.add_worn(model(), data, embed, stage1(1))
    first, second = (s["worn_4"] for s in data)
    assert first.shape == data[0]["proxy_4"].shape and "worn_1" not in data[0]
    assert torch.equal(first[..., 2:, 2:], second[..., :-2, :-2])
    assert (first - data[0]["proxy_4"]).std() > 0.05


def test_wear_is_guided_as_stage_1_is(monkeypatch):
    """x + g (c - x) of the velocities with the caption and with the negative prompt."""
    asked = []

    def forward(_, x, grid, timestep, text, time_ratio):
        asked.append(text)
        return torch.full_like(x, text)

    monkeypatch.setattr(wear, "clip_forward", forward)
    monkeypatch.setattr(wear, "text_context", lambda _, prompts, length: float(len(prompts[0])))
    latents = torch.zeros(1, 4, 2, 4, 6)
    schedule = [sigmas(4, 0.5, 3.0)]
    made = [
        wear.wear(
            model(), latents, [torch.zeros(3)], Spacing(4), schedule, torch.Generator().manual_seed(0), scale, negative
        )
        for scale, negative in ((1.0, torch.zeros(1)), (3.0, torch.zeros(1)))
    ]
    # from sigma 0.5 to 0: velocities 3, and 1 + 3 * (3 - 1) = 7
    torch.testing.assert_close(made[0] - made[1], torch.full_like(latents, 0.5 * 4))
    assert sorted(set(asked)) == [1.0, 3.0]


def test_half_of_the_draws_of_stage_2_see_the_worn_proxy(monkeypatch):
    [sample] = details()
    sample |= {f"worn_{r}": torch.full_like(sample[f"proxy_{r}"], 7.0) for r in (1, 4)}
    seen = []
    monkeypatch.setattr(train, "PROXY_NOISE", 0.0)
    monkeypatch.setattr(train, "proxy_context", lambda _, tokens, *rest: seen.append((tokens == 7.0).all().item()))
    monkeypatch.setattr(train, "detail_forward", lambda _, x, *rest, **named: x)

    bare = model()
    for seed in range(60):
        train.detail_loss(bare, bare, [sample], [embed("x")], random.Random(seed), torch.Generator(), DETAIL, 4)
    assert 0.3 < sum(seen) / len(seen) < 0.7
