"""The recipe of the embedded model from nothing, every part of it cut to a step or two."""

from fractions import Fraction
from functools import partial

from atlasvid_cli import dataset, pipeline, train_text, train_tiny, train_vae
from atlasvid_cli.console import Console
from atlasvid_cli.plan import Request, make_plan
from atlasvid_cli.session import Session
from atlasvid_cli.video import probe

STEPS = [name for name in vars(train_tiny) if name.endswith("_STEPS")]
SMALL = (((2, 3), 1),)


def test_the_recipe_ends_in_a_model_that_renders_and_resumes_as_finished(tmp_path, monkeypatch):
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
    work, out = tmp_path / "work", tmp_path / "tiny"
    work.mkdir()
    train_tiny.make(work, out)
    console = Console(interactive=False)
    plan = make_plan(Request("tiny", 320, 192, Fraction(1, 4), steps=2))
    video = tmp_path / "a.mp4"
    pipeline.render(Session("tiny", str(out)), plan, tmp_path / "run", video, console)
    assert probe(video)["frames"] == 4
    made = {p: p.stat().st_mtime_ns for p in out.rglob("*.safetensors")}
    assert len(made) == 6
    train_tiny.make(work, out)
    assert {p: p.stat().st_mtime_ns for p in made} == made
