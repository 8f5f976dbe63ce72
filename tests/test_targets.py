"""Where outputs go."""

import os
from pathlib import Path

import pytest

from atlasvid_cli.errors import UsageError
from atlasvid_cli.targets import check_apart, check_writable, is_folder, may_write, target_of


@pytest.mark.parametrize(
    ("output", "found"),
    [
        (None, "wan2.1-64x64.mp4"),
        ("a.mov", "a.mov"),
        ("a", "a.mp4"),
        ("folder", "folder/wan2.1-64x64.mp4"),
        ("folder/b", "folder/b.mp4"),
        ("new/", "new/wan2.1-64x64.mp4"),
    ],
)
def test_an_output_has_the_suffix_it_needs_and_may_be_a_folder(tmp_path: Path, monkeypatch, output, found):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    assert target_of(output, Path("wan2.1-64x64"), ".mp4") == tmp_path / found


def test_a_place_is_looked_at_without_trying_it(tmp_path: Path, monkeypatch):
    (tmp_path / "file").touch()
    assert may_write(tmp_path / "new" / "deeper") and not may_write(tmp_path / "file" / "below")
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    assert not may_write(tmp_path / "new" / "deeper") and not (tmp_path / "new").exists()


def test_standard_output_is_no_place_for_a_video():
    with pytest.raises(UsageError, match="name a file"):
        target_of("-", Path("a"), ".mp4")
    with pytest.raises(UsageError, match="name a file"):
        is_folder("-")


def test_what_is_written_lies_behind_a_link(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "old.mp4").touch()
    (tmp_path / "folder").symlink_to("there")
    for name, at in (("a.mp4", "there/old.mp4"), ("b.mp4", "there/new.mp4"), ("there/c.mp4", "../c.mp4")):
        (tmp_path / name).symlink_to(at)
    found = [target_of(output, Path("c"), ".mp4") for output in ("a", "b.mp4", "there", "folder/d")]
    assert found == [tmp_path / name for name in ("there/old.mp4", "there/new.mp4", "c.mp4", "folder/d.mp4")]


def test_what_is_there_and_no_file_gets_no_suffix(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for name in ("pipe", "link"):
        with pytest.raises(UsageError, match=rf"{name} is no regular file; choose another --output"):
            target_of(str(tmp_path / name), Path("a"), ".mp4")
    (tmp_path / "file").touch()
    assert target_of(str(tmp_path / "file"), Path("a"), ".mp4") == tmp_path / "file.mp4"


def test_a_pipe_is_no_place_for_a_video(tmp_path: Path):
    os.mkfifo(tmp_path / "a.mp4")
    with pytest.raises(UsageError, match="no regular file"):
        check_writable(tmp_path / "a.mp4")
    check_writable(tmp_path / "b.mp4")
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_a_video_is_not_its_runs_preview(tmp_path: Path):
    (tmp_path / "link").symlink_to("job")
    for run_dir in ("job", "link"):
        with pytest.raises(UsageError, match=r"preview of the run; choose another"):
            check_apart(tmp_path / "job" / "proxy.mp4", tmp_path / run_dir)
        check_apart(tmp_path / "job" / "a.mp4", tmp_path / run_dir)
    check_apart(tmp_path / "proxy.mp4", None)
