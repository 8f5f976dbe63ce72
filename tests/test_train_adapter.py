"""`atlasvid train proxy|detail` from clips to an adapter that diffusers and the tool load, resumed after a kill."""

import json
import math
import random
import shutil
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from PIL import Image

from atlasvid_cli import dataset, loop, tensor_file, train, train_adapter, wear, weights
from atlasvid_cli.console import Console
from atlasvid_cli.corpus import load_samples
from atlasvid_cli.errors import InputError, UsageError
from atlasvid_cli.presets import Training, load_preset
from atlasvid_cli.session import Session
from atlasvid_cli.shapes import NATIVE, Spacing
from atlasvid_cli.train_adapter import embedder, make
from atlasvid_cli.train_job import Job, Learner
from tests.test_corpus import pairs
from tests.test_train import details


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Ten clips, of which the last is held out."""
    folder = tmp_path_factory.mktemp("clips")
    return pairs(folder, **{f"clip{i}": 2.1 for i in range(10)})


def session_with(random_preset, **training):
    return Session(replace(load_preset(str(random_preset)), training=Training(**training)))


@pytest.fixture
def session_of_pixels(random_preset):
    """As the preset has it: levels start from pixels, which takes most of the time of a short training."""
    return session_with(random_preset, detail_accumulate=1)


@pytest.fixture
def session(session_of_pixels):
    detail = session_of_pixels.preset.detail
    first, upper = (replace(level, upsample="latents") for level in (detail.first, detail.upper))
    session_of_pixels.preset = replace(session_of_pixels.preset, detail=replace(detail, first=first, upper=upper))
    return session_of_pixels


@pytest.fixture(scope="module")
def encoded(clips, random_preset, tmp_path_factory):
    """A work folder with the latents of both stages, which every test would make alike."""
    work = tmp_path_factory.mktemp("work")
    for stage in ("proxy", "detail"):
        load_samples(Session(str(random_preset)), stage, clips, work, quiet())
    return work


@pytest.fixture(params=["proxy", "detail"])
def job(request, clips, encoded, tmp_path, monkeypatch):
    shutil.copytree(encoded, tmp_path / "work")
    for name, steps in (("CHECKPOINT_STEPS", 4), ("VALIDATION_STEPS", 4), ("LOG_STEPS", 2), ("SAMPLE_STEPS", 6)):
        monkeypatch.setattr(loop, name, steps)
    return Job(request.param, clips, tmp_path / "a.safetensors", tmp_path / "work", steps=9, lr=0.03, rank=4)


def rows(job):
    [log] = job.work.glob(f"{job.stage}-*/log.jsonl")
    return [json.loads(line) for line in log.read_text().splitlines()]


def quiet():
    return Console(interactive=False)


def test_an_adapter_is_trained_validated_and_loads(session, job, tmp_path):
    """The preset names it already."""
    own = {job.stage: replace(getattr(session.preset, job.stage), lora="later.safetensors")}
    session.preset = replace(session.preset, **own)
    assert make(session, job, quiet()) == job.output
    logged = rows(job)
    assert [r["step"] for r in logged] == [2, 4, 6, 8, 9]
    assert [("validation_loss" in r) for r in logged] == [False, True, False, True, True]
    metadata, _ = tensor_file.read_header(job.output)
    assert metadata["stage"] == job.stage and metadata["base"] == weights.model_hash(session.folder, "transformer")
    assert metadata["time_ratio"] == ("4" if job.stage == "proxy" else "4,1")
    if job.stage == "proxy":
        assert metadata["position_scale"] == str(session.preset.proxy.position_scale)
    else:
        assert json.loads(metadata["windows"]) == [[2, 3, 3], [3, 2, 2]] and set(metadata["ratio"].split(",")) <= {
            *"24"
        }
    # the tool's own loading, which refuses other stages and bases, and diffusers'
    model = shutil.copytree(session.folder, tmp_path / "model")
    shutil.copy(job.output, model / "own.safetensors")
    fused = weights.load_transformer(model, "own.safetensors", job.stage)
    pipeline = WanPipeline.from_pretrained(session.folder, torch_dtype=torch.float32)
    pipeline.load_lora_weights(tmp_path, weight_name=job.output.name)
    x, t = torch.randn(1, 4, 2, 4, 6), torch.tensor([300])
    text = torch.randn(1, 5, 16)
    with torch.no_grad():
        ours, theirs = (m(x, t, text, return_dict=False)[0] for m in (fused, pipeline.transformer))
        bare = weights.load_transformer(model)(x, t, text, return_dict=False)[0]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert (ours - bare).abs().max() > 1e-3


def test_a_killed_training_goes_on_to_the_same_losses_and_weights(session, job, tmp_path, monkeypatch):
    # so that a checkpoint falls between two lines of the log
    for name, steps in (("LOG_STEPS", 3), ("VALIDATION_STEPS", 3), ("SAMPLE_STEPS", 9)):
        monkeypatch.setattr(loop, name, steps)
    make(session, job, quiet())
    whole, weights_ = rows(job), tensor_file.open_tensors(job.output)[0]
    shutil.rmtree(next(job.work.glob(f"{job.stage}-*")))
    job.output.unlink()
    rate = loop.learning_rate
    count = 0

    def dies(*arguments):
        nonlocal count
        count += 1
        if count == 8:  # after the checkpoint at 4 and the log at 6
            raise KeyboardInterrupt
        return rate(*arguments)

    monkeypatch.setattr(loop, "learning_rate", dies)
    with pytest.raises(KeyboardInterrupt):
        make(session, job, quiet())
    assert not job.output.exists()
    monkeypatch.setattr(loop, "learning_rate", rate)
    make(session, job, quiet())
    for a, b in zip(whole, rows(job), strict=True):
        assert a["step"] == b["step"] and a["loss"] == pytest.approx(b["loss"], abs=1e-6)
        assert a.get("validation_loss") == pytest.approx(b.get("validation_loss"), abs=1e-6)
    for name, tensor in tensor_file.open_tensors(job.output)[0].items():
        torch.testing.assert_close(tensor, weights_[name], atol=1e-6, rtol=0)


@pytest.mark.parametrize("job", ["proxy"], indirect=True)
def test_a_preset_says_what_a_step_sees(random_preset, job, monkeypatch):
    draw = train.draw_batch
    seen: list[int] = []

    def spy(*arguments):
        picked, latents = draw(*arguments)
        seen.append(len(picked))
        return picked, latents

    monkeypatch.setattr(train, "draw_batch", spy)
    monkeypatch.setattr(train_adapter.Sampler, "show", lambda *arguments: None)
    make(session_with(random_preset), replace(job, steps=1), quiet())
    [at_once] = seen
    seen.clear()
    another = replace(job, steps=1, output=job.output.with_name("b.safetensors"))
    make(session_with(random_preset, batch=1, accumulate=4), another, quiet())
    assert len(seen) == 4 and at_once >= 5 * seen[0] >= 5


def test_other_settings_start_anew_and_do_not_overwrite(session, job, tmp_path, monkeypatch):
    job = replace(job, steps=2)
    make(session, job, quiet())
    make(session, job, quiet())  # finished: the same file again
    with monkeypatch.context() as inside, pytest.raises(UsageError, match="made from something else"):
        inside.setattr(train_adapter, "_samples", lambda *_: pytest.fail("clips were read"))
        make(session, replace(job, seed=1), quiet())
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text(json.dumps({"video": str(job.data / "clip0.mp4"), "caption": "clip clip0"}))
    with pytest.raises(UsageError, match="made from something else"):
        make(session, replace(job, data=fewer), quiet())
    other = replace(job, seed=1, output=job.output.with_name("b.safetensors"))
    make(session, other, quiet())
    a, b = (tensor_file.open_tensors(j.output)[0] for j in (job, other))
    assert any(not torch.equal(a[name], b[name]) for name in a)


def test_the_procedural_world_is_one_more_source(session, job, monkeypatch):
    monkeypatch.setattr(train_adapter, "WORLD_SAMPLES", {"proxy": {"proxy": 10}, "detail": {"first": 5, "upper": 5}})
    monkeypatch.setattr(dataset, "PROXY_GRIDS", (((2, 3), 1),))
    monkeypatch.setattr(dataset, "DETAIL_TOKENS", 4)
    monkeypatch.setattr(dataset, "DETAIL_RATIOS", (Fraction(4), Fraction(2)))
    make(session, replace(job, data=Path("world"), steps=2), quiet())
    assert "validation_loss" in rows(job)[-1]
    session.preset = replace(session.preset, fps=24)
    with pytest.raises(UsageError, match="folder of clips"):
        make(session, replace(job, data=Path("world")), quiet())


def test_a_base_in_bfloat16_is_trained_through_factors_in_fp32(session, job, monkeypatch):
    """As on a GPU: half-precision weights, blocks computed again backwards, updates that rounding does not lose."""
    seen, real = [], train.run
    monkeypatch.setattr(train, "run", lambda model, *a, **k: seen.append(model) or real(model, *a, **k))
    monkeypatch.setattr(
        train_adapter, "load_transformer", lambda *a, **k: checkpointing(weights.load_transformer(*a, **k))
    )
    session.dtype = torch.bfloat16
    make(session, replace(job, steps=3), quiet())
    dtypes = {p.requires_grad: p.dtype for p in seen[0].parameters() if p.ndim > 1}
    assert dtypes == {True: torch.float32, False: torch.bfloat16} and seen[0].gradient_checkpointing
    assert all(math.isfinite(row["loss"]) for row in rows(job))
    assert any(t.abs().max() > 0 for n, t in tensor_file.open_tensors(job.output)[0].items() if "lora_B" in n)


@pytest.mark.parametrize(("device", "told"), [("cuda", ["high"]), ("cpu", [])])
def test_on_a_gpu_the_factors_are_multiplied_as_tf32(monkeypatch, device, told):
    """Elsewhere in full fp32."""
    base, asked = SimpleNamespace(to=lambda device: base, enable_gradient_checkpointing=lambda: None), []
    monkeypatch.setattr(train_adapter, "load_transformer", lambda *a, **k: base)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", asked.append)
    session = SimpleNamespace(folder=Path(), dtype=torch.bfloat16, device=torch.device(device))
    assert train_adapter._trainable(session, "transformer") is base and asked == told


def checkpointing(model):
    model.enable_gradient_checkpointing()
    return model


@pytest.mark.parametrize("job", ["detail"], indirect=True)
def test_where_the_adapter_is_for_the_proxy_stream_only_that_one_learns(session, job, monkeypatch):
    monkeypatch.setattr(
        train, "PROXY_DROP", 1.0
    )  # of both streams only: without a proxy there would be nothing to learn
    session.preset = replace(session.preset, detail=replace(session.preset.detail, streams="proxy"))
    seen = []
    real = train.train_detail
    monkeypatch.setattr(
        train, "train_detail", lambda bare, model, *a, **k: seen.append(bare) or real(bare, model, *a, **k)
    )
    before = weights.load_transformer(session.folder, dtype=session.dtype).state_dict()
    make(session, replace(job, steps=3), quiet())
    assert tensor_file.read_header(job.output)[0]["streams"] == "proxy"
    assert all(torch.equal(before[n], p) for n, p in seen[0].state_dict().items())
    assert any(t.abs().max() > 0 for n, t in tensor_file.open_tensors(job.output)[0].items() if "lora_B" in n)


def test_a_bare_stream_shares_the_base_and_learns_the_same(session):
    """As beside a base of its own, which would take the memory of another model."""
    [sample], gradients = details(), []
    detail = replace(session.preset.detail, streams="proxy")
    text = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    for shares in (True, False):
        model = train_adapter._trainable(session, "transformer")
        bare = (train_adapter._sharing if shares else lambda _: train_adapter._trainable(session, "transformer"))(model)
        torch.manual_seed(0)
        model.add_adapter(train.lora_config(2))
        factors = {name: p for name, p in model.named_parameters() if p.requires_grad}
        for name, factor in factors.items():
            torch.nn.init.normal_(factor, std=0.1 if "lora_B" in name else 1.0)
        owned = {p.data_ptr() for p in model.parameters()}
        assert all((p.data_ptr() in owned) == shares for p in bare.parameters())
        assert all(not p.requires_grad for p in bare.parameters())
        loss = train.detail_loss(
            bare, model, [sample], [text], random.Random(0), torch.Generator().manual_seed(0), detail, 4
        )
        gradients.append([loss, *torch.autograd.grad(loss, factors.values(), allow_unused=True)])
    assert any(grad is not None and grad.abs().max() > 0 for grad in gradients[0][1:])
    for ours, theirs in zip(*gradients, strict=True):
        assert ours is theirs is None or torch.equal(ours, theirs)


@pytest.mark.gpu
def test_a_gpu_learns_each_stage(session, job):
    assert session.device.type == "cuda"
    make(session, replace(job, steps=3), quiet())
    assert all(math.isfinite(row["loss"]) for row in rows(job))
    tensors, _ = tensor_file.open_tensors(job.output)  # finite, as it checks
    assert any(t.abs().max() > 0 for name, t in tensors.items() if "lora_B" in name)  # which begin at 0


@pytest.mark.parametrize("job", ["detail"], indirect=True)
def test_stage_2_learns_from_proxies_as_the_preset_makes_them(session, job, monkeypatch):
    seen, real = {}, wear.add_worn

    def recorded(model, data, embed, stage1, on_done):
        seen[stage1.spacing] = model
        real(model, data, embed, stage1, on_done)

    monkeypatch.setattr(wear, "add_worn", recorded)
    make(session, replace(job, steps=1), quiet())
    for spacing, adapter in ((NATIVE, None), (session.preset.proxy.spacing, session.preset.proxy.lora)):
        expected = weights.load_transformer(session.folder, adapter, "proxy", session.dtype)
        assert torch.equal(seen[spacing].blocks[0].attn1.to_q.weight, expected.blocks[0].attn1.to_q.weight)
    bare, adapted = seen.values()
    assert not torch.equal(bare.blocks[0].attn1.to_q.weight, adapted.blocks[0].attn1.to_q.weight)


def test_where_a_proxy_spans_no_more_time_its_adapter_makes_all_worn_proxies(session):
    """Two of one time ratio would take each other's place."""
    proxy = replace(session.preset.proxy, time_ratio=1, position_scale=0.75)
    preset = replace(session.preset, proxy=proxy)
    [only] = train_adapter._makers(preset, Learner("transformer", proxy.lora, 3.0, (0.0, 1.0)))
    assert only.spacing == Spacing(1, 0.75) and only.adapter == proxy.lora


@pytest.mark.parametrize("stage, expert", [("proxy", "high"), ("proxy", "low"), ("detail", None)])
def test_an_adapter_is_for_one_of_two_experts(experts_preset, clips, tmp_path, monkeypatch, capsys, stage, expert):
    """Trained at the sigmas at which it works, from its own weights, and taken by renders as its own alone."""
    part, (low, high) = ("transformer", (0.9, 1.0)) if expert == "high" else ("transformer_2", (0.0, 0.9))
    shutil.copytree(experts_preset.parent, tmp_path, dirs_exist_ok=True)
    path, text = tmp_path / "experts.toml", experts_preset.read_text()
    path.write_text(text.replace("proxy_attention = false", "proxy_attention = true"))
    monkeypatch.setattr(
        train, "PROXY_DROP", 0.5
    )  # without a proxy the way begins at noise, where the second does not work
    drawn, loaded, noised = [], set(), []
    draw, load, wears = train.draw_sigma, train_adapter.load_transformer, wear.add_worn
    monkeypatch.setattr(train, "draw_sigma", lambda *a, **k: drawn.append(draw(*a, **k)) or drawn[-1])
    monkeypatch.setattr(
        train_adapter, "load_transformer", lambda *a, **k: loaded.add((*a, *k.values())[-1]) or load(*a, **k)
    )
    monkeypatch.setattr(wear, "add_worn", lambda *a: noised.append(a[3].largest) or wears(*a))
    job = Job(stage, clips, tmp_path / "stock" / "own.safetensors", tmp_path / "work", 3, 0.03, 4, expert=expert)
    make(Session(str(path)), job, quiet())
    assert ("time_ratio = 1, so that" in capsys.readouterr().err) == (stage == "proxy")
    assert drawn and all(low <= sigma < high for sigma in drawn)
    assert loaded == {part} and set(noised) <= {0.9}
    metadata, _ = tensor_file.read_header(job.output)
    assert metadata["base"] == weights.model_hash(tmp_path / "stock", part)
    assert list(job.work.glob(f"{stage}-*/samples/step-000003-0.png"))

    def taken_by(table):
        path.write_text(text.replace(f"[{table}]\n", f'[{table}]\nlora = "own.safetensors"\n'))
        Session(str(path)).check_adapters()

    own, other = {None: ("detail", "proxy"), "high": ("proxy", "experts"), "low": ("experts", "proxy")}[expert]
    taken_by(own)
    with pytest.raises(InputError, match="was trained for"):
        taken_by(other)


@pytest.mark.parametrize("job", ["detail"], indirect=True)
def test_what_cannot_be_used_is_said_before_clips_are_encoded(session, job, tmp_path, monkeypatch):
    monkeypatch.setattr(train_adapter, "_samples", lambda *_: pytest.fail("clips were read"))
    with pytest.raises(UsageError, match="an adapter"):
        make(session, replace(job, output=tmp_path / "a.pt"), quiet())
    tensors, preset = tensor_file.open_tensors(session.folder / session.preset.proxy.lora)[0], session.preset
    for name, other in (("time_ratio", "2"), ("position_scale", "0.5"), ("base", "0" * 16), ("stage", "detail")):
        lora = tmp_path / f"{name}.safetensors"
        tensor_file.save_tensors(lora, tensors, {name: other})
        session.preset = replace(preset, proxy=replace(preset.proxy, lora=str(lora)))
        with pytest.raises(InputError, match=f"was trained for {name} {other}"):
            make(session, job, quiet())


@pytest.mark.parametrize("job", ["detail"], indirect=True)
def test_proxies_are_made_once_for_all_trainings_that_depend_on_the_same(session_of_pixels, job, monkeypatch):
    """Pixels are what levels start from, as the preset has it; rate, rank, seed and margin change none of them."""
    preset, seen, made = session_of_pixels.preset, [], []
    real, worn, enlarged = train.train_detail, wear.add_worn, wear.add_enlarged
    monkeypatch.setattr(train, "train_detail", lambda *a, **k: seen.append(a[3]) or real(*a, **k))
    monkeypatch.setattr(wear, "add_worn", lambda *a: made.append(("worn", a[3].spacing.time)) or worn(*a))
    monkeypatch.setattr(wear, "add_enlarged", lambda *a: made.append(("enlarged", a[2])) or enlarged(*a))
    monkeypatch.setattr(train_adapter.Sampler, "show", lambda *_: None)

    def train_once(name, **changes):
        made.clear()
        make(session_of_pixels, replace(job, steps=1, output=job.output.with_name(name), **changes), quiet())
        return sorted(made), seen.pop()

    every = [(kind, time_ratio) for kind in ("enlarged", "worn") for time_ratio in (1, 4)]
    first, samples = train_once("a.safetensors")
    assert first == every
    for sample in samples:
        assert sample["enlarged_4"].shape == sample["enlarged_1"].shape == sample["latents"].shape
        assert "worn_4" not in sample and "worn_1" not in sample
    session_of_pixels.preset = replace(preset, detail=replace(preset.detail, margin=(0, 0, 0)))
    again, same = train_once("b.safetensors", lr=0.01, rank=2, seed=1)
    assert again == []
    for one, other in zip(samples, same, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[n], other[n]) for n in ("proxy_1", "proxy_4", "enlarged_1", "enlarged_4"))
    first_level = replace(preset.detail.first, upsample="latents")
    session_of_pixels.preset = replace(preset, detail=replace(preset.detail, first=first_level))
    again, same = train_once("c.safetensors")
    assert again == []
    assert all({"worn_4", "enlarged_1"} <= set(sample) and "enlarged_4" not in sample for sample in same)
    session_of_pixels.preset = replace(preset, proxy=replace(preset.proxy, guidance_scale=2.0))
    assert train_once("d.safetensors")[0] == [("enlarged", 4), ("worn", 4)]  # the base is not guided


def test_held_out_clips_are_shown_as_sampled(session, job):
    """A picture of a row of true frames above one of made ones, at every so many steps and at the end, and the adapter
    that made them."""
    make(session, job, quiet())
    [folder] = job.work.glob(f"{job.stage}-*/samples")
    steps = {p.name.rsplit("-", 1)[0] for p in folder.iterdir()}
    assert steps == {"step-000006", "step-000009"}
    adapters = [folder.parent / f"step-{step:06d}.safetensors" for step in (6, 9)]
    first, last = (tensor_file.open_tensors(path)[0] for path in adapters)
    assert adapters[1].read_bytes() == job.output.read_bytes() and any(not torch.equal(first[n], last[n]) for n in last)
    picture = np.asarray(Image.open(folder / "step-000009-0.png"), dtype=float)
    half = picture.shape[0] // 2
    true, made = picture[:half], picture[half:]
    assert picture.shape[1] >= 5 * 16 and true.std() > 1 and made.std() > 1
    assert np.abs(true[: half - 4] - made[-(half - 4) :]).mean() > 1  # nine steps do not learn a clip


def test_pictures_that_need_more_memory_than_there_is_end_nothing(session, job, monkeypatch, capsys):
    def show(*_):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(train_adapter.Sampler, "show", show)
    assert make(session, job, quiet()) == job.output and job.output.exists()
    said = capsys.readouterr().err
    assert all(f"memory ran out for the pictures of step {step}" in said for step in (6, 9))


def test_embeddings_are_made_once(session, tmp_path, monkeypatch):
    embed = embedder(session, ["a red ball", "a zebra"], tmp_path, quiet())
    assert torch.equal(embed("a red ball"), session.embeddings(("a red ball",), quiet())[0])
    assert len(embed("")) == 1
    monkeypatch.setattr(session, "encode", lambda *a: pytest.fail("encoded again"))
    assert torch.equal(embedder(session, ["a zebra"], tmp_path, quiet())("a zebra"), embed("a zebra"))


def test_embeddings_are_kept_as_they_come(session, tmp_path, monkeypatch):
    encode, asked = session.encode, []

    def recorded(prompts, console):
        asked.append(prompts)
        return list(encode(prompts, console))

    def interrupted(prompts, console):
        for number, embedding in enumerate(encode(prompts, console)):
            if number == 2:
                raise KeyboardInterrupt
            yield embedding

    monkeypatch.setattr(session, "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        embedder(session, ["a red ball", "a zebra"], tmp_path, quiet())
    monkeypatch.setattr(session, "encode", recorded)
    embedder(session, ["a red ball", "a zebra"], tmp_path, quiet())
    assert asked == [["a zebra"]]
