"""Where things lie on disk: the run directory with its name and lock, the cache, and atomic writes."""

import errno
import fcntl
import glob
import hashlib
import json
import os
import shutil
import threading
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import IO, Any

from .errors import ResourceError, UsageError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# what is wrong with where a file shall go; libraries raise other OSErrors for other reasons
OF_THE_PLACE = (
    *FULL,
    errno.EACCES,
    errno.EROFS,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
)


def write_json(path: Path, obj: Any) -> None:
    """Writes `obj` as JSON, all or nothing; ResourceError where the place cannot take it."""
    text = json.dumps(obj, indent=2, sort_keys=True, allow_nan=False, default=_as_json)
    with atomic(path) as file:
        file.write(text.encode() + b"\n")


def artefact_hash(fields: Mapping[str, Any]) -> str:
    """16 hex digits that name `fields`: SHA-256 of their canonical JSON."""
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False, default=_as_json)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def cache_folder() -> Path:
    """Where results are kept between runs: $ATLASVID_CACHE, else atlasvid/ in $XDG_CACHE_HOME or ~/.cache."""
    if own := os.environ.get("ATLASVID_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "atlasvid"


def run_directory(root: Path, key: str) -> Path:
    """Creates `root/key` where it is missing, and returns it; ResourceError where it cannot be made."""
    path = root / key
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _resource_error(error, path) from error
    return path


@contextmanager
def lock(run_dir: Path) -> Iterator[None]:
    """Holds `run_dir` for this process; ResourceError while another one does. The kernel frees it, even on SIGKILL."""
    path = run_dir / ".lock"
    try:
        file = path.open("a")
    except OSError as error:
        raise _resource_error(error, path) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ResourceError(
                f"{run_dir} is in use by another atlasvid process: wait for it, or choose another folder"
            ) from error
        except OSError as error:
            raise _resource_error(error, path) from error
        yield


@contextmanager
def results(folder: Path) -> Iterator[None]:
    """Holds a folder of results, in which files are overwritten; UsageError where it holds files and this has never
    held it."""
    mark = folder / ".atlasvid-bench"
    if folder.exists() and not mark.exists() and any(folder.iterdir()):
        raise UsageError(f"{folder} holds files that are not of this command; choose another --output")
    with lock(run_directory(folder.parent, folder.name)):
        mark.touch()
        yield


@contextmanager
def atomic(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that becomes `path` when the block ends well, and otherwise leaves nothing behind."""
    with replacing(path, ".tmp") as made, made.open("wb") as file:
        yield file


def publish(made: Path, target: Path) -> None:
    """Copies a result of the run directory to where the user wants it."""
    with atomic(target) as file, made.open("rb") as source:
        shutil.copyfileobj(source, file)


@contextmanager
def replacing(path: Path, suffix: str) -> Iterator[Path]:
    """A name beside `path`, ending in `suffix`; the file that is written there becomes `path` when the block ends well,
    and otherwise is removed. ResourceError where the disk does not take it."""
    made = temporary(path, suffix)
    try:
        yield made
        sync(made)
        made.replace(path)
        sync(path.parent)
    except OSError as error:
        if error.errno in OF_THE_PLACE:
            raise _resource_error(error, path) from error
        raise
    finally:
        with suppress(OSError):  # the first error is the one to tell
            made.unlink(missing_ok=True)


def temporary(path: Path, suffix: str) -> Path:
    """A name of this writer's own: files outside a run directory, which has a lock, may have several writers.

    What killed writers on this machine have left of `path` is removed.
    """
    name = os.fsencode(path.name)[:100].decode(errors="ignore")  # file systems count bytes, some take UTF-8 alone
    stem = f".{name}.{uuid.getnode():012x}-"
    for left in path.parent.glob(f"{glob.escape(stem)}*{suffix}"):
        process = left.name.removeprefix(stem).split("-")[0]
        if process.isdigit() and not Path("/proc", process).exists() and Path("/proc/self").exists():
            with suppress(OSError):  # another user's, say
                left.unlink()
    return path.with_name(f"{stem}{os.getpid()}-{threading.get_ident()}{suffix}")


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _resource_error(error: OSError, path: Path) -> ResourceError:
    if error.errno in FULL:
        return ResourceError(f"{path} cannot be written because the disk is full: free space or choose another place")
    return ResourceError(f"{path} cannot be written ({error.strerror or error}): choose a place you may write to")


def _as_json(value: Any) -> str:
    if isinstance(value, Fraction | Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} is not JSON")
