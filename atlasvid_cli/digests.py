"""sha256 of weight files, remembered: gigabytes need not be read again at every start."""

import hashlib
import re
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path

from . import store
from .errors import ResourceError

LARGE = 1 << 28  # bytes from which on a digest is kept on disk
HEX = re.compile(r"[0-9a-f]{64}")


def file_digest(path: Path) -> str:
    """sha256 of a file, in hex.

    The hub's cache names large files by it; of other large ones it is kept in `store.cache_folder`, for as long as
    path, size, inode and times of change are the same.
    """
    return _digest(*_state(path))


def unread(paths: Iterable[Path]) -> list[Path]:
    """The large files of which no digest is kept: reading gigabytes takes a while."""
    states = {path: _state(path) for path in paths}
    return [path for path, state in states.items() if state[1] >= LARGE and _kept(*state) is None]


def _state(path: Path) -> tuple[Path, int, tuple[int, ...]]:
    """Where a file lies, its size, and what changes with it."""
    real = path.resolve()
    stat = real.stat()
    return real, stat.st_size, (stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns)


@cache
def _digest(path: Path, size: int, changed: tuple[int, ...]) -> str:
    if size < LARGE and not HEX.fullmatch(path.name):
        return _read(path)
    if digest := _kept(path, size, changed):
        return digest
    digest, kept = _read(path), _place(path, size, changed)
    with suppress(ResourceError):
        store.run_directory(kept.parent.parent, kept.parent.name)
        with store.atomic(kept) as file:
            file.write(digest.encode())
    return digest


def _kept(path: Path, size: int, changed: tuple[int, ...]) -> str | None:
    """The digest that a large file's name is, or that the cache has."""
    if HEX.fullmatch(path.name):
        return path.name
    with suppress(OSError, UnicodeDecodeError):
        if HEX.fullmatch(digest := _place(path, size, changed).read_text()):
            return digest
    return None


def _place(path: Path, size: int, changed: tuple[int, ...]) -> Path:
    return store.cache_folder() / "digests" / store.artefact_hash({"path": path, "size": size, "changed": changed})


def _read(path: Path) -> str:
    with path.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()
