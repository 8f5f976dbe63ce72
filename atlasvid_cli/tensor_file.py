"""Safetensors files whose header is checked before anything is allocated, and sampling states in them.

They are written here and not by their library, whose metadata order changes from run to run: the same tensors give the
same bytes.
"""

import json
import math
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from .errors import AtlasError, InputError
from .store import atomic

if TYPE_CHECKING:
    import torch

MAX_HEADER_BYTES = 16 << 20
STATE = "atlasvid-state"  # the format that a sampling state says
DTYPES = {
    "F64": ("float64", 8),
    "I64": ("int64", 8),
    "F32": ("float32", 4),
    "I32": ("int32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
}
"""safetensors name -> torch name, bytes an element."""

Shape = tuple[int | None, ...]
"""An expected shape; None where any length will do."""


class TensorEntry(NamedTuple):
    """One tensor as the header tells it; `begin` and `end` are bytes from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


SaveState = Callable[[int, "dict[str, torch.Tensor]"], None]
"""Keeps the tensors of a sampling after so many finished steps."""


class StepState(NamedTuple):
    """A sampling state after `step` finished steps."""

    step: int
    tensors: "dict[str, torch.Tensor]"


def save_tensors(path: Path, tensors: "Mapping[str, torch.Tensor]", metadata: Mapping[str, str]) -> None:
    """Writes `tensors` as safetensors, all or nothing; equal arguments give equal bytes."""
    import torch

    names = {getattr(torch, name): (key, size) for key, (name, size) in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    # Widest elements first, as safetensors does: every tensor is then aligned to its own element.
    order = sorted(tensors, key=lambda name: (-names[tensors[name].dtype][1], name))
    offset = 0
    for name in order:
        tensor = tensors[name]
        dtype, size = names[tensor.dtype]
        end = offset + tensor.numel() * size
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            # One tensor at a time leaves the device, so no second copy of the whole is made.
            file.write(_bytes_of(tensors[name].detach().cpu().contiguous()))


def read_header(path: Path) -> tuple[dict[str, str], dict[str, TensorEntry]]:
    """Metadata and tensors of a safetensors file, from its header alone; InputError where it is not a sound one."""
    with _open_regular(path) as file:
        return _parse_header(file, path)


def check_header(path: Path, expect: Mapping[str, tuple[str, Shape | None]]) -> None:
    """Raises InputError where `open_tensors` would for what the header says."""
    _check_entries(read_header(path)[1], expect, path)


def open_tensors(
    path: Path, expect: Mapping[str, tuple[str, Shape | None]] | None = None
) -> "tuple[dict[str, torch.Tensor], dict[str, str]]":
    """Tensors on the CPU, and metadata; InputError unless the file holds exactly `expect` (name -> dtype such as
    "F32", shape or None for any), is whole and finite. Nothing is allocated before the header has passed.

    `expect` None takes any names.
    """
    import torch

    with _open_regular(path) as file:
        metadata, entries = _parse_header(file, path)
        if expect is not None:
            _check_entries(entries, expect, path)
        tensors = {}
        for name, entry in entries.items():
            tensor = torch.empty(entry.shape, dtype=getattr(torch, DTYPES[entry.dtype][0]))
            file.seek(entry.begin)
            if file.readinto(_bytes_of(tensor)) != entry.end - entry.begin:  # type: ignore[attr-defined]
                raise InputError(f"{path} was cut short while it was read: make it again")
            if tensor.is_floating_point() and not is_finite(tensor):
                raise InputError(f"{path} holds values of {name!r} that are not finite: make it again")
            tensors[name] = tensor
        return tensors, metadata


def is_finite(tensor: "torch.Tensor") -> bool:
    """Whether all values are; in parts, as the mask of a whole 4K tensor would be a sizeable allocation of its own."""
    return all(bool(part.isfinite().all()) for part in tensor.reshape(-1).split(1 << 24))


def save_state(path: Path, step: int, tensors: "Mapping[str, torch.Tensor]", key: str) -> None:
    """Saves a sampling state after `step` finished steps, bound to the plan hash `key`."""
    save_tensors(path, tensors, {"format": STATE, "key": key, "step": str(step)})


def load_state(path: Path, key: str) -> tuple[StepState | None, str | None]:
    """The state to go on from, and a warning; no state where it is missing (no warning), of another plan or damaged."""
    if not path.exists():
        return None, None
    try:
        metadata, _ = read_header(path)
        if metadata.get("format") != STATE or metadata.get("key") != key:
            return None, f"{path} belongs to other settings or weights: sampling starts over"
        tensors, metadata = open_tensors(path)
        return StepState(int(metadata["step"]), tensors), None
    except (AtlasError, KeyError, ValueError) as error:
        return None, f"{error}; sampling starts over"


def check_artefact(metadata: Mapping[str, str], expected: Mapping[str, str], path: Path) -> None:
    """Raises InputError naming the first of `expected` (format, preset, model hash …) that `metadata` contradicts."""
    for key, wanted in expected.items():
        found = metadata.get(key)
        if found != wanted:
            has = f"says {key} {found!r}" if found is not None else f"names no {key}"
            raise InputError(
                f"{path} {has}, but {wanted!r} is needed: make it again, or give the settings it was made with"
            )


def _bytes_of(tensor: "torch.Tensor") -> memoryview:
    """The memory of a contiguous CPU tensor."""
    import torch

    # numpy has no bfloat16, so bytes are viewed in torch first.
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)


@contextmanager
def _open_regular(path: Path) -> Iterator[IO[bytes]]:
    try:
        # O_NONBLOCK: opening a named pipe must not wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist: check the path, or make it first") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be opened ({getattr(error, 'strerror', error)}): check the path") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InputError(f"{path} is not a regular file: give the path of a .safetensors file")
    with os.fdopen(descriptor, "rb") as file:
        try:
            yield file
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror or error}): check the disk") from error


def _parse_header(file: IO[bytes], path: Path) -> tuple[dict[str, str], dict[str, TensorEntry]]:
    def bad(why: str) -> InputError:
        return InputError(
            f"{path} is not a sound safetensors file ({why}): give another file, or copy or make it again"
        )

    size = os.fstat(file.fileno()).st_size
    if size < 8:
        raise bad("it is shorter than its header")
    length = int.from_bytes(file.read(8), "little")
    if length > MAX_HEADER_BYTES or length > size - 8:
        raise bad("it does not begin with a header")
    try:
        header = json.loads(file.read(length), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise bad("its header is not JSON") from error
    if not isinstance(header, dict):
        raise bad("its header is not an object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise bad("its metadata are not strings")
    entries = {}
    for name, entry in header.items():
        if (parsed := _parse_entry(entry, 8 + length)) is None:
            raise bad(f"the entry of tensor {name[:80]!r} is wrong")
        entries[name] = parsed
    position = 8 + length
    for entry in sorted(entries.values(), key=lambda entry: (entry.begin, entry.end)):
        if entry.begin != position:
            raise bad("its tensors overlap or leave gaps")
        position = entry.end
    if position != size:
        raise bad(f"it has {size} bytes where its header says {position}")
    return metadata, entries


def _parse_entry(entry: Any, data_start: int) -> TensorEntry | None:
    """None unless dtype, shape and offsets are well formed and agree."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        return None
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        return None
    if not isinstance(shape, list) or len(shape) > 16 or not isinstance(offsets, list) or len(offsets) != 2:
        return None
    # `type`, as True is an int to isinstance. A length of 0 must not hide others beyond what torch can count.
    if not all(type(value) is int and value >= 0 for value in shape + offsets):
        return None
    if math.prod(max(length, 1) for length in shape) >= 1 << 48:
        return None
    if offsets[1] - offsets[0] != math.prod(shape) * DTYPES[dtype][1]:
        return None
    return TensorEntry(dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key is given twice")
    return result


def _check_entries(
    entries: Mapping[str, TensorEntry], expect: Mapping[str, tuple[str, Shape | None]], path: Path
) -> None:
    for name in (*expect, *entries):
        if name not in entries or name not in expect:
            what = "lacks tensor" if name in expect else "holds an unknown tensor"
            raise InputError(f"{path} {what} {name[:80]!r}: give a file of the right kind (see atlasvid info)")
    for name, (dtype, shape) in expect.items():
        found = entries[name]
        if found.dtype != dtype:
            raise InputError(f"{path} stores {name!r} as {found.dtype} where {dtype} is needed: make it again")
        if shape is not None and (
            len(shape) != len(found.shape) or any(b not in (None, a) for a, b in zip(found.shape, shape, strict=True))
        ):
            raise InputError(
                f"{path} stores {name!r} in shape {list(found.shape)} where {list(shape)} is needed: "
                "make it again, or give the settings it was made with"
            )
