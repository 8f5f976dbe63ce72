"""Files are whole or absent, and a run directory has one process at a time."""

import errno
import json
import os
import subprocess
import sys
import threading
from fractions import Fraction
from pathlib import Path

import pytest

from atlasvid_cli import store
from atlasvid_cli.errors import ResourceError, UsageError


def test_failed_writes_leave_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.json"
    store.write_json(path, {"seconds": Fraction(25, 2), "name": "é"})
    before = path.read_bytes()
    assert json.loads(before) == {"seconds": "25/2", "name": "é"}

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match=r"run\.json cannot be written because the disk is full"):
        store.write_json(path, {})
    monkeypatch.undo()
    with pytest.raises(ZeroDivisionError), store.atomic(path):
        raise ZeroDivisionError
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with store.atomic(path) as slow:
        slow.write(b"A" * 8)

        def write() -> None:
            with store.atomic(path) as fast:
                fast.write(b"BBBB")

        thread = threading.Thread(target=write)
        thread.start()
        thread.join()
        assert path.read_bytes() == b"BBBB"
        slow.write(b"A" * 8)
    assert path.read_bytes() == b"A" * 16
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_writer_left_goes_with_the_next_write(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with store.atomic(path) as file:
        name = Path(file.name).name
    left = tmp_path / name.replace(f"-{os.getpid()}-", "-999999999-")
    of_another_machine = tmp_path / name.replace(name.split(".")[3].split("-")[0], "0" * 12)
    for abandoned in (left, of_another_machine):
        abandoned.touch()
    stays = tmp_path / name.replace(f"-{os.getpid()}-", "-999999998-")
    stays.mkdir()  # cannot be removed as a file is, like another user's
    store.write_json(path, {})
    assert not left.exists() and of_another_machine.exists() and stays.exists()


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError):
        store.run_directory(tmp_path / "file", "run")
    with pytest.raises(ResourceError, match="choose a place"):
        store.write_json(tmp_path / "missing" / "run.json", {})
    assert store.run_directory(tmp_path / "runs", "a-1") == store.run_directory(tmp_path / "runs", "a-1")


def test_equal_fields_have_equal_hashes() -> None:
    fields = {"a": Fraction(1, 2), "b": (1, 2), "c": None}
    assert store.artefact_hash(fields) == store.artefact_hash(dict(reversed(fields.items())))
    assert store.artefact_hash(fields) != store.artefact_hash(fields | {"c": 0})


def test_lock_keeps_other_processes_out_and_ends_with_its_process(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from atlasvid_cli import store\n"
        "with store.lock(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        with pytest.raises(ResourceError, match="in use"), store.lock(tmp_path):
            pass
    finally:
        holder.kill()
        holder.communicate()
    with store.lock(tmp_path):
        pass


def test_a_folder_of_results_is_ours_alone(tmp_path: Path) -> None:
    with store.results(tmp_path / "new"):
        (tmp_path / "new" / "a.mp4").touch()
    with store.results(tmp_path / "new"):
        pass
    (tmp_path / "precious").write_text("x")
    with pytest.raises(UsageError, match="not of this command"), store.results(tmp_path):
        pass
    assert (tmp_path / "precious").read_text() == "x"


def test_a_file_in_place_of_another_keeps_its_suffix_and_errors_of_others(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="of a library"), store.replacing(tmp_path / "a.mp4", ".mp4") as path:
        assert path.suffix == ".mp4"
        path.touch()
        raise OSError(1094995529, "of a library")
    assert list(tmp_path.iterdir()) == []


def test_the_cache_lies_where_users_expect_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ATLASVID_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert store.cache_folder() == Path("/x/atlasvid")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert store.cache_folder() == Path.home() / ".cache" / "atlasvid"
    monkeypatch.setenv("ATLASVID_CACHE", "/own")
    assert store.cache_folder() == Path("/own")
