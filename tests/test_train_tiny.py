"""The recipe of the embedded model from nothing, every part of it cut to a step or two."""

import shutil
from fractions import Fraction
from functools import partial

import pytest

from atlasvid_cli import dataset, loop, pipeline, train, train_encoder, train_text, train_tiny, train_vae, wear
from atlasvid_cli.plan import Request, make_plan
from atlasvid_cli.session import Session
from atlasvid_cli.video import probe

STEPS = [name for name in vars(train_tiny) if name.endswith("_STEPS")]
SMALL = (((2, 3), 1),)


@pytest.fixture
def small(monkeypatch):
    for name in STEPS:
        monkeypatch.setattr(train_tiny, name, 1)
    monkeypatch.setattr(train_tiny, "BASE_CYCLES", ((1, 1e-3, (0.5, 0.5)), (1, 1e-3, (0.5, 0.5))))
    monkeypatch.setattr(train_tiny, "SAMPLES", dict.fromkeys(train_tiny.SAMPLES, 2))
    for name in ("LONG_CLIPS", "ENTRY_CLIPS"):
        monkeypatch.setattr(train_tiny, name, ((1, 64, 9),))
    monkeypatch.setattr(train_text, "train", partial(train_text.train, steps=2, settling_steps=2))
    monkeypatch.setattr(train_vae, "evaluate", lambda vae: {})
    monkeypatch.setattr(dataset, "FRAME_GRIDS", SMALL)
    monkeypatch.setattr(dataset, "PROXY_GRIDS", SMALL)
    monkeypatch.setattr(dataset, "DETAIL_TOKENS", 4)
    monkeypatch.setattr(dataset, "DETAIL_RATIOS", (Fraction(2),))


def test_the_recipe_ends_in_a_model_that_renders_and_resumes_as_finished(tmp_path, monkeypatch, console, small):
    work, out = tmp_path / "work", tmp_path / "tiny"
    work.mkdir()
    train_tiny.make(work, out, console)
    plan = make_plan(Request("tiny", 320, 192, Fraction(1, 4), "a red ball", steps=2))
    video = tmp_path / "a.mp4"
    pipeline.render(Session("tiny", str(out)), plan, tmp_path / "run", video, console)
    assert probe(video)["frames"] == 4
    made = {p: p.stat().st_mtime_ns for p in out.rglob("*.safetensors")}
    assert len(made) == 6
    train_tiny.make(work, out, console)
    assert {p: p.stat().st_mtime_ns for p in made} == made

    learnt = [out / "transformer", out / train_tiny.PROXY_ADAPTER, out / train_tiny.DETAIL_ADAPTER]

    def made_again():
        shutil.rmtree(learnt[0])
        for adapter in learnt[1:]:
            adapter.unlink()
        train_tiny.make(work, out, console)
        return [(p / "diffusion_pytorch_model.safetensors" if p.is_dir() else p).read_bytes() for p in learnt]

    with monkeypatch.context() as finished:  # all from what the runs have kept
        for module, name in ((loop, "learning_rate"), (wear, "add_worn"), (wear, "add_enlarged")):
            finished.setattr(module, name, lambda *_: pytest.fail("trained or worn again"))
        before = made_again()
    monkeypatch.setattr(train_tiny, "BASE_CYCLES", ((1, 1e-3, (0.5, 0.5)), (1, 2e-3, (0.5, 0.5))))
    assert all(one != other for one, other in zip(before, made_again(), strict=True))
    assert len(list(work.glob("base-0-*"))) == 1 and len(list(work.glob("base-1-*"))) == 2


def test_a_run_of_the_vae_begins_anew_where_it_or_one_before_it_has_another_recipe(tmp_path, monkeypatch):
    monkeypatch.setattr(train_vae, "train", lambda vae, folder, **_: seen.append(folder) or vae)
    monkeypatch.setattr(train_encoder, "distil_encoder", lambda vae, teacher, folder, **_: seen.append(folder) or vae)
    monkeypatch.setattr(train_vae, "compress", lambda vae, channels: vae)

    def folders():
        seen.clear()
        train_tiny.trained_vae(tmp_path)
        return list(seen)

    seen = []
    before = folders()
    assert len(set(before)) == 6 and folders() == before
    for name, kept in (("STILL_DECODER_STEPS", 5), ("LATENT_CHANNELS", 1), ("VAE_STEPS", 0)):
        monkeypatch.setattr(train_tiny, name, 7)
        after = folders()
        assert [a == b for a, b in zip(after, before, strict=True)] == [True] * kept + [False] * (6 - kept)
        before = after


@pytest.mark.parametrize("name", ["PROXY_RANK", "PROXY_STEPS", "text_encoder", "transformer"])
def test_the_proxy_adapter_begins_anew_where_its_recipe_or_weights_changed(tmp_path, monkeypatch, name):
    weights = {"text_encoder": 0, "vae": 0, "transformer": 0}
    folders = []
    monkeypatch.setattr(train_tiny, "model_hash", lambda out, *names: str([(n, weights[n]) for n in names]))
    monkeypatch.setattr(dataset, "build", lambda *_: [])
    monkeypatch.setattr(train_tiny, "trainable", lambda *_, **named: None)
    monkeypatch.setattr(train, "train_clips", lambda model, told, *_, **named: folders.append(told.folder))
    monkeypatch.setattr(train, "save_adapter", lambda *_: None)
    for change in (False, False, True):
        if change and name in weights:
            weights[name] = 1
        elif change:
            monkeypatch.setattr(train_tiny, name, 7)
        train_tiny.make_proxy_adapter(tmp_path, tmp_path, None, None)
    assert folders[0] == folders[1] != folders[2]
