"""The run directory: atomic writes, tensors that are validated before they are read, resumable state, a lock.

Every write is a temporary file in the same folder, synced, then renamed; a reader sees the old file or the new one.
"""

import errno
import fcntl
import hashlib
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

from .errors import InputError, ResourceError, UsageError

MAX_HEADER_BYTES = 16 << 20
METADATA_KEY = "atlasvid"
DTYPE_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8}
Expected = dict[str, tuple[str, tuple[int | None, ...] | None]]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place, synced, when the block ends well; else it is removed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ResourceError(f"no space is left to write {path}; free some or choose another place") from error
        raise ResourceError(f"{path} cannot be written ({error.strerror}); choose another place") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file; the same tensors and metadata give the same bytes.

    The metadata are one JSON string: safetensors writes several keys in an order that changes from call to call.
    """
    data = save(
        {k: v.detach().contiguous() for k, v in sorted(tensors.items())},
        {METADATA_KEY: json.dumps(metadata, sort_keys=True)},
    )
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def open_tensors(path: Path, expect: Expected | None = None) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a file whose header holds what `expect` says: name -> (dtype, shape), None matches any.

    The header is checked before anything is allocated. Raises InputError for all that is not such a file.
    """
    entries, metadata = read_header(path)
    for name, (dtype, shape) in (expect or {}).items():
        entry = entries.get(name)
        if entry is None:
            raise InputError(f"{path} holds no tensor {name!r}; give a file that atlasvid wrote")
        if entry["dtype"] != dtype:
            raise InputError(f"{path} holds {name!r} as {entry['dtype']} instead of {dtype}; make it again")
        actual = entry["shape"]
        fits = shape is None or (
            len(actual) == len(shape) and all(b in (None, a) for a, b in zip(actual, shape, strict=True))
        )
        if not fits or 0 in actual:
            raise InputError(f"{path} holds {name!r} of shape {actual}, which does not fit this preset; make it again")
    tensors = load_file(path)
    for name, value in tensors.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise InputError(f"{path} holds NaN or infinity in {name!r}; make it again")
    return tensors, metadata


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The tensors' entries and our metadata; the offsets are proved to tile the data exactly."""
    remedy = "give a file that atlasvid wrote, or make it again"
    if not path.is_file():
        raise InputError(f"{path} is not a file; {remedy}")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
            raise InputError(f"{path} is truncated or not a safetensors file; {remedy}")
        raw = file.read(length)
    try:
        header = json.loads(raw)
        entries = {k: v for k, v in header.items() if k != "__metadata__"}
        spans = []
        for entry in entries.values():
            (start, end), shape = entry["data_offsets"], entry["shape"]
            if end - start != math.prod(shape) * DTYPE_BYTES[entry["dtype"]]:
                raise ValueError
            spans.append((start, end))
        edges = [0, *(e for span in sorted(spans) for e in span), size - 8 - length]
        if any(a != b for a, b in zip(edges[::2], edges[1::2], strict=True)):
            raise ValueError
        metadata = json.loads(header.get("__metadata__", {}).get(METADATA_KEY, "{}"))
        if not all(isinstance(v, str) for v in metadata.values()):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError(f"{path} is truncated or has a damaged header; {remedy}") from None
    return entries, metadata


def check_artefact(metadata: dict[str, str], expected: dict[str, str], path: Path) -> None:
    """Raises InputError naming the first field of `expected` that the file's metadata differ in."""
    for name, value in expected.items():
        found = metadata.get(name)
        if found != value:
            raise InputError(f"{path} was made with another {name} ({found or 'none'}, not {value}); make it again")


def artefact_hash(fields: dict[str, Any]) -> str:
    """16 hex digits that stand for the fields."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:16]


def save_state(path: Path, step: int, tensors: dict[str, torch.Tensor], key: str) -> None:
    """The state of a sampling loop after `step` steps, bound to the `key` of what it makes."""
    save_tensors(path, tensors, {"step": str(step), "key": key})


def load_state(path: Path, key: str) -> tuple[int, dict[str, torch.Tensor]] | None:
    """What `save_state` wrote for the same key; None where there is nothing that can be resumed."""
    try:
        tensors, metadata = open_tensors(path)
        return (int(metadata["step"]), tensors) if metadata["key"] == key else None
    except (InputError, KeyError, ValueError):
        return None


@contextmanager
def lock(run_dir: Path) -> Iterator[None]:
    """Keeps a second process out of a run directory. Raises UsageError."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(f"another atlasvid works in {run_dir}; wait for it or give another --run-dir") from None
        yield
