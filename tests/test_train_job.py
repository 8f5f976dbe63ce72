"""What to train is refused with a remedy while nothing is loaded."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from atlasvid_cli import session, tensor_file
from atlasvid_cli.cli_train import train_part
from atlasvid_cli.errors import InputError, UsageError
from atlasvid_cli.presets import load_preset
from atlasvid_cli.train_job import Job, check, check_files, check_output


@pytest.fixture
def job(tmp_path):
    return Job("detail", tmp_path, tmp_path / "a.safetensors", tmp_path)


@pytest.fixture(scope="module")
def preset(random_preset):
    return load_preset(str(random_preset))


@pytest.fixture(scope="module")
def experts(experts_preset):
    preset = load_preset(str(experts_preset))
    return replace(preset, detail=replace(preset.detail, proxy_attention=True))


def test_whom_to_train_is_said(preset, experts, job):
    for of, wrong, said in (
        (preset, replace(job, stage="proxy", expert="low"), "one transformer"),
        (experts, replace(job, stage="proxy"), "--expert high or low"),
        (experts, replace(job, expert="high"), "low noise alone"),
    ):
        with pytest.raises(UsageError, match=said):
            check(of, wrong)


def test_an_output_that_holds_something_else_is_not_overwritten(preset, job, tmp_path):
    (tmp_path / "folder.safetensors").mkdir()
    tensor_file.save_tensors(tmp_path / "other.safetensors", {"x": torch.zeros(1)}, {})
    for name, said in (("a.pt", ".safetensors"), ("folder.safetensors", "exists"), ("other.safetensors", "exists")):
        with pytest.raises(UsageError, match=said):
            check(preset, replace(job, output=tmp_path / name))


def test_an_output_of_other_settings_is_known_before_its_clips_are(tmp_path):
    """One of an older version says nothing of its settings, and is known by its run."""
    new, old = tmp_path / "new.safetensors", tmp_path / "old.safetensors"
    tensor_file.save_tensors(new, {"x": torch.zeros(1)}, {"run": "a", "settings": "b"})
    tensor_file.save_tensors(old, {"x": torch.zeros(1)}, {"run": "a"})
    for path in (new, old):
        for known in (None, {"settings": "b"}, {"settings": "b", "run": "a"}):
            check_output(path, known)
        with pytest.raises(UsageError, match="made from something else"):
            check_output(path, {"settings": "b", "run": "c"})
    with pytest.raises(UsageError, match="made from something else"):
        check_output(new, {"settings": "c"})
    check_output(old, {"settings": "c"})


@pytest.fixture
def clips(tmp_path):
    folder = tmp_path / "clips"
    folder.mkdir()
    for name in ("a.mp4", "a.txt"):
        (folder / name).write_text(name)
    return folder


@pytest.mark.parametrize(
    "stage, given, error, said",
    [
        ("proxy", {"data": Path("absent")}, InputError, "absent cannot be read"),
        ("proxy", {"data": Path("index.jsonl")}, InputError, "line 1 is not an entry"),
        ("proxy", {"data": Path("empty")}, InputError, "no clip with a caption"),
        ("proxy", {"data": Path("world"), "preset": "wan2.1-1.3b"}, UsageError, "give a folder of clips"),
        ("detail", {"data": Path("clips"), "preset": "other.toml"}, InputError, "the adapter absent.safetensors"),
    ],
)
def test_what_cannot_be_read_is_said_before_anything_is_made_or_fetched(
    random_preset, clips, tmp_path, monkeypatch, console, stage, given, error, said
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(session, "Session", lambda *_: pytest.fail("weights were looked for"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "index.jsonl").write_text("no entry")
    text = random_preset.read_text().replace('"proxy_lora.safetensors"', '"absent.safetensors"')
    (tmp_path / "other.toml").write_text(text.replace('"random"', f'"{random_preset.parent / "random"}"'))
    there = sorted(tmp_path.rglob("*"))
    with pytest.raises(error, match=said):
        train_part(stage, Path("work"), None, given, console)
    assert sorted(tmp_path.rglob("*")) == there


def test_what_is_there_passes(preset, clips, job, capsys):
    """And whoever takes the clips says which are left out."""
    (clips / "b.mp4").write_text("without a caption")
    check_files(preset, replace(job, data=clips), None)
    check_files(preset, replace(job, data=Path("world")), None)
    later = replace(preset, proxy=replace(preset.proxy, lora="later.safetensors"))
    check_files(later, replace(job, data=clips, stage="proxy"), None)  # what it makes
    assert capsys.readouterr().err == ""


def test_a_detail_adapter_needs_attention_to_the_proxy(preset, job):
    with pytest.raises(UsageError, match="proxy_attention"):
        check(replace(preset, detail=replace(preset.detail, proxy_attention=False)), job)


def test_a_detail_adapter_needs_the_proxys_first_where_times_are_stretched(preset, experts, job):
    """Of two experts that of the one that makes its proxies; at the video's own rate the base knows all times."""

    def of_proxy(preset, **proxy):
        return replace(preset, proxy=replace(preset.proxy, **proxy))

    for bare, said in (
        (of_proxy(preset, lora=None), r"no lora below \[proxy\].* train proxy first"),
        (of_proxy(experts, time_ratio=4, lora="a"), r"no lora below \[experts\].* train proxy --expert low first"),
    ):
        with pytest.raises(UsageError, match=said):
            check(bare, job)
        assert check(of_proxy(bare, time_ratio=1, lora=None), job).lora is None
        check(bare, replace(job, stage="proxy", expert="low" if bare.experts else None))
    assert check(preset, job).lora == preset.proxy.lora
    filled = replace(experts, experts=replace(experts.experts, lora="b"))
    assert check(of_proxy(filled, time_ratio=4), job).lora == "b"


def test_an_optimizer_that_is_not_there_is_said(preset, job, monkeypatch):
    monkeypatch.setitem(sys.modules, "prodigyopt", None)
    with pytest.raises(UsageError, match="pip install prodigyopt"):
        check(replace(preset, training=replace(preset.training, optimizer="prodigy")), job)
