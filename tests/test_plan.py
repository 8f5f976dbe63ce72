"""Resources are refused before anything loads, each on the disk that it will be written to."""

from fractions import Fraction

import pytest

from atlasvid_cli import plan as planning
from atlasvid_cli.errors import ResourceError
from atlasvid_cli.plan import VIDEO_BYTES, Request, make_plan
from atlasvid_cli.video import CODECS


def job(codec="h264"):
    return make_plan(Request("tiny", 3840, 2160, Fraction(12), codec=codec))


def test_every_codec_has_an_estimate():
    assert VIDEO_BYTES.keys() == CODECS.keys()


@pytest.mark.parametrize(("full", "option"), [("videos", "--output"), ("runs", "--run-dir")])
def test_each_disk_is_asked_for_what_goes_there(tmp_path, monkeypatch, full, option):
    monkeypatch.setattr(planning, "disk_of", lambda p: (p.name == "runs", 1000 if p.name == full else 1 << 50))
    monkeypatch.setattr(planning, "available_ram", lambda: 1 << 40)
    with pytest.raises(ResourceError, match=option):
        job("prores").check_resources(tmp_path / "videos", tmp_path / "runs")


def test_one_disk_is_asked_for_both(tmp_path, monkeypatch):
    plan = job("prores")
    needed = sum(row["disk_bytes"] for row in plan.rows())
    monkeypatch.setattr(planning, "available_ram", lambda: 1 << 40)
    monkeypatch.setattr(planning, "disk_of", lambda p: (1, needed - 1))
    with pytest.raises(ResourceError, match="free"):
        plan.check_resources(tmp_path)
    monkeypatch.setattr(planning, "disk_of", lambda p: (1, needed))
    plan.check_resources(tmp_path)


def test_a_folder_that_is_not_there_yet_is_on_its_parents_disk(tmp_path):
    assert planning.disk_of(tmp_path / "a" / "b")[0] == tmp_path.stat().st_dev


def test_too_little_memory_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "available_ram", lambda: 1 << 28)
    with pytest.raises(ResourceError, match="memory"):
        job().check_resources(tmp_path)
