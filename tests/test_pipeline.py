"""The whole path on random weights: files, resumption, regions, refusals."""

import hashlib
import json
import shlex
import shutil
from dataclasses import astuple, replace
from fractions import Fraction
from itertools import islice
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import load_file, save_file

from atlasvid_cli import above, artefacts, outputs, pipeline, tensor_file
from atlasvid_cli import proxy as proxy_module
from atlasvid_cli.batch import proxy_one, render_one
from atlasvid_cli.encode import encode_clips
from atlasvid_cli.enlarge import enlarge
from atlasvid_cli.errors import InputError, RenderError, ResourceError, UsageError
from atlasvid_cli.footage import open_clip
from atlasvid_cli.memory import Placement
from atlasvid_cli.parse import Lora
from atlasvid_cli.plan import Request, make_plan
from atlasvid_cli.presets import presets_folder
from atlasvid_cli.refine import crop_to_stage
from atlasvid_cli.results import state_of
from atlasvid_cli.session import Session
from atlasvid_cli.targets import sheet_of
from atlasvid_cli.video import probe, read_frames, write_video

PROMPT = "a red ball moving right over a green checkerboard"


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def session(random_preset):
    return Session(str(random_preset))


@pytest.fixture
def request_(random_preset):
    return Request(str(random_preset), 256, 192, Fraction(1), PROMPT, seed=3)


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def latents(path):
    return tensor_file.open_tensors(path)[0]["latents"]


@pytest.mark.parametrize("shipped", [False, True])
def test_the_folder_is_a_plain_diffusers_folder(session, shipped):
    folder = presets_folder() / "tiny" if shipped else session.folder
    native = WanPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    native.set_progress_bar_config(disable=True)
    video = native(PROMPT, height=64, width=64, num_frames=5, num_inference_steps=2, max_sequence_length=512)
    assert video.frames.shape == (1, 5, 64, 64, 3)


def test_the_shipped_weights_are_small():
    assert sum(file.stat().st_size for file in (presets_folder() / "tiny").rglob("*.safetensors")) <= 25_000_000


def test_render_makes_exactly_what_was_asked(session, request_, console, tmp_path):
    event = pipeline.render(session, make_plan(request_), tmp_path / "run", tmp_path / "a.mp4", console)
    found = probe(tmp_path / "a.mp4")
    assert (found["width"], found["height"], found["frames"], found["seconds"]) == (256, 192, 16, 1.0)
    assert found["metadata"]["prompt"] == PROMPT and found["color_space"] == "bt709"
    assert event["video"] == str(tmp_path / "a.mp4")
    assert (tmp_path / "run" / "proxy.mp4").exists() and (tmp_path / "run" / "proxy.mp4.sheet.png").exists()
    assert (tmp_path / "a.mp4.sheet.png").exists()
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert {"torch", "diffusers", "av"} <= record["versions"].keys() and record["weights"]["vae"] == session.vae_hash
    assert sum(record["stage_seconds"].values()) == pytest.approx(record["render_seconds"], abs=0.05)
    assert not list((tmp_path / "run").glob("*.state.*"))


@pytest.mark.parametrize("streams", ["both", "proxy"])
def test_a_video_is_the_same_where_keys_of_the_proxy_have_no_room(request_, console, tmp_path, monkeypatch, streams):
    ours, plan = Session(request_.preset), make_plan(request_)
    ours.preset = replace(ours.preset, detail=replace(ours.preset.detail, streams=streams))
    proxy = pipeline.make_proxy(ours, plan, tmp_path / "kept", console)
    kept = latents(pipeline.refine(ours, plan, proxy, tmp_path / "kept", console))
    monkeypatch.setattr(pipeline, "placement_of", lambda plan: Placement("none", keeps=False))
    monkeypatch.setattr("atlasvid_cli.refine.proxy_context", lambda *given: pytest.fail("they were kept"))
    assert torch.equal(latents(pipeline.refine(ours, plan, proxy, tmp_path / "anew", console)), kept)


def test_the_preview_shows_of_the_proxy_what_the_video_will(session, request_, console, tmp_path):
    plan = make_plan(replace(request_, width=320, height=180))
    shown, whole = plan.proxy_size, plan.proxy.grid.w * plan.preset.geometry.token_pixels
    assert shown[0] < whole or shown[1] < plan.proxy.grid.h * plan.preset.geometry.token_pixels
    pipeline.make_proxy(session, plan, tmp_path / "run", console)
    preview = probe(tmp_path / "run" / "proxy.mp4")
    assert (preview["width"], preview["height"]) == tuple(side - side % 2 for side in shown)


@pytest.mark.parametrize(("width", "height"), [(64, 64), (333, 177), (96, 320)])
def test_odd_and_small_sizes(session, request_, console, tmp_path, width, height):
    plan = make_plan(replace(request_, width=width, height=height, seconds=Fraction(5, 16)))
    pipeline.render(session, plan, tmp_path, tmp_path / "a.mp4", console)
    found = probe(tmp_path / "a.mp4")
    assert (found["width"], found["height"], found["frames"]) == (width, height, 5)


def test_the_same_job_gives_the_same_bytes_and_another_chunk_the_same_latents(session, request_, console, tmp_path):
    for name, chunk in (("a", 4), ("b", 4), ("c", 1)):
        plan = make_plan(replace(request_, chunk=chunk))
        pipeline.render(session, plan, tmp_path / name, tmp_path / f"{name}.mp4", console)
    for file in ("proxy.safetensors", "detail.safetensors"):
        assert digest(tmp_path / "a" / file) == digest(tmp_path / "b" / file)
    assert digest(tmp_path / "a.mp4") == digest(tmp_path / "b.mp4")
    a, c = (latents(tmp_path / name / "detail.safetensors") for name in "ac")
    torch.testing.assert_close(a, c, atol=1e-5, rtol=0)


@pytest.mark.parametrize("saves", [1, 2, 4, 5, 6])
def test_a_killed_run_continues_to_the_same_bytes(session, request_, console, tmp_path, monkeypatch, saves):
    plan = make_plan(request_)
    pipeline.render(session, plan, tmp_path / "whole", tmp_path / "whole.mp4", console)
    save, count = tensor_file.save_state, 0

    def save_then_die(*arguments):
        nonlocal count
        save(*arguments)
        count += 1
        if count == saves:
            raise Killed

    monkeypatch.setattr(tensor_file, "save_state", save_then_die)
    with pytest.raises(Killed):
        pipeline.render(session, plan, tmp_path / "run", tmp_path / "a.mp4", console)
    monkeypatch.setattr(tensor_file, "save_state", save)
    pipeline.render(session, plan, tmp_path / "run", tmp_path / "a.mp4", console)
    for file in ("proxy.safetensors", "detail.safetensors"):
        assert digest(tmp_path / "run" / file) == digest(tmp_path / "whole" / file)
    assert digest(tmp_path / "a.mp4") == digest(tmp_path / "whole.mp4")


def test_refine_needs_no_prompt_and_a_region_leaves_the_rest(session, request_, console, tmp_path):
    proxy = pipeline.make_proxy(session, make_plan(request_), tmp_path, console)
    defaults = artefacts.request_defaults(proxy)
    assert defaults["seconds"] == 1 and defaults["seed"] == 3
    for width, height in ((256, 192), (512, 384)):
        plan = above.plan_from_proxy(proxy, replace(request_, width=width, height=height))
        result = pipeline.refine(session, plan, proxy, tmp_path / f"{width}", console)
        assert latents(result).shape[2:] == (height // 16, width // 16)
    again = replace(request_, width=512, height=384, region=(128, 128, 128, 128), frames=(4, 12), seed=9)
    plan = above.plan_from_proxy(proxy, again)
    # the finished video was made with another seed, which is in its own file
    first, redone = latents(result), latents(pipeline.refine(session, plan, proxy, tmp_path / "512", console))
    inside = torch.zeros_like(first, dtype=torch.bool)
    inside[:, 1:4, 8:16, 8:16] = True
    assert torch.equal(first[~inside], redone[~inside])
    assert (first - redone)[inside].abs().mean() > 0.01


def test_a_result_can_be_refined_further(session, request_, console, tmp_path):
    small = make_plan(request_)
    proxy = pipeline.make_proxy(session, small, tmp_path, console)
    result = pipeline.refine(session, small, proxy, tmp_path, console)
    plan = above.plan_from_proxy(result, replace(request_, width=512, height=384))
    upper = plan.preset.detail.upper  # what its adapter has seen above such latents
    assert [(s.time_ratio, s.strength, s.steps) for s in plan.levels] == [(1, upper.strength, upper.steps)]
    assert latents(pipeline.refine(session, plan, result, tmp_path / "up", console)).shape[2:] == (24, 32)


def test_latents_of_other_weights_are_refused(session, request_, console, tmp_path, monkeypatch):
    proxy = pipeline.make_proxy(session, make_plan(request_), tmp_path, console)
    monkeypatch.setattr(session, "model_hash", lambda stage: "0" * 16)
    with pytest.raises(InputError, match="model"):
        artefacts.read_latents(proxy, session)


def test_a_lora_above_a_proxy_that_was_made_without_makes_other_latents(
    session, request_, console, tmp_path, monkeypatch
):
    plan = make_plan(request_)
    proxy = pipeline.make_proxy(session, plan, tmp_path, console)
    known = artefacts.describe(proxy)
    plain = artefacts.result_metadata(session, plan, known)["key"]
    file = tmp_path / "style.safetensors"
    file.write_bytes(b"any")
    monkeypatch.setattr(session, "loras", (Lora(file),))
    assert artefacts.read_latents(proxy, session)[1] == known
    assert artefacts.result_metadata(session, plan, known)["key"] != plain


def test_a_run_of_another_job_is_left_alone(session, request_, console, tmp_path):
    """With --run-dir two jobs may meet; hours of latents are no less than a video. A damaged file is made anew."""
    plan, other = make_plan(request_), make_plan(replace(request_, seed=4))
    proxy = pipeline.make_proxy(session, plan, tmp_path, console)
    result = pipeline.refine(session, plan, proxy, tmp_path, console)
    before = digest(proxy), digest(result)
    with pytest.raises(UsageError, match="--run-dir"):
        pipeline.make_proxy(session, other, tmp_path, console)
    with pytest.raises(UsageError, match="--run-dir"):
        pipeline.refine(session, above.plan_from_proxy(proxy, other.request), proxy, tmp_path, console)
    assert (digest(proxy), digest(result)) == before
    result.write_bytes(result.read_bytes()[:-5])
    assert digest(pipeline.refine(session, plan, proxy, tmp_path, console)) == before[1]


def test_what_another_job_goes_on_from_is_left_alone(session, request_, console, tmp_path):
    plan, other = make_plan(request_), make_plan(replace(request_, seed=4))
    key = artefacts.proxy_metadata(session, plan)["key"]
    tensor_file.save_state(state := state_of(tmp_path / "proxy.safetensors"), 1, {"x": torch.zeros(2)}, key)
    before = digest(state)
    with pytest.raises(UsageError, match=r"proxy\.state.* is of another job; give another --run-dir"):
        pipeline.make_proxy(session, other, tmp_path, console)
    assert digest(state) == before and [*tmp_path.iterdir()] == [state]


def test_another_job_in_the_way_of_the_last_level_is_told_before_the_first(
    session, request_, console, tmp_path, monkeypatch
):
    proxy = pipeline.make_proxy(session, make_plan(request_), tmp_path, console)
    pipeline.refine(session, above.plan_from_proxy(proxy, request_), proxy, tmp_path, console)
    monkeypatch.setattr(pipeline, "_refine_level", lambda *a: pytest.fail("sampled"))
    larger = above.plan_from_proxy(proxy, replace(request_, width=1536, height=1152))
    assert len(larger.levels) > 1
    with pytest.raises(UsageError, match="--run-dir"):
        pipeline.refine(session, larger, proxy, tmp_path, console)


def test_a_video_that_does_not_fit_says_where_its_latents_are(session, request_, console, tmp_path, monkeypatch):
    def full(*_, **__):
        raise ResourceError("the disk is full: free some.")

    run, shown = tmp_path / "a run", pipeline.decode
    plan = make_plan(replace(request_, codec="hevc10"))
    proxy = pipeline.make_proxy(session, plan, run, console)
    monkeypatch.setattr(pipeline, "decode", full)
    with pytest.raises(ResourceError) as told:
        pipeline.render(session, plan, run, tmp_path / "a.mp4", console)
    again = shlex.split(str(told.value).split("by ")[1])
    assert again[:2] == ["atlasvid", "decode"] and again[2] == str(run / "detail.safetensors")
    told_of = dict(zip(again[3::2], again[4::2], strict=True))
    assert told_of == {"--codec": "hevc10", "--preset": request_.preset, "-o": "FILE"}
    assert proxy.exists()
    shown(session, Path(again[2]), tmp_path / "a.mp4", "h264", console)


@pytest.mark.parametrize("name", ["proxy.mp4", "proxy.safetensors", "detail.safetensors", "run.json"])
def test_a_file_of_the_users_is_left_alone(session, request_, console, tmp_path, name):
    """With --run-dir a run may lie in any folder: what no run has made is not taken for what one has."""
    mine = tmp_path / name
    if name == "proxy.mp4":
        frames = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        write_video(mine, iter(frames), width=64, height=64, fps=Fraction(8), frame_count=3)
    elif name == "run.json":
        mine.write_text('{"mine": true}')
    else:
        save_file({"weight": torch.ones(3)}, mine)
    before, plan = digest(mine), make_plan(request_)
    with pytest.raises(UsageError, match="--run-dir"):
        render_one(session, plan, tmp_path, tmp_path / "a.mp4", console)
    assert digest(mine) == before
    mine.unlink()
    assert render_one(session, plan, tmp_path, tmp_path / "a.mp4", console)["seconds"] > 0


def test_a_level_that_starts_from_pixels_is_bound_to_what_makes_them(
    random_preset, request_, console, tmp_path, monkeypatch
):
    """To the VAE and its tiles, and with an entry to that file's values."""
    shutil.copytree(random_preset.parent, tmp_path, dirs_exist_ok=True)
    preset = tmp_path / random_preset.name
    plan = make_plan(replace(request_, preset=str(preset)))
    run = tmp_path / "run"
    known = artefacts.describe(pipeline.make_proxy(Session(str(preset)), plan, run, console))
    stage = replace(plan.levels[0], strength=0.5)
    assert stage.entry
    starts = {
        "latents": replace(stage, upsample="latents", entry=None),
        "pixels": replace(stage, entry=None),
        "half": stage,
    }
    plans = {u: replace(plan, levels=(s, *plan.levels[1:])) for u, s in starts.items()}

    def keys():
        ours = Session(str(preset))
        job = artefacts.job_hash(ours, plan)
        made = {u: artefacts.level_metadata(ours, p, p.levels[0], known)["key"] for u, p in plans.items()}
        return made | {"job": job}

    def changed(folder):
        [file] = folder.glob("*.safetensors") if folder.is_dir() else [folder]
        before, tensors = keys(), load_file(file)
        metadata = tensor_file.read_header(file)[0]
        save_file({name: tensor + 1 for name, tensor in tensors.items()}, file, metadata)
        return {name for name, key in keys().items() if key != before[name]}

    assert len(set(keys().values())) == 4
    assert changed(preset.with_suffix("") / stage.entry) == {"half", "job"}
    assert changed(preset.with_suffix("") / "vae") == {"pixels", "half", "job"}
    whole = keys()
    monkeypatch.setattr(artefacts, "start_tile", lambda plan, stage: 8)  # a GPU with less memory
    assert {name for name, key in keys().items() if key != whole[name]} == {"pixels", "half", "job"}


def test_a_level_starts_from_frames_half_as_large_where_there_is_an_entry(session, request_, console, tmp_path):
    plan = make_plan(request_)
    below, _ = artefacts.read_latents(pipeline.make_proxy(session, plan, tmp_path, console), session)
    stage = plan.levels[0]
    without = replace(plan, levels=(replace(stage, entry=None), *plan.levels[1:]))
    made, whole = (
        pipeline._enlarged(session, p, p.levels[0], "detail", below, tmp_path, console) for p in (plan, without)
    )
    assert made.shape == whole.shape == (4, *(n * k for n, k in zip(astuple(stage.grid), (1, 2, 2), strict=True)))
    assert (made - whole).abs().max() > 1e-3
    cropped = crop_to_stage(below, stage, 2)
    size = stage.grid.h * 32, stage.grid.w * 32
    frames = 4 * (stage.grid.t - 1) + 1
    encoder = session.half_encoder(stage.entry)
    expected = enlarge(session.vae(), cropped, stage.ratio, stage.time_ratio, size, frames, encoder=encoder)
    assert torch.equal(made, expected)


def test_a_proxy_that_another_process_made_meanwhile_is_not_told_as_this_one(
    session, request_, console, tmp_path, monkeypatch
):
    plan, target, make = make_plan(request_), tmp_path / "p.safetensors", pipeline.make_proxy
    other = make(session, make_plan(replace(request_, prompt="a blue ball")), tmp_path / "other", console)

    def meanwhile(*arguments):
        made = make(*arguments)
        shutil.copy(other, target)
        return made

    monkeypatch.setattr(pipeline, "make_proxy", meanwhile)
    with pytest.raises(UsageError, match="meanwhile"):
        proxy_one(session, plan, tmp_path / "run", target, console)
    assert digest(target) == digest(other)


@pytest.mark.parametrize(
    ("made", "asked"), [((960, 540), (1280, 720)), ((960, 540), (1440, 810)), ((908, 412), (930, 422))]
)
@pytest.mark.parametrize("kind", ["proxy", "result"])
def test_a_refinement_at_another_size_shows_what_its_file_shows(made, asked, kind, monkeypatch):
    plan = make_plan(Request("tiny", *made, Fraction(2)))
    (width, height), grid, scale, fps = (
        (plan.proxy_size, plan.proxy.grid, 1, 4) if kind == "proxy" else (made, plan.target, plan.scale, 16)
    )
    known = {"width": str(width), "height": str(height), "scale": str(scale), "fps": str(fps)}
    monkeypatch.setattr(above, "describe", lambda path: known)
    monkeypatch.setattr(above, "latents_shape", lambda path: (grid.t, grid.h * 2, grid.w * 2))
    again = above.plan_from_proxy(tmp := Path("x"), Request("tiny", *made, Fraction(2)))
    assert again.proxy_size == (width * scale, height * scale)
    if kind == "proxy":
        assert [(s.grid, s.ratio) for s in again.levels] == [(s.grid, s.ratio) for s in plan.levels]
    shown = above.plan_from_proxy(tmp, Request("tiny", *asked, Fraction(2))).proxy_size
    for side, whole in zip(shown, (width * scale, height * scale), strict=True):
        assert 0.965 * whole <= side <= whole


@pytest.mark.parametrize("before", [True, False], ids=["while it was sampled", "while it was decoded"])
def test_a_video_that_another_process_made_meanwhile_is_kept(session, request_, console, tmp_path, monkeypatch, before):
    plan = make_plan(request_)
    run, video = tmp_path / "run", tmp_path / "a.mp4"
    proxy = pipeline.make_proxy(session, plan, run, console)
    result = pipeline.refine(session, plan, proxy, run, console)
    real = pipeline.decode_stream

    def finish_another():
        video.write_bytes((run / "proxy.mp4").read_bytes())

    def meanwhile(*arguments):
        yield from real(*arguments)
        finish_another()

    if before:
        finish_another()
    monkeypatch.setattr(pipeline, "decode_stream", lambda *a: iter(list(meanwhile(*a))))
    with pytest.raises(UsageError, match="--output"):
        pipeline.decode(session, result, video, "h264", console)
    assert digest(video) == digest(run / "proxy.mp4") and not list(tmp_path.glob(".*"))


def test_every_video_of_a_run_is_finished(session, request_, console, tmp_path, monkeypatch):
    plans = {name: make_plan(replace(request_, codec=codec)) for name, codec in (("a.mp4", "h264"), ("b.mkv", "ffv1"))}
    run = tmp_path / "run"
    for name, plan in plans.items():
        pipeline.render(session, plan, run, tmp_path / name, console)
    for name, plan in plans.items():
        event = pipeline.finished_video(session, plan, run, tmp_path / name)
        assert event["status"] == "skipped" and event["seconds"] > 0
        assert (event["video"], event["preview"]) == (str(tmp_path / name), str(sheet_of(tmp_path / name)))
        assert pipeline.finished_video(session, make_plan(replace(request_, seed=4)), run, tmp_path / name) is None
    monkeypatch.setattr(outputs, "vae_tile", lambda preset, h, w: 8)  # another GPU, or `decode_gib`
    assert pipeline.finished_video(session, plans["a.mp4"], run, tmp_path / "a.mp4") is None


def test_prompts_are_encoded_before_a_model_is_loaded(random_preset, request_, console, tmp_path, monkeypatch):
    """The two need not fit together."""
    order = []

    def watched(cache):
        ours = Session(str(random_preset), cache=tmp_path / cache)
        for name in ("encode", "_load"):
            real = getattr(ours, name)
            monkeypatch.setattr(ours, name, lambda *a, name=name, real=real: order.append(name) or real(*a))
        return ours

    plan = make_plan(request_)
    proxy = pipeline.make_proxy(watched("a"), plan, tmp_path, console)
    pipeline.refine(watched("b"), plan, proxy, tmp_path, console)
    assert order == ["encode", "_load", "_load", "encode", "_load"]  # autoguidance takes two models


def test_unknown_words_are_named(session, console, capsys):
    session.embeddings(("a red zebra",), console)
    assert "'zebra'" in capsys.readouterr().err


def test_a_result_is_refined_no_smaller_than_it_was_generated(session, request_, console, tmp_path):
    plan = make_plan(replace(request_, width=128, height=96))
    assert plan.scale > 1
    proxy = pipeline.make_proxy(session, plan, tmp_path, console)
    result = pipeline.refine(session, plan, proxy, tmp_path, console)
    size = f"{128 * plan.scale}x{96 * plan.scale}"
    with pytest.raises(UsageError, match=f"generated at {size}"):
        above.plan_from_proxy(result, replace(request_, width=192, height=144))
    large = replace(request_, width=128 * plan.scale, height=96 * plan.scale)
    assert above.plan_from_proxy(result, large).levels


def test_a_step_whose_values_are_not_finite_is_the_last(session, request_, console, tmp_path, monkeypatch):
    plan, forward, calls = make_plan(request_), proxy_module.clip_forward, []

    def fails(*arguments):
        calls.append(arguments)
        return forward(*arguments) * (1 if len(calls) == 1 else float("nan"))

    monkeypatch.setattr(proxy_module, "clip_forward", fails)
    with pytest.raises(RenderError, match="not finite"):
        pipeline.make_proxy(session, plan, tmp_path, console)
    assert len(calls) == plan.proxy.forwards(1) < plan.proxy.forwards()


def test_values_that_are_not_finite_are_never_saved(session, request_, console, tmp_path, monkeypatch):
    plan = make_plan(request_)
    proxy = pipeline.make_proxy(session, plan, tmp_path, console)
    sample = pipeline.sample_detail
    monkeypatch.setattr(pipeline, "sample_detail", lambda *a, **k: sample(*a, **k).fill_(float("nan")))
    with pytest.raises(RenderError, match="not finite"):
        pipeline.refine(session, plan, proxy, tmp_path, console)
    monkeypatch.undo()
    assert latents(pipeline.refine(session, plan, proxy, tmp_path, console)).isfinite().all()


def test_a_preview_is_never_of_an_earlier_proxy(session, request_, console, tmp_path, monkeypatch):
    other = make_plan(replace(request_, prompt="a blue star"))
    proxy = pipeline.make_proxy(session, make_plan(request_), tmp_path, console)
    proxy.write_bytes(b"damaged")
    with monkeypatch.context() as killed:
        killed.setattr(pipeline, "decode", lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pipeline.make_proxy(session, other, tmp_path, console)
    pipeline.make_proxy(session, other, tmp_path, console)
    assert probe(tmp_path / "proxy.mp4")["metadata"]["prompt"] == "a blue star"


def test_latents_that_do_not_say_what_they_are_are_refused(session, request_, console, tmp_path):
    path = pipeline.make_proxy(session, make_plan(request_), tmp_path, console)
    tensors, metadata = tensor_file.open_tensors(path)
    for field, value in (
        ("fps", None),
        ("width", "abc"),
        ("seconds", "1/0"),
        ("seconds", "1e999999999"),
        ("seconds", "999999"),
        ("fps", "1_0"),
        ("width", "99999"),
        ("scale", "0"),
        ("frames", "5/2"),
        ("key", None),
    ):
        changed = {k: v for k, v in {**metadata, field: value}.items() if v is not None}
        tensor_file.save_tensors(tmp_path / "x.safetensors", tensors, changed)
        with pytest.raises(InputError, match=f"does not say its {field}"):
            artefacts.describe(tmp_path / "x.safetensors")


def test_a_region_of_a_cascade_keeps_the_levels_below(session, request_, console, tmp_path):
    request = replace(request_, width=832, height=640, seconds=Fraction(5, 16))
    plan = make_plan(request)
    assert len(plan.levels) == 2
    proxy = pipeline.make_proxy(session, plan, tmp_path, console)
    first = latents(pipeline.refine(session, plan, proxy, tmp_path, console))
    level = digest(tmp_path / "level-1.safetensors")
    again = above.plan_from_proxy(proxy, replace(request, region=(64, 64, 128, 128), seed=9))
    key = artefacts.result_of_region(session, again, artefacts.describe(proxy), tmp_path)["key"]
    result = pipeline.refine(session, again, proxy, tmp_path, console)
    assert digest(tmp_path / "level-1.safetensors") == level
    assert artefacts.describe(result)["key"] == key
    assert torch.equal(latents(result)[:, :, 16:], first[:, :, 16:])


def test_a_clip_lies_in_the_proxy_where_the_video_will_show_it(session, request_, console, tmp_path):
    """What a proxy of a clip decodes to is the clip, at the proxy's instants, beside the margin that the grid adds."""
    colours = torch.rand(40, 3, 1, 1, generator=torch.Generator().manual_seed(0)).expand(-1, -1, 96, 128)
    write_video(tmp_path / "a.mp4", iter(colours), width=128, height=96, fps=20, frame_count=40)
    clip = open_clip(tmp_path / "a.mp4")
    plan = make_plan(replace(request_, width=256, height=144, seconds=clip.seconds, clip=clip))
    width, height = plan.proxy_size
    grid = plan.proxy.grid
    assert (width, height) != (grid.w * 32, grid.h * 32)
    made = latents(pipeline.make_proxy(session, plan, tmp_path / "run", console))
    instants = [min(round(k / 4 * 20), 39) for k in range((grid.t - 1) * 4 + 1)]
    frames = (
        torch.stack([torch.from_numpy(next(islice(read_frames(clip.path), i, None))[0, 0]) for i in instants]) / 127.5
        - 1
    )
    pixels = frames.T[:, :, None, None].expand(-1, -1, grid.h * 32, grid.w * 32).float()
    torch.testing.assert_close(made, encode_clips(session.vae(), pixels[None])[0], atol=0.02, rtol=0)


def test_the_key_of_a_clips_proxy_is_of_all_that_decides_it(session, request_, console, tmp_path, monkeypatch):
    for name, level in (("a", 0.2), ("b", 0.7)):
        frames = torch.full((8, 3, 96, 128), level)
        write_video(tmp_path / f"{name}.mp4", iter(frames), width=128, height=96, fps=16, frame_count=8)
    a, b = (replace(request_, clip=open_clip(tmp_path / f"{n}.mp4"), seconds=Fraction(1, 2)) for n in "ab")

    def key(request):
        run = tmp_path / artefacts.proxy_metadata(session, make_plan(request))["key"]
        path = pipeline.make_proxy(session, make_plan(request), run, console)
        return artefacts.describe(path)["key"]

    first = key(a)
    assert artefacts.proxy_metadata(session, make_plan(a))["below"] == ""  # where others name latents
    assert key(b) != first and key(replace(a, prompt="a ball")) != first
    assert key(replace(a, fps=32)) != first  # other instants
    assert key(replace(a, width=192, height=256)) != first  # another part of the picture
    monkeypatch.setattr(pipeline, "encode_stream", None)
    assert key(a) == first  # kept
    monkeypatch.setitem(session._hashes, "vae", "another VAE")
    with pytest.raises(TypeError):
        key(a)


def test_a_proxy_can_be_looked_at(session, request_, console, tmp_path):
    proxy = pipeline.make_proxy(session, make_plan(request_), tmp_path, console)
    pipeline.decode(session, proxy, tmp_path / "proxy.mp4", "h264", console)
    assert probe(tmp_path / "proxy.mp4")["fps"] == 4


def test_a_wrong_model_folder_is_named_before_loading(random_preset):
    with pytest.raises(InputError, match="dim"):
        Session("tiny", str(random_preset.with_suffix("")))


def test_each_stage_keeps_its_state_beside_its_latents(tmp_path):
    names = ("proxy", "level-1", "detail", "detail-region-a", "detail-region-b")
    assert len({state_of(tmp_path / f"{name}.safetensors") for name in names}) == len(names)
