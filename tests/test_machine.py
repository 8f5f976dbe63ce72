"""What a container allows is what there is."""

from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from atlasvid_cli import machine
from atlasvid_cli.errors import UsageError


def test_a_containers_limit_bounds_the_memory(monkeypatch, tmp_path):
    whole = machine.available_ram()
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    monkeypatch.setattr(machine, "OWN_CGROUPS", tmp_path / "own")
    assert machine.available_ram() > whole / 2  # no cgroups
    (tmp_path / "own").write_text("0::/slice/job/step\n")
    for place, limit in {"slice/job/step": "max", "slice/job": "9000", "slice": "50000"}.items():
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
        files = {"max": limit, "current": "5000", "stat": "anon 3000\ninactive_file 1000\nactive_file 500"}
        for name, text in files.items():
            (tmp_path / place / f"memory.{name}").write_text(text)
    assert machine.available_ram() == 9000 - 5000 + 1500  # that of a group above
    assert machine.total_ram() == 9000
    (tmp_path / "slice" / "job" / "memory.max").write_text("max")
    (tmp_path / "slice" / "memory.max").write_text("max")
    assert machine.available_ram() > whole / 2


def test_a_limit_of_the_first_version_of_cgroups_bounds_it_too(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    monkeypatch.setattr(machine, "OWN_CGROUPS", tmp_path / "own")
    (tmp_path / "own").write_text("5:cpu,cpuacct:/a\n4:cpuset,memory:/docker/0f\n0::/\n")
    (tmp_path / "memory").mkdir()  # in a container its own group is mounted as the root
    files = {
        "limit_in_bytes": "8000",
        "usage_in_bytes": "3000",
        "stat": "total_inactive_file 100\ntotal_active_file 10",
    }
    for name, text in files.items():
        (tmp_path / "memory" / f"memory.{name}").write_text(text)
    assert machine.available_ram() == 8000 - 3000 + 110


@pytest.mark.parametrize("rate", [partial(machine.gemm_rate, 64), partial(machine.conv_rate, torch.float32)])
def test_a_rate_is_flops_over_seconds(rate, ticks, monkeypatch):
    monkeypatch.setattr(machine, "synchronize", lambda: ticks(0.5))  # once a run
    with FlopCounterMode(display=False) as counter:
        found = rate()
    assert found == counter.get_total_flops() / 4 / 0.5  # a warm-up and three


def test_the_peak_is_in_bytes():
    machine.reset_peak()
    before = machine.peak_bytes()
    torch.ones(1 << 26)
    assert before + (1 << 27) < machine.peak_bytes() < before + (1 << 30)


def test_a_gpu_without_bfloat16_is_refused_with_the_way_round_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    with pytest.raises(UsageError, match=r"Tesla T4 .* CUDA_VISIBLE_DEVICES="):
        machine.compute_device.__wrapped__()
