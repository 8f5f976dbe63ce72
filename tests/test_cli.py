"""The commands as their users meet them: exit codes, stdout, batches, kills."""

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import weakref
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from atlasvid_cli import __version__, cli, session, store, tensor_file
from atlasvid_cli.extend import extended
from atlasvid_cli.footage import open_clip
from atlasvid_cli.video import probe, write_video
from atlasvid_cli.world import render, sample_scene
from tests.test_footage import write

RENDER = ["--res", "256x192", "--seconds", "0.5"]
OPTIONS = {
    "render": "--attention-backend --compile --lora --offload --weight-dtype --strict"
    " --chunk --codec --debug --dry-run --flow-shift --fps --from-video --guidance-scale --json --model-path"
    " --negative-prompt --output --preset --prompt-file --res --run-dir --sampler --seconds --seed --shard --steps",
    "proxy": "--attention-backend --compile --lora --offload --weight-dtype --strict"
    " --debug --dry-run --flow-shift --fps --from-video --guidance-scale --json --model-path --negative-prompt --output"
    " --preset --prompt-file --res --sampler --seconds --seed --shard --steps",
    "refine": "--attention-backend --compile --lora --offload --weight-dtype --strict"
    " --chunk --codec --debug --dry-run --flow-shift --fps --frames --guidance-scale --json --model-path --output"
    " --preset --region --res --run-dir --seed --steps",
    "decode": "--codec --debug --json --model-path --output --preset",
    "plan": "--offload --weight-dtype --vram-gib --chunk --codec --debug --fps --guidance-scale --json --preset --res"
    " --seconds --steps",
    "bench": "--ablation --budget-seconds --count --debug --html --json --large --model-path --output --preset"
    " --quality --quick --repeats --res --seconds --seeds --steps",
    "train": "--data --debug --expert --lr --model-path --output --preset --rank --seed --steps --work",
    "presets": "--debug --json",
    "info": "--debug --json",
    "doctor": "--debug --json",
}


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Runs a command in this process, in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["atlasvid", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        return stop.value.code, out, err

    before = signal.getsignal(signal.SIGTERM)
    yield run
    signal.signal(signal.SIGTERM, before)


def world(path, fps, count):
    """A clip of the embedded world, 320x180."""
    scene = sample_scene(random.Random(0), 16 / 9, 3.0)
    frames = (render(scene, torch.arange(count) / fps, 180, 320).transpose(0, 1) + 1) / 2
    write_video(path, iter(frames), width=320, height=180, fps=fps, frame_count=count)


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("command", OPTIONS)
def test_the_options_are_frozen(command):
    import typer

    found = typer.main.get_command(cli.app).commands[command].params  # type: ignore[attr-defined]
    names = {o for p in found for o in p.opts if o.startswith("--") and o != "--help"}
    assert names == set(OPTIONS[command].split())


def test_the_command_line_imports_nothing_heavy():
    code = "import sys, atlasvid_cli.cli; print([m for m in ('torch', 'diffusers', 'av', 'numpy') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["render", ""], 2, "prompt is empty"),
        (["render"], 2, "either a prompt"),
        (["render", "x", "--res", "0x0"], 2, "--res"),
        (["render", "x", "--res", "banana"], 2, "--res"),
        (["render", "x", "--res", "4001x3"], 2, "--res"),
        (["render", "x", "--seconds", "-1"], 2, "--seconds"),
        (["render", "x", "--seconds", "nan"], 2, "--seconds"),
        (["render", "x", "--seconds", "0"], 2, "--seconds"),
        (["render", "x", "--guidance-scale", "nan"], 2, "--guidance-scale"),
        (["render", "x", "--preset", "nope"], 2, "preset"),
        (["render", "x", "--codec", "divx"], 2, "codec"),
        (["render", "x", "--bogus"], 2, "--bogus"),
        (["render", "x", "--prompt-file", "-"], 2, "either a prompt"),
        (["render", "x", "--shard", "1/2"], 2, "--prompt-file"),
        (["render", "x", "--shard", ""], 2, "--prompt-file"),  # of an unset variable
        (["render", "--prompt-file", "absent.txt", "--seconds", ""], 2, "--seconds"),
        (["refine", "absent.safetensors", "--region", ""], 2, "--region"),
        (["refine", "absent.safetensors", "--frames", ""], 2, "--frames"),
        (["render", "x", "--flow-shift", "0"], 2, "--flow-shift"),
        (["render", "x", "--guidance-scale", "0.5"], 2, "--guidance-scale"),
        (["render", "x", "--fps", "120", "--seconds", "600"], 2, "fewer --seconds"),
        (["render", "x", "--attention-backend", "_native_cudnn"], 2, "cannot run here"),
        (["render", "a \udcff ball"], 2, "UTF-8"),
        (["render", "x", "--negative-prompt", "a \0 ball"], 2, "UTF-8"),
        (["render", "--prompt-file", "-", "--negative-prompt", "a \0 ball"], 2, "UTF-8"),
        (["render", "--prompt-file", "-", "--shard", "0/8"], 2, "--shard"),  # and stdin is not read
        (["render", "x", "--run-dir", ""], 2, "--run-dir is empty"),
        (["render", "x", "--run-dir", "job", "-o", "job/proxy.mp4"], 2, "preview of the run"),
        (["render", "x", "--run-dir", "job", "-o", "job/proxy.mp4", "--dry-run"], 2, "preview of the run"),
        (["render", "--prompt-file", "absent.txt"], 3, "absent.txt"),
        (["render", "--prompt-file", "/dev/null"], 3, "holds no prompts"),
        (["render", "a", "red", "ball"], 2, "put a prompt in quotes (see atlasvid render --help)"),
        (["plan", "a", "ball"], 2, "(a ball) (see atlasvid plan --help)"),
        (["render", "--res"], 2, "(see atlasvid render --help)"),
        (["--bogus", "render"], 2, "(see atlasvid --help)"),
        (["render", "x", "-o", ""], 2, "--output is empty"),
        (["refine", "absent.safetensors", "-o", ""], 2, "--output is empty"),
        (["render", "x", "--lora", "absent.safetensors"], 3, "names no file"),
        (["render", "x", "--model-path", "./absent"], 3, "absent does not exist"),
        (["render", "x", "--model-path", "absent"], 3, "absent"),
        (["proxy", "--from-video", "absent.mp4"], 3, "absent.mp4"),
        (["render", "x", "--from-video", "absent.mp4"], 3, "absent.mp4"),
        (["proxy", "--from-video", "absent.mp4", "--prompt-file", "-"], 2, "--prompt-file"),
        (["proxy", "--from-video", "absent.mp4", "--steps", "3"], 2, "--steps"),
        (["proxy", "--from-video", "absent.mp4", "--sampler", "euler"], 2, "--sampler"),
        (["refine", "absent.safetensors"], 3, "absent.safetensors"),
        (["info", "absent"], 3, "absent"),
        (["info", 300 * "a"], 3, "File name too long"),
        (["render", "x", "-o", 300 * "a" + ".mp4"], 4, "File name too long"),
        (["render", "x", "-o", 245 * "a" + ".mp4"], 4, "File name too long"),  # of its contact sheet
        (["proxy", "x", "-o", 300 * "a"], 4, "File name too long"),
        (["train", "wan"], 2, "train tiny"),
        (["bench", "--res", "banana"], 2, "--res"),
        (["bench", "--preset", "nope"], 2, "preset"),
        (["bench", "--repeats", "0"], 2, "--repeats"),
        (["bench", "--count", "3"], 2, "--quality"),
        (["bench", "--budget-seconds", "nan"], 2, "--budget-seconds"),
        (["bench", "--html", "report.txt"], 2, "report.html"),
        (["bench", "--quick", "--model-path", "absent"], 3, "absent"),
        (["train", "tiny", "--steps", "3"], 2, "--steps"),
        (["train", "tiny", "--preset", "wan2.1-1.3b"], 2, "--preset"),
        (["train", "proxy"], 2, "--data"),
        (["train", "proxy", "--data", "absent", "--preset", "nope"], 2, "preset"),
        (["train", "proxy", "--data", "absent", "--lr", "nan"], 2, "--lr"),
        (["train", "proxy", "--data", "absent"], 3, "absent cannot be read"),
        (["frobnicate"], 2, "frobnicate"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(run, tmp_path, arguments, code, said):
    found, out, err = run(*arguments)
    assert found == code
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and said in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stderr", ["&-", "/dev/full"])
@pytest.mark.parametrize("arguments", [["render", ""], ["render", "", "--debug"], []])
def test_an_error_is_no_data_and_keeps_its_code_where_stderr_takes_nothing(stderr, arguments):
    command = [sys.executable, "-m", "atlasvid_cli", *arguments]
    done = subprocess.run(["sh", "-c", f'"$@" 2>{stderr}', "sh", *command], stdout=subprocess.PIPE)
    assert (done.returncode, done.stdout) == (2, b"")


@pytest.mark.parametrize(
    "command",
    [["info", "there"], ["proxy", "--from-video", "there"], ["train", "proxy", "--data", "there"]],
)
def test_a_file_that_may_not_be_read_is_bad_input_and_no_bad_usage(run, tmp_path, monkeypatch, command):
    """Whoever reads it says so, as of a damaged one; root may read everything."""
    (tmp_path / "there").write_text("")
    monkeypatch.setattr("os.access", lambda *_, **__: False)
    code, _, err = run(*command)
    assert code == 3 and "there" in err


def test_an_unwritable_output_is_said_before_any_work(run, random_preset, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("atlasvid_cli.session.Session.of", lambda *_: pytest.fail("weights were looked for"))
    code, _, err = run("render", "a ball", *RENDER, "--preset", random_preset, "-o", tmp_path / "file" / "a.mp4")
    assert code == 4 and "cannot be written" in err


def test_an_unwritable_run_directory_is_said_before_any_work(run, random_preset, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    assert run("proxy", "a red ball", *RENDER, "--preset", random_preset, "-o", "p.safetensors")[0] == 0
    monkeypatch.setattr("atlasvid_cli.session.Session.of", lambda *_: pytest.fail("weights were looked for"))
    for command in (["render", "a ball", *RENDER], ["refine", "p.safetensors", *RENDER[:2]]):
        code, _, err = run(*command, "--preset", random_preset, "--run-dir", tmp_path / "file" / "run")
        assert code == 4 and "cannot be written" in err and "--run-dir" in err


@pytest.mark.parametrize("kind", ["render", "proxy", "refine"])
def test_a_run_that_another_process_holds_is_left_alone(run, random_preset, tmp_path, kind):
    own = ["--preset", random_preset]
    proxy = ["proxy", "a red ball", *RENDER, *own, "-o", "p.safetensors"]
    assert run(*proxy)[0] == 0
    [job] = (tmp_path / "runs").iterdir()
    commands = {
        "render": ["render", "a red ball", *RENDER, *own, "--run-dir", job],
        "proxy": proxy,
        "refine": ["refine", "p.safetensors", *RENDER[:2], *own, "--run-dir", job],
    }
    if kind == "proxy":
        (tmp_path / "p.safetensors").unlink()
    for file in list(job.iterdir()):
        file.unlink()
    with store.lock(job):
        code, out, err = run(*commands[kind])
    assert (code, out) == (4, "") and "in use by another" in err
    assert [path.name for path in job.iterdir()] == [".lock"] and not list(tmp_path.glob("*.mp4"))


def test_too_little_memory_is_said_before_loading(run, monkeypatch):
    monkeypatch.setattr("atlasvid_cli.cost.available_ram", lambda: 1 << 28)
    monkeypatch.setattr("atlasvid_cli.session.Session", None)
    code, _, err = run("render", "a red ball", "--res", "4k", "--seconds", "12")
    assert code == 4 and "memory" in err


def test_an_unknown_preset_key_is_named(run, random_preset):
    bad = random_preset.with_name("bad.toml")
    bad.write_text(random_preset.read_text().replace("min_ratio", "minimal_ratio"))
    code, _, err = run("render", "x", "--preset", bad)
    assert code == 2 and "minimal_ratio" in err


def test_plan_counts_before_anything_loads(run):
    code, out, _ = run("plan", "--res", "3840x2160", "--seconds", "12", "--json")
    rows = {r["stage"]: r for r in json.loads(out)["rows"]}
    assert code == 0
    assert rows["proxy"]["tokens"] == 13 * 84 and rows["detail 2/2"]["tokens"] == 49 * 68 * 120
    assert run("render", "a red ball", "--res", "7680x4320", "--seconds", "12", "--dry-run")[0] == 0


def test_a_plan_is_data_and_says_what_does_not_fit(run, monkeypatch):
    code, out, err = run("plan", "--res", "960x540")
    assert code == 0 and "windows" in out and "detail 1/1" in out and not err
    monkeypatch.setattr("atlasvid_cli.cost.available_ram", lambda: 1 << 20)
    code, out, err = run("plan", "--res", "960x540", "--json")
    assert code == 0 and json.loads(out)["fits"] is False and "of memory and" in err


def test_a_plan_advises_no_option_that_it_lacks(run, monkeypatch):
    monkeypatch.setattr("atlasvid_cli.cost.disk_of", lambda folder: (1, 1000))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    code, _, err = run("plan", "--res", "960x540")
    assert code == 0 and err.count("\n") == 1 and err.endswith("free; free some space\n")


def test_a_dry_run_says_what_the_prompts_are_taken_as(run):
    prompt = ["a red ball", "--seed", "3", "--negative-prompt", "blur"]
    code, out, _ = run("render", *prompt, *RENDER, "--dry-run", "--json")
    asked = json.loads(out)["request"]
    assert code == 0 and (asked["prompt"], asked["negative_prompt"]) == (extended("a red ball", 3), "blur")


def test_a_plan_says_of_a_vae_without_room_that_it_does_not_fit(run, random_preset):
    tight = random_preset.with_name("tight.toml")
    tight.write_text(random_preset.read_text().replace("decode_gib = 3.0", "decode_gib = 0.0001"))
    code, out, err = run("plan", "--preset", tight, "--res", "960x540", "--json")
    assert code == 0 and json.loads(out)["fits"] is False and "decode_gib" in err


def test_a_clips_proxy_is_planned_without_sampling(run, tmp_path):
    world(tmp_path / "c.mp4", 20, 30)
    command = ["proxy", "--from-video", "c.mp4", "--seconds", "1", "--dry-run"]
    code, out, err = run(*command)
    assert code == 0 and "encode" in out and "detail" not in out and not err
    assert [row["stage"] for row in json.loads(run(*command, "--json")[1])["rows"]] == ["encode", "preview"]


def test_a_plan_for_another_gpu_has_its_memory_and_no_times(run):
    command = ["plan", "--preset", "wan2.1-1.3b", "--res", "4k", "--seconds", "12", "--vram-gib"]
    code, out, err = run(*command, "16")
    assert code == 0 and not err and "VRAM" in out and "time" not in out and "--offload none, a GPU of 16 GiB" in out
    found = json.loads(run(*command, "5", "--json")[1])
    assert not found["fits"] and found["offload"] == "host" and found["rows"][0]["seconds"] is None
    for wrong in ("nan", "0"):
        code, _, err = run(*command, wrong)
        assert code == 2 and "--vram-gib" in err


def test_a_dry_run_warns_of_a_place_that_cannot_be_written(run, random_preset, tmp_path, monkeypatch):
    assert run("proxy", "a red ball", *RENDER, "--preset", random_preset, "-o", "p.safetensors")[0] == 0
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    for command in (["render", "a red ball"], ["refine", "p.safetensors"]):
        code, _, err = run(*command, *RENDER[:2], "--preset", random_preset, "--dry-run", "-o", "new/a.mp4")
        assert code == 0 and f"{tmp_path / 'new'} cannot be written; choose another --output" in err


def test_a_dry_run_of_a_batch_plans_all_of_it_and_looks_at_its_names(run, tmp_path):
    (tmp_path / "p.txt").write_text("a red ball\na blue star\n")
    code, out, _ = run("render", "--prompt-file", "p.txt", *RENDER, "--dry-run", "--json")
    assert code == 0 and json.loads(out)["videos"] == 2
    code, out, err = run("render", "--prompt-file", "p.txt", *RENDER, "--shard", "3/3")
    assert code == 0 and not out and "no prompt falls to this shard" in err
    code, _, err = run("render", "--prompt-file", "p.txt", *RENDER, "--dry-run", "-o", "x.mp4")
    assert code == 2 and "folder" in err and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--lora", "no.safetensors", "no.safetensors cannot be read"),
        ("--model-path", "nowhere", "nowhere does not exist"),
        ("--attention-backend", "quick", "quick"),
    ],
)
def test_a_dry_run_refuses_what_a_render_would(run, random_preset, tmp_path, option, value, said):
    (tmp_path / "no.safetensors").write_bytes(b"not safetensors")
    assert run("proxy", "a red ball", *RENDER, "--preset", random_preset, "-o", "p.safetensors")[0] == 0
    for command in ("render", "a red ball"), ("refine", "p.safetensors"):
        code, _, err = run(*command, *RENDER[:2], "--preset", random_preset, "--dry-run", option, value)
        assert code in (2, 3) and said in err, err


def test_latents_of_other_weights_are_refused_before_a_run_is_there(run, random_preset, tmp_path):
    assert run("proxy", "a red ball", *RENDER, "--preset", random_preset, "-o", "p.safetensors")[0] == 0
    shutil.rmtree(tmp_path / "runs")
    tensors, metadata = tensor_file.open_tensors(tmp_path / "p.safetensors")
    tensor_file.save_tensors(tmp_path / "other.safetensors", tensors, metadata | {"model": 16 * "0"})
    half = {"latents": tensors["latents"].half()}
    tensor_file.save_tensors(tmp_path / "half.safetensors", half, metadata)
    for name, said in (("other", "says model"), ("half", "F16")):
        for more in ([], ["--dry-run"]):
            code, _, err = run("refine", f"{name}.safetensors", *RENDER[:2], "--preset", random_preset, *more)
            assert code == 3 and said in err and not (tmp_path / "runs").exists(), err
    code, _, err = run("refine", "p.safetensors", *RENDER[:2])
    assert code == 3 and "give it by --preset" in err


def test_latents_of_another_preset_are_refused_at_once(run, random_preset, tmp_path, monkeypatch):
    assert run("proxy", "a red ball", *RENDER, "--preset", random_preset, "-o", "p.safetensors")[0] == 0
    for command in ("refine", "decode"):
        code, _, err = run(command, "p.safetensors", "--preset", "wan2.1-1.3b")
        assert code == 3 and "made with preset random" in err and "leave --preset out" in err


def test_render_prints_the_path_and_a_second_time_skips(run, random_preset, tmp_path, monkeypatch):
    prompt = "a red ball moving left over blue hills"
    arguments = ["render", prompt, *RENDER, "--preset", random_preset, "-o", "clip.mp4"]
    code, out, _ = run(*arguments)
    assert code == 0 and out.strip() == str(tmp_path / "clip.mp4")
    before = (tmp_path / "clip.mp4").stat().st_mtime_ns
    code, out, _ = run(*arguments, "--json")
    assert code == 0 and json.loads(out)["status"] == "skipped"
    assert (tmp_path / "clip.mp4").stat().st_mtime_ns == before
    code, _, err = run(*arguments, "--seed", "5")
    assert code == 2 and "clip.mp4 exists" in err and len(list((tmp_path / "runs").iterdir())) == 1
    with monkeypatch.context() as patch:
        patch.setattr("atlasvid_cli.cost.available_ram", lambda: 1 << 28)
        assert run(*arguments)[0] == 0 and run(*arguments[:-1], "other.mp4")[0] == 4
    code, out, _ = run("info", "clip.mp4", "--json")
    assert json.loads(out)["metadata"]["prompt"] == prompt


def test_a_batch_passes_over_a_failing_item(run, random_preset, tmp_path, monkeypatch):
    from atlasvid_cli import pipeline
    from atlasvid_cli.errors import RenderError

    render, held, freed = pipeline.render, [], []

    def fail_on_two(session, plan, *rest):
        if plan.request.prompt == "two":
            model = torch.nn.Linear(1, 1)
            held.append(weakref.ref(model))
            raise RenderError("no two today")
        freed.extend(ref() is None for ref in held)
        return render(session, plan, *rest)

    monkeypatch.setattr(pipeline, "render", fail_on_two)
    (tmp_path / "prompts.txt").write_text("a red ball\n\ntwo\na blue star\n")
    arguments = ["render", "--prompt-file", "prompts.txt", *RENDER, "--preset", random_preset, "-o", "out", "--json"]
    code, out, err = run(*arguments)
    events = [json.loads(line) for line in out.splitlines()]
    assert code == 1 and "1 of 3" in err
    assert [e["status"] for e in events] == ["ok", "failed", "ok"]
    assert [e["seed"] for e in events] == [0, 1, 2] and events[1]["video"] is None
    assert freed == [True]  # what failed keeps nothing in memory
    assert [e["prompt"] for e in events] == ["a red ball", "two", "a blue star"]  # as they were given
    assert [e.get("taken_as", e["prompt"]) for e in events] == [extended(e["prompt"], e["seed"]) for e in events]
    names = ["0000-a-red-ball-0.mp4", "0002-a-blue-star-2.mp4"]
    assert sorted(path.name for path in (tmp_path / "out").glob("*.mp4")) == names
    assert "1 of 3 prompts failed; the same command tries them again" in err
    _, out, _ = run(*arguments, "--shard", "2/2")
    assert [json.loads(line)["id"] for line in out.splitlines()] == ["0001-two"]
    code, _, err = run(*arguments, "--shard", "1/3", "--steps", "1")  # another video of that name
    assert code == 1 and "1 of 1 prompts failed; each says above what to change" in err
    code, out, _ = run(*arguments, "--shard", "1/3", "--seed", "7")
    assert code == 0 and json.loads(out)["video"] == str(tmp_path / "out" / "0000-a-red-ball-7.mp4")
    assert "Traceback" not in err and "fail_on_two" in run(*arguments, "--shard", "2/2", "--debug")[2]


def test_items_of_a_batch_have_their_own_seeds_and_prompts_encoded_together(run, random_preset, tmp_path, monkeypatch):
    monkeypatch.setenv("ATLASVID_CACHE", str(tmp_path / "cache"))
    loads, load, encoded, encode = [], session.load_text, [], session.encode_prompts
    monkeypatch.setattr(session, "load_text", lambda *a: loads.append(a) or load(*a))
    monkeypatch.setattr(session, "encode_prompts", lambda p, *a: encoded.extend(p) or encode(p, *a))
    scenes = [f"a {colour} ball moving right over a green checkerboard" for colour in ("red", "blue", "white")]
    lines = [
        {"prompt": scenes[0], "seed": 7, "negative_prompt": "stripes", "output": "in/a"},
        {"prompt": scenes[1], "negative_prompt": "hills", "output": "b"},
    ]
    batch = tmp_path / "p.jsonl"
    batch.write_text("\n".join(map(json.dumps, lines)))
    command = ["proxy", "--prompt-file", batch, *RENDER, "--preset", random_preset, "--seed", "4", "-o", "out"]
    code, _, err = run(*command)
    assert code == 0, err
    known = [tensor_file.read_header(path)[0] for path in tmp_path.rglob("runs/*/proxy.safetensors")]
    found = {tuple(k[name] for name in ("prompt", "seed", "negative_prompt")) for k in known}
    assert found == {(scenes[0], "7", "stripes"), (scenes[1], "5", "hills")}
    assert len(loads) == 1 and sorted(encoded) == sorted([*scenes[:2], "stripes", "hills"])
    encoded.clear()
    shutil.rmtree(tmp_path / "cache")
    batch.write_text("\n".join(map(json.dumps, [*lines, {"prompt": scenes[2], "negative_prompt": "hills"}])))
    assert run(*command)[0] == 0
    assert sorted(encoded) == sorted([scenes[2], "hills"])  # nothing of what is made


def test_a_batch_stops_where_a_library_made_an_error_of_an_interruption(run, random_preset, tmp_path, monkeypatch):
    from atlasvid_cli import pipeline

    made = []

    def stopped(*_):
        made.append(1)
        os.kill(os.getpid(), signal.SIGTERM)
        try:
            time.sleep(10)
        except KeyboardInterrupt:
            raise RuntimeError("an extension's own") from None

    monkeypatch.setattr(pipeline, "render", stopped)
    (tmp_path / "prompts.txt").write_text("a red ball\na blue star\n")
    code, _, err = run("render", "--prompt-file", "prompts.txt", *RENDER, "--preset", random_preset)
    assert (code, len(made)) == (130, 1) and "run the same command again" in err


def test_tiny_is_trained_by_one_process(run, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = run("train", "tiny")
    assert code == 2 and "accelerate" in err and not list(tmp_path.iterdir())


def test_bench_writes_one_json_object_and_a_page(run, random_preset, tmp_path, monkeypatch):
    monkeypatch.setattr("atlasvid_cli.arms.WARM_UP", (256, 192))
    size = ["--res", "256x192", "--seconds", "0.25", "--steps", "2"]
    code, out, err = run("bench", "--quick", "--preset", random_preset, *size, "--json", "--html", "report.html")
    assert code == 0, err
    found = json.loads(out)
    assert found["frames"] == 4 and found["steps"] == 2 and found["model"] == "random" and found["speedup"] > 0
    assert "native" in err and "projection error" in err
    assert found["baseline"] in (tmp_path / "report.html").read_text()


def test_proxy_then_refine_then_region_then_decode(run, random_preset, tmp_path, monkeypatch):
    code, out, err = run("proxy", "a red ball", *RENDER, "--preset", random_preset, "-o", "p.safetensors")
    assert code == 0 and out.strip() == str(tmp_path / "p.safetensors")
    known = json.loads(run("info", "p.safetensors", "--json")[1])["metadata"]
    assert known["prompt"] == extended("a red ball", 0) and known["kind"] == "proxy"
    assert f"'a red ball' leaves parts of the scene out and is taken as {known['prompt']!r}" in err
    [folder] = (tmp_path / "runs").iterdir()
    assert json.loads(run("info", folder, "--json")[1])["run"]["proxy.safetensors"] == known
    refine = ["refine", "p.safetensors", "--preset", random_preset, "--json"]
    for res in ("256x192", "448x336"):
        code, out, _ = run(*refine, "--res", res)
        event = json.loads(out)
        assert code == 0 and event["video"] == str(tmp_path / f"p-{res}.mp4")
        record = json.loads((Path(event["run_dir"]) / "run.json").read_text())
        assert record["stage_seconds"].keys() == {"detail", "decode"} and record["event"]["video"] == event["video"]
        assert "proxy" not in record["weights"] and record["stages"][0]["stage"].startswith("detail 1/")
        with monkeypatch.context() as patch:  # a finished one needs neither work nor room
            patch.setattr("atlasvid_cli.pipeline.read_latents", None)
            patch.setattr("atlasvid_cli.cost.available_ram", lambda: 1 << 28)
            assert json.loads(run(*refine, "--res", res)[1]) == event | {"status": "skipped"}
        assert (event["prompt"], event["seed"], Path(event["preview"]).exists()) == (known["prompt"], 0, True)
    first = json.loads(out)["latents"]
    region = ["--res", "448x336", "--region", "64,64,128,128", "--frames", "0:4"]
    code, out, err = run(*refine, *region, "--seed", "9", "-o", "part.mp4")
    assert code == 0 and "much as it was" not in err
    again = json.loads(run(*refine, *region, "--seed", "9", "-o", "part.mp4")[1])
    assert again == json.loads(out) | {"status": "skipped"}
    code, _, err = run(*refine, *region)
    assert code == 0 and "much as it was; give another --seed" in err
    decode = ["decode", first, "--preset", random_preset, "--codec", "ffv1", "-o", "again.mkv", "--json"]
    assert json.loads(run(*decode)[1]) == {"video": str(tmp_path / "again.mkv"), "status": "ok"}
    with monkeypatch.context() as patch:  # nor does this
        patch.setattr("atlasvid_cli.decode_cost.available_ram", lambda: 1 << 28)
        assert json.loads(run(*decode)[1]) == {"video": str(tmp_path / "again.mkv"), "status": "skipped"}
    decode[decode.index("ffv1")] = "hevc10"
    code, _, err = run(*decode)
    assert code == 2 and "the same video in ffv1" in err
    assert json.loads(run("info", "again.mkv", "--json")[1])["codec"] == "ffv1"
    with monkeypatch.context() as patch:
        patch.setattr("atlasvid_cli.decode_cost.available_ram", lambda: 1 << 28)
        patch.setattr("atlasvid_cli.session.Session", None)
        code, _, err = run("decode", first, "--preset", random_preset, "-o", "third.mp4")
    assert code == 4 and "decoding needs" in err and not (tmp_path / "third.mp4").exists()
    code, _, err = run(*refine, "--res", "448x336", "--frames", "4:400")
    assert code == 2 and "--frames" in err
    code, _, err = run(*refine, "--res", "336x448")
    assert code == 2 and "--res 4" in err
    code, _, err = run("refine", first, "--preset", random_preset, "--res", "256x192")
    assert code == 2 and "larger than 256x192" in err


def test_a_proxy_whose_run_was_deleted_is_not_sampled_again(run, random_preset, tmp_path):
    command = ["proxy", "a red ball", *RENDER, "--preset", random_preset, "-o", "p.safetensors"]
    assert run(*command)[0] == 0
    before = digest(tmp_path / "p.safetensors")
    shutil.rmtree(tmp_path / "runs")
    code, _, err = run(*command)
    assert code == 0 and "proxy: " not in err and digest(tmp_path / "p.safetensors") == before
    assert [p.name for p in tmp_path.glob("runs/*/proxy.mp4")] == ["proxy.mp4"]


def test_a_region_is_of_the_video_of_its_seed_or_of_the_proxys(run, random_preset, tmp_path):
    assert run("proxy", "a red ball", *RENDER, "--preset", random_preset, "-o", "p.safetensors")[0] == 0
    refine = ["refine", "p.safetensors", "--preset", random_preset, "--res", "256x192", "--json"]
    made = {seed: json.loads(run(*refine, "--seed", seed)[1])["latents"] for seed in ("0", "7")}
    for seed, of in (("7", "7"), ("8", "0")):
        code, out, err = run(*refine, "--seed", seed, "--region", "0,0,64,64", "-o", f"part{seed}.mp4")
        assert code == 0 and Path(json.loads(out)["latents"]).parent == Path(made[of]).parent, err
        assert ("much as it was" in err) == (seed == of)
        assert str(Path(made[of]).parent) in err


def test_names_with_a_colon_are_files(run, random_preset, tmp_path):
    world(tmp_path / "shot:1.mp4", 16, 8)
    assert json.loads(run("info", "shot:1.mp4", "--json")[1])["frames"] == 8
    arguments = ["--from-video", "shot:1.mp4", "--res", "256x192", "--preset", random_preset, "-o", "p.safetensors"]
    assert run("proxy", *arguments)[0] == 0


def test_a_proxy_that_is_there_is_skipped(run, random_preset, tmp_path):
    command = ["proxy", "a red ball", *RENDER, "--preset", random_preset, "-o", "p.safetensors", "--json"]
    assert [json.loads(run(*command)[1])["status"] for _ in range(2)] == ["ok", "skipped"]


def test_results_of_other_settings_have_runs_of_their_own(run, random_preset, tmp_path):
    assert run("proxy", "a red ball", *RENDER, "--preset", random_preset, "-o", "p.safetensors")[0] == 0
    refine = ["refine", "p.safetensors", "--preset", random_preset, "--res", "256x192", "--json"]
    made = {}
    for steps in ("1", "2"):
        code, out, err = run(*refine, "--steps", steps, "-o", f"{steps}.mp4")
        assert code == 0, err
        made[steps] = Path(json.loads(out)["latents"])
    assert made["1"] != made["2"]
    before = digest(made["1"])
    code, out, err = run(*refine, "--steps", "1", "-o", "1.mp4")
    assert code == 0 and json.loads(out)["latents"] == str(made["1"]) and "detail" not in err
    part = ["--region", "0,0,64,64", "-o", "part.mp4"]
    code, out, err = run(*refine, "--steps", "1", *part)
    assert code == 0 and str(tmp_path / "runs") in out and digest(made["1"]) == before, err
    there = sorted(tmp_path.rglob("*"))
    code, _, err = run(*refine, "--steps", "3", *part)
    assert code == 3 and "without --region first" in err and sorted(tmp_path.rglob("*")) == there


def test_a_region_of_what_render_made_is_redone_in_its_run(run, random_preset, tmp_path):
    command = [*RENDER, "--preset", random_preset]
    code, out, _ = run("render", "a red ball", *command, "-o", "a.mp4", "--json")
    folder = json.loads(out)["run_dir"]
    refine = ["refine", f"{folder}/proxy.safetensors", "--preset", random_preset, "--res", "256x192"]
    code, out, err = run(*refine, "--region", "0,0,64,64", "-o", "b.mp4", "--json")
    assert code == 0 and os.path.dirname(json.loads(out)["latents"]) == folder, err


def test_the_version_is_that_of_the_package(run):
    assert run("--version") == (0, f"{__version__}\n", "")


def test_help_comes_without_arguments_too(run):
    code, _, err = run()
    assert code == 2 and "Commands:" in err and len(err.splitlines()) > 10


def test_targets_of_a_batch_that_clash_are_refused_before_anything(run, random_preset, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "output": "v"}\n{"prompt": "b", "output": "v.mp4"}\n')
    code, _, err = run("render", "--prompt-file", "p.jsonl", *RENDER, "--preset", random_preset)
    assert code == 2 and "would both be" in err and not (tmp_path / "v.mp4").exists()
    code, _, err = run("render", "--prompt-file", "p.jsonl", *RENDER, "--preset", random_preset, "--shard", "1/2")
    assert code == 2 and "would both be" in err  # though each is of another job
    (tmp_path / "file").write_text("")
    code, _, err = run("render", "--prompt-file", "p.jsonl", "-o", "file", *RENDER, "--preset", random_preset)
    assert code == 2 and "is a file" in err
    code, _, err = run("render", "--prompt-file", "p.jsonl", "-o", "v.mkv", *RENDER, "--preset", random_preset)
    assert code == 2 and "need a folder" in err
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "output": "v.webm"}\n')
    code, out, err = run("render", "--prompt-file", "p.jsonl", *RENDER, "--preset", random_preset)
    assert code == 2 and "v.webm" in err and out == ""  # before the first is made
    code, _, err = run("proxy", "a red ball", *RENDER, "-o", "p.mp4")
    assert code == 2 and ".safetensors" in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "p.jsonl"]


def test_paths_that_are_no_text_are_written_and_told(random_preset, tmp_path):
    command = [
        sys.executable,
        "-m",
        "atlasvid_cli",
        "render",
        "a",
        *RENDER,
        "--preset",
        random_preset,
        "-o",
        b"b\xff.mp4",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True)
    assert done.returncode == 0 and done.stdout.endswith(b"b\xff.mp4\n"), done.stderr
    assert (tmp_path / os.fsdecode(b"b\xff.mp4")).exists()
    done = subprocess.run([*command, "--json"], cwd=tmp_path, capture_output=True)
    assert done.returncode == 0 and json.loads(done.stdout)["status"] == "skipped"


def test_a_refused_render_leaves_the_run_of_the_video_alone(run, random_preset, tmp_path):
    """Other weights are another job: it is refused for the video's sake before it samples anything."""
    command = ["render", "a red ball", *RENDER, "--preset", random_preset, "-o", "a.mp4"]
    assert run(*command)[0] == 0
    before = {p: digest(p) for p in (tmp_path / "runs").rglob("*") if p.is_file()}
    code, _, err = run(*command, "--weight-dtype", "fp8")
    assert code == 2 and "--output" in err and "proxy:" not in err
    assert {p: digest(p) for p in before} == before
    assert json.loads(run(*command, "--json")[1])["status"] == "skipped"


def test_a_clip_becomes_the_proxy_and_gives_its_length(run, random_preset, tmp_path):
    world(tmp_path / "My clip.mp4", 20, 30)
    arguments = ["proxy", "--from-video", "My clip.mp4", "--res", "256x192", "--preset", random_preset]
    code, out, err = run(*arguments)
    assert code == 0 and out.strip() == str(tmp_path / "my-clip-0.safetensors"), err
    known = json.loads(run("info", "my-clip-0.safetensors", "--json")[1])["metadata"]
    assert (known["prompt"], known["seconds"], known["fps"]) == ("", "3/2", "4")
    code, out, _ = run("refine", "my-clip-0.safetensors", "--res", "256x192", "--preset", random_preset, "--json")
    assert code == 0 and probe(tmp_path / "my-clip-0-256x192.mp4")["frames"] == 24
    code, out, err = run(*arguments[:1], "a red ball", *arguments[1:], "--seconds", "0.5", "-o", "b.safetensors")
    known = json.loads(run("info", "b.safetensors", "--json")[1])["metadata"]
    assert code == 0 and (known["prompt"], known["seconds"]) == ("a red ball", "1/2")


def test_render_takes_a_clip_too(run, random_preset, tmp_path):
    world(tmp_path / "a.mp4", 16, 8)
    arguments = ["render", "--from-video", "a.mp4", "--res", "256x192", "--preset", random_preset, "--json"]
    code, out, err = run(*arguments)
    assert code == 0 and json.loads(out)["video"] == str(tmp_path / "a-0.mp4"), err
    assert json.loads(run(*arguments)[1])["status"] == "skipped"


def test_a_clip_whose_container_rounds_its_length_down_is_as_long_as_it_was_made(run, tmp_path):
    clip = write(tmp_path / "a.mkv", [np.zeros((64, 64, 3), np.uint8)] * 96, rate=24)
    assert open_clip(clip).seconds < 4
    code, _, err = run("render", "--from-video", "a.mkv", "--seconds", "4", "--dry-run")
    assert code == 0, err


def test_what_a_clip_cannot_give_is_said_before_anything_loads(run, tmp_path, monkeypatch):
    monkeypatch.setattr("atlasvid_cli.session.Session", None)
    world(tmp_path / "a.mp4", 16, 8)
    code, _, err = run("proxy", "--from-video", "a.mp4", "--seconds", "2")
    assert code == 3 and "lasts 0.5 s and not 2 s" in err
    monkeypatch.setattr("atlasvid_cli.request.MAX_SECONDS", 0.25)
    code, _, err = run("proxy", "--from-video", "a.mp4")
    assert code == 2 and "--seconds" in err


@contextmanager
def files_limited_to(size):
    """What a full disk or a quota does: files cannot grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_told_and_leaves_nothing_half_written(run, random_preset, tmp_path):
    command = ["render", "a red ball", *RENDER, "--preset", random_preset, "-o", "a.mp4", "--json"]
    with files_limited_to(1 << 12):
        code, out, err = run(*command)
    assert code == 4 and "full" in err and not out
    code, out, _ = run(*command)
    assert code == 0
    [kept] = tmp_path.glob("runs/*/detail.safetensors")
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    with files_limited_to(1 << 12):
        code, _, err = run("decode", kept, "--preset", random_preset, "--codec", "ffv1", "-o", "b.mkv")
    assert code == 4 and "full" in err
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == before


def render_command(random_preset, folder):
    return [sys.executable, "-m", "atlasvid_cli.cli", "render", "a red ball", "--preset", str(random_preset),
            "--res", "448x256", "--seconds", "2", "-o", str(folder / "a.mp4")]  # fmt: skip


ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def whole(random_preset, tmp_path_factory):
    """The folder of a render that was never killed."""
    folder = tmp_path_factory.mktemp("whole")
    subprocess.run(render_command(random_preset, folder), env=ONE_THREAD, check=True, capture_output=True)
    return folder


def test_a_run_killed_by_the_system_in_every_stage_continues_to_the_same_bytes(random_preset, whole, tmp_path):
    command = render_command(random_preset, tmp_path)
    for stage in ("proxy.state", "detail.state", "detail.safetensors"):
        process = subprocess.Popen(command, env=ONE_THREAD, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if list(tmp_path.glob(f"runs/*/{stage}*")):
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.002)
        process.wait()
        assert not (tmp_path / "a.mp4").exists(), "the run ended before it could be killed"
    subprocess.run(command, env=ONE_THREAD, check=True, capture_output=True)
    for file in ("a.mp4", "runs/*/proxy.safetensors", "runs/*/detail.safetensors"):
        killed, never = (next(folder.glob(file)) for folder in (tmp_path, whole))
        assert digest(killed) == digest(never)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_that_a_library_turns_into_an_error_is_one(run, monkeypatch, number):
    def load(standalone_mode):
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt:
            raise OSError("cannot be read") from None

    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(cli, "app", load)
    try:
        code, _, err = run("render", "x")
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    assert code == 130 and "run the same command again" in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_how_to_go_on(random_preset, tmp_path, number):
    command = [sys.executable, "-m", "atlasvid_cli.cli", "render", "a red ball", "--preset", str(random_preset)]
    process = subprocess.Popen(
        [*command, "--res", "1280x720", "--seconds", "4"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background shell has it ignored
    )
    while process.poll() is None and not list(tmp_path.glob("runs/*/proxy.safetensors")):
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "run the same command again" in err
