"""What to train is refused with a remedy while nothing is loaded."""

import sys
from dataclasses import replace

import pytest
import torch

from atlasvid_cli import tensor_file
from atlasvid_cli.errors import UsageError
from atlasvid_cli.presets import load_preset
from atlasvid_cli.train_job import Job, check


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
