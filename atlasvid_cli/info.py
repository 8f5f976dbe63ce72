"""What a file of ours tells about itself: a run directory, saved tensors or a video."""

import json
from pathlib import Path

from .errors import InputError, one_line
from .tensor_file import read_header


def describe(path: Path) -> dict:
    """Metadata of a run directory, a .safetensors file or a video; InputError for anything else."""
    if path.is_dir():
        return _describe_run(path)
    if path.suffix == ".safetensors":
        metadata, entries = read_header(path)
        tensors = {name: {"dtype": entry.dtype, "shape": list(entry.shape)} for name, entry in entries.items()}
        return {"kind": "tensors", "path": str(path), "metadata": metadata, "tensors": tensors}
    return _describe_video(path)


def _describe_run(path: Path) -> dict:
    """What a finished render recorded, or without that what the latents there say of themselves."""
    record = path / "run.json"
    try:
        run = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
        latents = [p for p in sorted(path.glob("*.safetensors")) if ".state." not in p.name]
        if not run and not latents:
            raise InputError(f"{path} is no run directory, as it holds no latents: give one below runs/")
        run = run or {p.name: read_header(p)[0] for p in latents}
    except (OSError, ValueError) as error:
        raise InputError(f"{record} cannot be read ({error}): run the same render again") from error
    files = {file.name: file.stat().st_size for file in sorted(path.iterdir()) if not file.name.startswith(".")}
    return {"kind": "run", "path": str(path), "run": run, "files_bytes": files}


def _describe_video(path: Path) -> dict:
    if not path.is_file():
        raise InputError(f"{path} does not exist or is not a file: give a run directory, .safetensors file or video")
    from .video import probe

    return {"kind": "video", "path": str(path), **probe(path)}


def lines(facts: dict, prefix: str = "") -> list[str]:
    """`facts` as "key: value" lines for a reader: inner keys joined by dots, sizes with their unit, and nothing of what
    is not set."""
    result = []
    for key, value in facts.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            value = {item.get("stage", str(i)): item for i, item in enumerate(value, start=1)}
        if isinstance(value, dict):
            result += lines(value, f"{prefix}{key}.")
        elif value is not None and value != []:
            result.append(_line(f"{prefix}{key}", value))
    return result


def _line(key: str, value: object) -> str:
    if "_bytes" in key and isinstance(value, int):
        return f"{key.replace('_bytes', '')}: {_size(value)}"
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return f"{key}: {one_line(text)}"  # anybody's file may hold newlines and a terminal's codes


def _size(count: int) -> str:
    """Bytes with a binary unit: 1.5 MiB."""
    power = min(4, max(0, count.bit_length() - 1) // 10)
    return f"{count / 1024**power:.4g} {('bytes', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
