"""sha256 of weight files, remembered: gigabytes need not be read again at every start."""

import hashlib
import re
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
    real = path.resolve()
    stat = real.stat()
    return _known(real, stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns)


@cache
def _known(path: Path, size: int, *changed: int) -> str:
    if HEX.fullmatch(path.name):
        return path.name
    if size < LARGE:
        return _read(path)
    kept = store.cache_folder() / "digests" / store.artefact_hash({"path": path, "size": size, "changed": changed})
    with suppress(OSError, UnicodeDecodeError):
        if HEX.fullmatch(digest := kept.read_text()):
            return digest
    digest = _read(path)
    with suppress(ResourceError):
        store.run_directory(kept.parent.parent, kept.parent.name)
        with store.atomic(kept) as file:
            file.write(digest.encode())
    return digest


def _read(path: Path) -> str:
    with path.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()
