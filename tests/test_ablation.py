"""Every arm makes its video, differs from the others by what it leaves out, and is looked at once."""

import dataclasses
import json
from fractions import Fraction

import numpy as np
import pytest
import torch

from atlasvid_cli import ablation, ablation_arms, machine, quality, session
from atlasvid_cli.artefacts import describe
from atlasvid_cli.console import Console
from atlasvid_cli.errors import UsageError
from atlasvid_cli.machine import machine_with_gpu
from atlasvid_cli.plan import Request, make_plan
from atlasvid_cli.presets import load_preset
from atlasvid_cli.video import read_frames

QUIET = Console(interactive=False)


@pytest.fixture(scope="module")
def request_of(random_preset):
    return Request(str(random_preset), 200, 120, Fraction(1))


@pytest.fixture(scope="module")
def found(request_of, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ablation")
    return folder, ablation.run(request_of, 1, 2, 600.0, folder, QUIET)


def test_every_arm_is_there_with_its_columns(found):
    _, table = found
    names = [row["arm"].removesuffix(" (untrained)") for row in table["arms"]]
    assert names == [
        "a true render through the VAE",
        "upsampled proxy",
        *ablation_arms.SAMPLED,
        "native full attention",
    ]
    assert [n for n, row in zip(names, table["arms"], strict=True) if row["coherence_db"] is None] == [
        names[0],
        names[-1],
    ]
    assert table["prompts"] == 1 and table["seeds"] == 2


def test_sampled_arms_differ_and_share_their_proxies(found):
    folder, _ = found
    videos = {p.parent.name: next(read_frames(p)).tobytes() for p in folder.glob("*/0.mp4")}
    assert len(set(videos.values())) == len(videos) == len(ablation_arms.SAMPLED) + 3
    keys = {p.parent.parent.name: describe(p)["key"] for p in folder.glob("*/0/proxy.safetensors")}
    assert set(keys) == {"proxy", "proxy-unscaled"}
    below = {p.parent.parent.name: describe(p)["below"] for p in folder.glob("*/0/level-1.safetensors")}
    assert below.pop("without-scaled-time") == keys["proxy-unscaled"]
    assert set(below.values()) == {keys["proxy"]}


def test_seconds_and_memory_are_those_of_a_video_and_its_proxy(found):
    folder, table = found
    rows = {row["arm"].removesuffix(" (untrained)"): row for row in table["arms"]}
    for arm, with_proxy in ((ablation_arms.WHOLE, True), (ablation_arms.NATIVE, False)):
        own = [json.loads(p.read_text()) for p in sorted((folder / arm.replace(" ", "-")).glob("*.json"))]
        below = [json.loads(p.read_text()) for p in sorted((folder / "proxy").glob("*.json"))] if with_proxy else []
        assert len(own) == 2 and len(below) in (0, 2)
        spent = [a["seconds"] + (b["seconds"] if with_proxy else 0) for a, b in zip(own, below or own, strict=True)]
        assert rows[arm]["seconds"] == round(float(np.median(spent)), 1)
        assert rows[arm]["peak_gib"] == round(max(job["peak_bytes"] for job in own + below) / 2**30, 2)


def test_what_was_made_is_kept_also_with_more_seeds(found, request_of, monkeypatch):
    folder, table = found
    monkeypatch.setattr(ablation_arms.pipeline, "refine", lambda *a: pytest.fail("refined again"))
    monkeypatch.setattr(ablation_arms, "WanPipeline", lambda *a: pytest.fail("native again"))
    assert ablation.run(request_of, 1, 2, 600.0, folder, QUIET) == table
    fewer = ablation.run(request_of, 1, 1, 600.0, folder, QUIET)
    assert fewer["arms"][0]["spread"] is None


def test_native_beyond_the_budget_is_projected(found, request_of, monkeypatch):
    folder, table = found
    monkeypatch.setattr(ablation_arms, "WanPipeline", lambda *a: pytest.fail("native made a video"))
    assert ablation.run(request_of, 1, 2, 1e-9, folder, QUIET) == table  # what is made is kept
    made = folder / "native-full-attention" / "0.json"
    record = made.read_text()
    made.write_text(json.dumps({**json.loads(record), "job": "another"}))
    *others, native = ablation.run(request_of, 1, 2, 1e-9, folder, QUIET)["arms"]
    made.write_text(record)
    assert others == table["arms"][:-1] and native["arm"] == "native full attention (projected)"
    assert native.keys() == others[0].keys() and native["seconds"] > 0
    assert all(value is None for name, value in native.items() if name not in ("arm", "seconds"))


def test_what_an_interrupted_run_left_is_made_anew(tmp_path):
    work, made = tmp_path / "7", tmp_path / "7.mp4"
    seen = []

    def make():
        seen.append(sorted(p.name for p in work.iterdir()))
        (work / "left").touch()
        if len(seen) == 1:
            raise KeyboardInterrupt
        made.touch()

    with pytest.raises(KeyboardInterrupt):
        ablation._timed(work, made, "a job", lambda: None, make)
    for job, runs in (("a job", 2), ("a job", 2), ("another", 3)):
        ablation._timed(work, made, job, lambda: None, make)
        assert seen == [[]] * runs


def test_a_proxy_is_timed_with_its_models_loaded_and_its_prompt_encoded(request_of, tmp_path, monkeypatch):
    arm = next(ablation_arms.arms(request_of, QUIET))
    monkeypatch.setattr(arm.session, "_cache_folder", tmp_path / "cache")
    loaded, timed = [], []
    make = ablation.pipeline.make_proxy
    for name in ("load_transformer", "load_vae", "load_text"):
        load = getattr(session, name)
        monkeypatch.setattr(session, name, lambda *a, load=load, name=name: loaded.append(name) or load(*a))

    def make_proxy(*arguments):
        before = len(loaded)
        made = make(*arguments)
        timed.append(loaded[before:])
        return made

    monkeypatch.setattr(ablation.pipeline, "make_proxy", make_proxy)
    [(prompt, attributes)] = quality.held_out_prompts(1)
    plan = make_plan(dataclasses.replace(request_of, prompt=prompt))
    ablation.look(arm, plan, attributes, tmp_path, QUIET)
    assert timed == [[]] and sorted(set(loaded)) == ["load_text", "load_transformer", "load_vae"]


def test_on_a_gpu_the_peak_is_of_its_memory(tmp_path, monkeypatch):
    peak = [0]
    monkeypatch.setattr(machine, "compute_device", lambda: machine_with_gpu(8).device)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: peak.__setitem__(0, 5))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: peak[0])
    made = tmp_path / "7.mp4"
    seconds, found = ablation._timed(tmp_path / "7", made, "a job", lambda: None, made.touch)
    assert found == 5 and ablation._timed(tmp_path / "7", made, "a job", lambda: None, made.touch) == (seconds, 5)


def test_the_upsampled_proxy_is_the_proxy_in_large(found, request_of):
    folder, _ = found
    plan = make_plan(dataclasses.replace(request_of, seed=0))
    large = quality.frames_at(folder / "upsampled-proxy" / "0.mp4", quality.looked_at(plan))
    assert large[0].shape == (120, 200, 3)
    proxy = quality.proxy_frames(plan, folder / "proxy" / "0" / "proxy.mp4")
    assert quality.coherence(plan, large, proxy) > max(20, quality.coherence(plan, large[::-1], proxy) + 1)


def test_tiles_see_no_border_beyond_their_own():
    preset = ablation_arms.SAMPLED["tiles, each alone"][0](load_preset("tiny"))
    assert not preset.detail.proxy_attention
    plan = make_plan(Request("tiny", 960, 540, Fraction(4)), preset=preset)
    assert quality.token_borders(plan)[0] == ([160, 352], [224, 480, 704])


def test_columns_are_means_over_prompts_and_spread_over_seeds():
    def seen(right, repetition=0, seconds=1.0):
        flags = {"colour": right, "shape": right}
        return ablation.Seen(
            quality.Assessment(flags, repetition, *np.array([[2.0, 1.0], [3.0, 2.0]]), 30.0, None), seconds, 2**30
        )

    row = ablation.summary([[seen(True), seen(True)], [seen(False, 2), seen(True, -1, 9.0)]])
    assert (row["adherence_percent"], row["spread"]) == (75.0, 35.4)
    assert (row["missing_percent"], row["repeated_percent"], row["seam"], row["edge_width_px"]) == (25, 25, 2.0, None)
    assert row["seam_within"] == 1.5
    assert (row["seconds"], row["peak_gib"]) == (1.0, 1.0)


def test_a_terminal_of_80_columns_shows_every_column_whole(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    numbers = {"adherence_percent": 91.7, "spread": 14.4, "missing_percent": 100, "repeated_percent": 100, "seam": 1.44}
    numbers |= {"seam_chance": 0.21, "coherence_db": 34.3, "edge_width_px": 13.4, "seconds": 104.2, "peak_gib": 11.01}
    arm = {"arm": max(ablation_arms.SAMPLED, key=len) + " (untrained)", **numbers}
    Console(interactive=False).table("", [ablation.row(arm)])
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.split()[-7:] == ["92±14", "100/100", "1.44±0.2", "34.3", "13.4", "104.2", "11.0"]


def test_another_world_is_refused(stock_preset):
    with pytest.raises(UsageError, match=r"--ablation .* tiny only"):
        ablation.run(Request(str(stock_preset), 200, 120, Fraction(1)), 1, 1, 600.0, None, QUIET)


def test_one_video_of_each_arm_may_be_larger(request_of, tmp_path, monkeypatch):
    monkeypatch.setattr(ablation_arms, "SAMPLED", {ablation_arms.WHOLE: ablation_arms.SAMPLED[ablation_arms.WHOLE]})
    large = dataclasses.replace(request_of, width=328, height=200)
    table = ablation.run(request_of, 1, 1, 600.0, tmp_path, QUIET, large)
    assert table["large"]["size"] == "328x200"
    assert [a["arm"] for a in table["large"]["arms"]] == [a["arm"] for a in table["arms"]]
    made = tmp_path / "large" / "the-full-method" / "0.mp4"
    assert next(read_frames(made)).shape[:2] == (200, 328)
    assert ablation.row(table["large"]["arms"][2])["s"]
