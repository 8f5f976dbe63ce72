"""Digests are those of the files as they are now, and large files are read once."""

import hashlib

import pytest

from atlasvid_cli import digests


@pytest.fixture
def reads(monkeypatch, tmp_path):
    """Files that were read; whatever is not small is large."""
    seen, read = [], digests._read
    monkeypatch.setattr(digests, "_read", lambda path: seen.append(path.name) or read(path))
    monkeypatch.setattr(digests, "LARGE", 10)
    monkeypatch.setenv("ATLASVID_CACHE", str(tmp_path / "cache"))
    return seen


def digest_in_a_new_process(path):
    digests._digest.cache_clear()
    return digests.file_digest(path)


def test_a_large_file_is_read_once_and_again_when_it_changes(reads, tmp_path):
    path, small = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    small.write_bytes(b"small")
    for text in (b"twelve bytes", b"bytes twelve"):
        path.write_bytes(text)
        assert digests.unread([path, small]) == [path]
        for _ in range(3):
            assert digest_in_a_new_process(path) == hashlib.sha256(text).hexdigest()
    assert reads == ["a.safetensors"] * 2 and digests.unread([path, small]) == []
    [*kept] = (tmp_path / "cache" / "digests").iterdir()
    for file in kept:
        file.write_bytes(b"\xff damaged")
    assert digest_in_a_new_process(path) == hashlib.sha256(text).hexdigest() and len(reads) == 3


def test_small_files_are_read_and_names_of_the_hub_are_believed(reads, tmp_path):
    small, named = tmp_path / "b", tmp_path / ("0a" * 32)
    small.write_bytes(b"small")
    named.write_bytes(b"something else that is large")
    (tmp_path / "link.safetensors").symlink_to(named)
    for _ in range(2):
        assert digest_in_a_new_process(small) == hashlib.sha256(b"small").hexdigest()
        assert digest_in_a_new_process(tmp_path / "link.safetensors") == named.name
        assert digests.unread([tmp_path / "link.safetensors"]) == []
    assert reads == ["b", "b"] and not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_written_costs_a_reading(reads, tmp_path):
    path = tmp_path / "c"
    path.write_bytes(b"twelve bytes")
    (tmp_path / "cache").write_bytes(b"no folder")
    for _ in range(2):
        assert digest_in_a_new_process(path) == hashlib.sha256(b"twelve bytes").hexdigest()
    assert reads == ["c", "c"]
