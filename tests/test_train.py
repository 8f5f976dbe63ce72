"""Training on small random latents: it learns, it resumes to the same loss, its adapters load where they should."""

import json
import random
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from diffusers import WanTransformer3DModel

from atlasvid_cli import loop, train
from atlasvid_cli.errors import InputError
from atlasvid_cli.loop import Run
from atlasvid_cli.presets import Detail, Level
from atlasvid_cli.schedule import upsample
from atlasvid_cli.shapes import Spacing
from atlasvid_cli.weights import load_transformer

CONFIG = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 8,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
}
LEVELS = Level(3, 0.75, 1.0), Level(3, 0.5, 1.0)
DETAIL = Detail(2.0, 4, True, ((3, 2, 2),), (0, 1, 1), (13, 9, 9), False, "both", 8, 3.0, *LEVELS)


def model():
    torch.manual_seed(0)
    return WanTransformer3DModel(**CONFIG)


def embed(prompt):
    generator = torch.Generator().manual_seed(len(prompt))
    return torch.randn(3, 8, generator=generator)


def clips(frames=3):
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(4, frames, 4, 6, generator=generator)
    return [{"latents": base + 0.1 * i, "caption": "x" * i} for i in range(3)]


def details():
    generator = torch.Generator().manual_seed(2)
    proxies = {f"proxy_{r}": torch.randn(4, t, 2, 2, generator=generator) for r, t in ((4, 2), (1, 5))}
    latents = torch.randn(4, 5, 8, 8, generator=generator)
    return [{"latents": latents, "caption": "x", "ratio": "4", **proxies}]


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def test_training_learns(tmp_path):
    train.train_clips(model(), Run(tmp_path, 150, 5e-3), [], clips(), embed, tokens=18)
    values = losses(tmp_path)
    assert values[-1] < 0.75 * values[0]


def test_crops_of_a_draw_have_one_length_and_proxies_as_long():
    proxies = {"proxy_1": torch.zeros(4, 1, 2, 2), "proxy_4": torch.zeros(4, 1, 2, 2)}
    data = [
        {"latents": torch.zeros(4, 1, 8, 8), "caption": "still", "ratio": "4", **proxies} for _ in range(4)
    ] + details()
    seen = {}
    for seed in range(40):
        drawn = train.draw_crops(train.by_kind(data), random.Random(seed), 4)
        (length,) = {s["latents"].shape[1] for s in drawn}
        assert len({id(s["latents"].untyped_storage()) for s in drawn}) == len(drawn), "none twice"
        assert len(drawn) == (2 if drawn[0]["caption"] == "still" else 1)
        assert all(s["proxy_1"].shape[1] == length and s["proxy_4"].shape[1] == (length + 3) // 4 for s in drawn)
        seen.setdefault(length, set()).update(s["caption"] for s in drawn)
    assert seen == {1: {"still", "x"}, 5: {"x"}}  # a clip's first latent frame is a still


@pytest.mark.parametrize("within", [(0.0, 0.875), (0.875, 1.0)])
def test_sigmas_of_an_expert_are_the_part_of_all_sigmas_between_its_own(within):
    low, high = within
    generator = torch.Generator().manual_seed(0)
    everything = [train.draw_sigma(generator, 12.0) for _ in range(20000)]
    inside = [s for s in everything if low <= s < high]
    drawn = [train.draw_sigma(generator, 12.0, within=within) for _ in range(5000)]
    assert all(low <= s < high for s in drawn)
    expected, found = (torch.quantile(torch.tensor(x), torch.tensor([0.1, 0.5, 0.9])) for x in (inside, drawn))
    torch.testing.assert_close(found, expected, atol=0.01, rtol=0)


def test_errors_near_the_object_count_more_where_the_data_tells_where_it_is(monkeypatch):
    [sample] = details()
    near = torch.zeros(1, 5, 4, 4, dtype=torch.uint8)
    near[:, :, :2] = 1
    bare, losses = model(), []
    wrong = torch.cat((torch.ones(8), torch.zeros(8))).repeat(5)[None, :, None]  # upper half of each latent frame

    def forward(_, x, grid, timestep, *rest, **named):
        truth = train.patchified(sample["latents"][None])
        return (x - truth) / (timestep / 1000).view(-1, 1, 1) + wrong

    monkeypatch.setattr(train, "detail_forward", forward)
    for told in ({}, {"near": near}, {"near": 1 - near}):
        rng, generator = random.Random(0), torch.Generator().manual_seed(0)
        losses.append(train.detail_loss(bare, bare, [sample | told], [embed("x")], rng, generator, DETAIL, 4).item())
    assert losses == pytest.approx([0.5, 0.75, 0.25], rel=1e-3)


@pytest.mark.parametrize("seed", range(6))
def test_detail_learns_the_way_from_the_upsampled_proxy_to_the_truth(monkeypatch, seed):
    """What the model is shown lies on that way, and a model that points at the truth makes no error."""
    [sample] = details()
    clean, seen = train.patchify(sample["latents"], train.PATCH), []

    def pointing_at_the_truth(_, x, grid, timestep, text, proxy, *rest, **named):
        seen.append((x, timestep / 1000, proxy))
        return (x - clean) / (timestep / 1000).view(-1, 1, 1)

    monkeypatch.setattr(train, "detail_forward", pointing_at_the_truth)
    monkeypatch.setattr(train, "PROXY_NOISE", 0.0)
    bare, rng, generator = model(), random.Random(seed), torch.Generator().manual_seed(seed)
    assert train.detail_loss(bare, bare, [sample] * 2, [embed("x")] * 2, rng, generator, DETAIL, 4) < 1e-8
    [(both, sigmas, proxy)] = seen
    assert not both[0].equal(both[1]), "each has its own noise"
    x, sigma = both[1], sigmas[1].item()
    if proxy is None:  # dropped, then there is nothing to start from but noise
        noise = (x - (1 - sigma) * clean) / sigma
    else:
        strength = {4: DETAIL.first, 1: DETAIL.upper}[proxy.alignment.time_ratio].strength
        low = upsample(
            sample[f"proxy_{proxy.alignment.time_ratio}"],
            Fraction(4),
            proxy.alignment.time_ratio,
            (range(5), range(8), range(8)),
        )
        assert 0 < sigma <= strength
        part = sigma / strength
        known = (1 - part) * clean + part * (1 - strength) * train.patchify(low, train.PATCH)
        noise = (x - known) / sigma
    assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1


def test_a_level_that_starts_from_pixels_learns_the_way_from_there(monkeypatch):
    [sample] = details()
    del sample["proxy_1"]
    sample["enlarged_4"] = torch.full_like(sample["latents"], 3.0)
    seen = []
    monkeypatch.setattr(train, "PROXY_DROP", 0.0)
    monkeypatch.setattr(train, "draw_sigma", lambda generator, shift, largest, within: largest)
    monkeypatch.setattr(train, "detail_forward", lambda _, x, *rest, **named: seen.append(x.mean().item()) or x)
    bare = model()
    for kind in ("latents", "pixels"):
        detail = replace(DETAIL, first=replace(DETAIL.first, upsample=kind, strength=0.5))
        train.detail_loss(bare, bare, [sample], [embed("x")], random.Random(0), torch.Generator(), detail, 4)
    assert abs(seen[0]) < 0.3 and 1.2 < seen[1] < 1.8  # half of 3, and noise


@pytest.mark.parametrize("time_ratio", [1, 4])
def test_a_sample_trains_the_levels_that_it_has_a_proxy_for(monkeypatch, time_ratio):
    [sample] = details()
    del sample[f"proxy_{5 - time_ratio}"]
    seen = set()
    monkeypatch.setattr(train, "PROXY_DROP", 0.0)
    monkeypatch.setattr(
        train,
        "detail_forward",
        lambda _, x, grid, t, text, proxy, *rest, **named: seen.add(proxy.alignment.time_ratio) or x,
    )
    bare = model()
    for seed in range(8):
        train.detail_loss(bare, bare, [sample], [embed("x")], random.Random(seed), torch.Generator(), DETAIL, 4)
    assert seen == {time_ratio}


@pytest.mark.parametrize("kind", ["clips", "detail"])
def test_a_resumed_training_ends_with_the_same_weights(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(loop, "CHECKPOINT_STEPS", 20)

    def run(folder):
        torch.manual_seed(0)
        fresh, told = model(), Run(folder, 25, 5e-3)
        if kind == "clips":
            train.train_clips(fresh, told, clips(1), clips(), embed, spacing=Spacing(4), tokens=18, stills=(0.9, 0.4))
        else:
            fresh.add_adapter(train.lora_config(2))
            train.train_detail(fresh, fresh, told, details(), embed, DETAIL)
        return fresh.state_dict()

    whole = run(tmp_path / "whole")
    rate, count = loop.learning_rate, 0

    def dies(*arguments):
        nonlocal count
        count += 1
        if count == 23:
            raise KeyboardInterrupt
        return rate(*arguments)

    monkeypatch.setattr(loop, "learning_rate", dies)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed")
    monkeypatch.setattr(loop, "learning_rate", rate)
    resumed = run(tmp_path / "killed")
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, atol=1e-6, rtol=0)


def test_an_adapter_survives_saving_and_fusing(tmp_path):
    trained = model()
    trained.add_adapter(train.lora_config(2))
    for name, parameter in trained.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    train.save_adapter(trained, tmp_path / "a.safetensors", {"stage": "proxy"})
    loaded = model()
    loaded.load_lora_adapter(tmp_path / "a.safetensors", prefix="transformer")
    loaded.fuse_lora()
    x, t, text = torch.randn(1, 4, 3, 4, 6), torch.tensor([300]), torch.randn(1, 5, 8)
    with torch.no_grad():
        expected, found = (m(x, t, text, return_dict=False)[0] for m in (trained, loaded))
        bare = model()(x, t, text, return_dict=False)[0]
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)  # stored in fp16
    assert (expected - bare).abs().max() > 0.02


@pytest.mark.parametrize(("metadata", "said"), [({"stage": "detail"}, "stage"), ({"base": "0" * 16}, "base")])
def test_an_adapter_of_another_stage_or_base_is_refused(tmp_path, metadata, said):
    trained = model()
    trained.save_pretrained(tmp_path / "transformer")
    trained.add_adapter(train.lora_config(2))
    train.save_adapter(trained, tmp_path / "own.safetensors", {"stage": "proxy"})
    load_transformer(tmp_path, "own.safetensors", "proxy")
    train.save_adapter(trained, tmp_path / "other.safetensors", metadata)
    with pytest.raises(InputError, match=f"trained for {said}"):
        load_transformer(tmp_path, "other.safetensors", "proxy")
