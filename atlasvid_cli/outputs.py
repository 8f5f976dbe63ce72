"""What a video and the record of a run say of how they were made, and when a video is finished or may be replaced."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from .artefacts import FORMAT
from .decode_cost import vae_tile
from .errors import AtlasError, UsageError
from .session import Session
from .video import tags, whole_frames

TOLD = ("prompt", "seed", "preset", "version", "model", "dtype", "attention", "key")  # by a video, of its latents


def check_preview_ours(path: Path) -> None:
    """UsageError where there is a file that is no video of ours: in a folder of the user's, a preview takes no name."""
    if path.exists() and "key" not in _tags(path):
        raise UsageError(f"{path} is not of a run; give another --run-dir, or move it away")


def record_of(run_dir: Path) -> dict[str, Any]:
    """What the last render of a run recorded, nothing where none is done; UsageError for a file that no run wrote."""
    path = run_dir / "run.json"
    try:
        record = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        record = None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise UsageError(f"{path} is not of a run; give another --run-dir, or move it away")
    return record


def video_tags(session: Session, metadata: dict[str, str], latents: tuple[int, int], codec: str) -> dict[str, str]:
    """What a video says of the latents that it shows, which have this metadata and are (h, w) large, and of how they
    were decoded."""
    decoder = session.pixels_hash(vae_tile(session.preset, *latents))
    return {name: metadata[name] for name in TOLD} | {"codec": codec, "decoder": decoder}


def is_finished(target: Path, wanted: dict[str, str], frames: int) -> bool:
    """Whether `target` is the video with the `wanted` tags (`video_tags`), and no part of it is missing."""
    same = {name: wanted[name] for name in ("key", "codec", "decoder")}.items() <= _tags(target).items()
    return same and whole_frames(target) == frames


def _tags(path: Path) -> dict[str, str]:
    """What a video says of itself; nothing where it is missing, or no video."""
    with suppress(AtlasError):
        return tags(path)
    return {}


def check_replaceable(target: Path, metadata: dict[str, str], codec: str) -> None:
    """UsageError where `target` is a file that was not made from the latents with this metadata, with that `codec`."""
    if not target.exists():
        return
    found = _tags(target)
    if found.get("key") == metadata["key"]:
        if (other := found.get("codec", codec)) != codec:
            raise UsageError(f"{target} exists, the same video in {other}; choose another --output, or move it away")
        return
    what = "from something else"
    if all(found.get(name) == metadata[name] for name in ("prompt", "seed", "model")):
        told = ", ".join(f"{name} {found.get(name)}" for name in ("version", "dtype", "attention"))
        what = f"from the same prompt, seed and model by other options, or elsewhere ({told})"
    raise UsageError(f"{target} exists and was made {what}; choose another --output, or move it away")
