"""Where outputs go."""

import os
from pathlib import Path

import pytest

from atlasvid_cli.errors import UsageError
from atlasvid_cli.targets import check_writable, is_folder, target_of


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


def test_standard_output_is_no_place_for_a_video():
    with pytest.raises(UsageError, match="name a file"):
        target_of("-", Path("a"), ".mp4")
    with pytest.raises(UsageError, match="name a file"):
        is_folder("-")


def test_a_pipe_is_no_place_for_a_video(tmp_path: Path):
    os.mkfifo(tmp_path / "a.mp4")
    with pytest.raises(UsageError, match="no regular file"):
        check_writable(tmp_path / "a.mp4")
    check_writable(tmp_path / "b.mp4")
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]
