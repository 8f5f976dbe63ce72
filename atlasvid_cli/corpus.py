"""Captioned clips as training samples: what cannot be used is said and skipped, the rest is encoded once and cached.

A sample is a dict, as those of the procedural world (`dataset`): `caption`, the hash of its `clip`, fp16 `latents` and,
for the detail branch, the same seen smaller, `proxy_<r_t>` and `proxy_1`, with their `ratio`.
"""

import json
import math
import mimetypes
import random
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan

from . import shapes, store, tensor_file
from .console import Console
from .dataset import split
from .digests import file_digest
from .encode import encode_clips, encode_stream
from .errors import InputError
from .footage import Clip, Crop, open_clip, read_clip
from .presets import Preset
from .session import Session
from .weights import load_vae, model_hash

Tensors = dict[str, torch.Tensor]
Encoded = list[tuple[Tensors, dict[str, str]]]

HELD_OUT = 10  # every tenth clip is not trained on
VALIDATED = 16  # samples of held-out clips that a validation takes at most


@dataclass(frozen=True)
class Captioned:
    """A video file and what it shows."""

    path: Path
    caption: str


def read_index(data: Path, console: Console) -> list[Captioned]:
    """The clips of a folder of clip.mp4 + clip.txt pairs, or of a JSON Lines file of {"video": path, "caption": text}.

    Paths in an index count from its folder. `InputError` where `data` is neither or an entry cannot be understood;
    videos without a caption are named in a warning.
    """
    try:
        if data.is_dir():
            return _read_folder(data, console)
        lines = data.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{data} cannot be read ({error}): give a folder of clip.mp4 + clip.txt, or a JSON Lines index"
        ) from None
    return [_entry(line, data, number) for number, line in enumerate(lines, 1) if line.strip()]


def _read_folder(folder: Path, console: Console) -> list[Captioned]:
    found = []
    for path in sorted(folder.iterdir()):
        text = path.with_suffix(".txt")
        if path.suffix in ("", ".txt") or path.name.startswith("."):
            continue
        if text.is_file():
            try:
                found.append(Captioned(path, " ".join(text.read_text(encoding="utf-8-sig").split())))
            except (OSError, UnicodeDecodeError) as error:
                console.warn(f"{path} is skipped: {text.name} cannot be read ({error})")
        elif (mimetypes.guess_type(path.name)[0] or "").startswith("video/"):
            console.warn(f"{path} is skipped: it has no caption, {text.name}")
    return found


def _entry(line: str, index: Path, number: int) -> Captioned:
    try:
        entry = json.loads(line)
        video, caption = entry["video"], entry["caption"]
        if not (isinstance(video, str) and isinstance(caption, str)):
            raise TypeError
    except (ValueError, KeyError, TypeError, RecursionError):
        raise InputError(
            f'{index} line {number} is not an entry: write {{"video": "clip.mp4", "caption": "..."}}'
        ) from None
    return Captioned(index.parent / video, caption)


def load_samples(session: Session, stage: str, data: Path, work: Path, console: Console) -> list[list[dict]]:
    """The samples of stage `proxy` or `detail` of every usable entry of `data`, one list an entry.

    Latents are cached in `work` by the clip's content, the VAE and the figures of the preset that they depend on; a
    clip that is there is not opened. `InputError` where no clip can be used.
    """
    entries = []
    for entry in read_index(data, console):
        if entry.caption.strip():
            entries.append(entry)
        else:
            console.warn(f"{entry.path} is skipped: its caption is empty")
    if not entries:
        raise InputError(f"{data} holds no clip with a caption; give clip.mp4 beside clip.txt, or an index")
    preset = session.preset
    cache = store.run_directory(work, f"latents-{store.artefact_hash(figures(session, stage))}")
    vae: AutoencoderKLWan | None = None
    groups, skipped = [], 0
    with console.stage("clips", len(entries)) as advance:
        for entry in entries:
            try:
                content = _content(entry.path)
                path = cache / f"{content[:32]}.safetensors"
                if (kept := _cached(path)) is None:
                    clip = open_clip(entry.path)
                    vae = vae or load_vae(session.folder).to(session.device)
                    encoded = (encode_for_proxy if stage == "proxy" else encode_for_detail)(vae, preset, clip)
                    _save(path, encoded, clip.is_hdr)
                    kept = _cached(path)
                assert kept is not None
                samples, is_hdr = kept
                if is_hdr:
                    console.warn(f"{entry.path} is HDR and is taken as it is, pale: convert it to SDR, or leave it out")
                groups.append([{**sample, "caption": entry.caption, "clip": content} for sample in samples])
            except InputError as error:
                skipped += 1
                console.warn(f"skipped: {error}")
            advance()
    if not groups:
        raise InputError(f"{data} holds no clip that can be used; give clips with captions, and see the warnings")
    if skipped:
        console.warn(f"{skipped} of {len(entries)} clips were skipped, {len(groups)} are used")
    return groups


def split_groups(groups: list[list[dict]]) -> tuple[list[dict], list[dict]]:
    """The samples to train on, and some of every tenth clip's to validate with: one clip by its content, whatever its
    names and captions, as validation must not be of what was trained on. A world's samples are each a clip."""
    by_clip: dict[object, list[dict]] = {}
    for i, group in enumerate(groups):
        by_clip.setdefault(group[0].get("clip", i), []).extend(group)
    clips = list(by_clip.values())
    trained = [s for i, clip in enumerate(clips) if i % HELD_OUT != HELD_OUT - 1 for s in clip]
    held_out = [s for clip in clips[HELD_OUT - 1 :: HELD_OUT] for s in clip]
    random.Random(0).shuffle(held_out)
    return trained, held_out[:VALIDATED]


def figures(session: Session, stage: str) -> dict[str, Any]:
    """All that decides the samples of a clip, beside the clip."""
    preset = session.preset
    proxy_size = [proxy_latents(preset), preset.proxy.base_tokens, str(preset.detail.max_ratio)]
    return {
        "vae": model_hash(session.folder, "vae"),
        "stage": stage,
        "fps": [preset.fps, preset.proxy.time_ratio],
        "geometry": [preset.geometry.temporal, preset.geometry.spatial, preset.geometry.patch],
        "size": proxy_size if stage == "proxy" else preset.training_crop,
        "ratios": [] if stage == "proxy" else preset.training_ratios,
    }


def _content(path: Path) -> str:
    """sha256 of a clip in hex. `InputError` where it is no file that can be read."""
    try:
        if path.is_file():
            return file_digest(path)
        reason = "it does not exist or is not a file"
    except OSError as error:
        reason = str(error.strerror)
    raise InputError(f"{path} cannot be read ({reason}): give the path of a video")


def _cached(path: Path) -> tuple[list[dict], bool] | None:
    """The samples of a clip, and whether it is HDR; None where they are to be made."""
    if not path.exists():
        return None
    try:
        tensors, metadata = tensor_file.open_tensors(path)
        return split(tensors, json.loads(metadata["samples"])), json.loads(metadata["is_hdr"])
    except (InputError, KeyError, ValueError):
        return None  # damaged, or of an older version: made anew


def _save(path: Path, encoded: Encoded, is_hdr: bool) -> None:
    tensors = {f"{i}.{name}": x.half() for i, (own, _) in enumerate(encoded) for name, x in own.items()}
    infos = json.dumps([info for _, info in encoded])
    tensor_file.save_tensors(path, tensors, {"samples": infos, "is_hdr": json.dumps(is_hdr)})


def proxy_latents(preset: Preset) -> int:
    """Latent frames of the longest training clip of stage 1: its training grid, which bounds the proxy's attention."""
    return preset.detail.proxy_window[0]


def cut(frames: int, longest: int, shortest: int, step: int) -> list[int]:
    """Lengths, each step*k + 1, of the pieces of a clip of `frames`: as long as they may be, one after the other."""
    whole, rest = divmod(frames, longest)
    rest = (rest - 1) // step * step + 1
    return [longest] * whole + ([rest] if rest >= shortest else [])


def encode_for_proxy(vae: AutoencoderKLWan, preset: Preset, clip: Clip) -> Encoded:
    """The clip at the proxy's frame rate and size, in pieces as long as stage 1 trains on."""
    geometry = preset.geometry
    fps = Fraction(preset.fps, preset.proxy.time_ratio)
    longest = (proxy_latents(preset) - 1) * geometry.temporal + 1
    pieces = cut(math.ceil(clip.seconds * fps), longest, geometry.temporal + 1, geometry.temporal)
    _check_length(clip, pieces, geometry.temporal / fps)
    # the grid of a video of this aspect, as a plan would choose it
    target = shapes.video_grid(max(1, round(2160 * clip.width / clip.height)), 2160, 1, geometry)
    grid = shapes.base_grid(target, preset.proxy.base_tokens, preset.detail.max_ratio, 1)
    size = grid.w * geometry.token_pixels, grid.h * geometry.token_pixels
    frames = read_clip(clip, fps, sum(pieces), size)
    return [({"latents": encode_stream(vae, islice(frames, length))}, {}) for length in pieces]


def encode_for_detail(vae: AutoencoderKLWan, preset: Preset, clip: Clip) -> Encoded:
    """Square crops of the clip at any zoom that it has the pixels for, each with its own proxies; a piece has one crop
    and one ratio, drawn from the clip's content: all ratios in turn, so that a clip of enough pieces has them all."""
    geometry, time_ratio = preset.geometry, preset.proxy.time_ratio
    latents, tokens = preset.training_crop
    side, length = tokens * geometry.token_pixels, (latents - 1) * geometry.temporal + 1
    pieces = cut(math.ceil(clip.seconds * preset.fps), length, length, geometry.temporal)
    _check_length(clip, pieces, Fraction(length - 1, preset.fps))
    most = min(clip.width, clip.height) / side
    if most < 1:
        raise InputError(f"{clip.path} is {clip.width:.0f}x{clip.height:.0f}: detail needs {side} px a side or more")
    rng = random.Random(clip.sha256)
    ratios = [*preset.training_ratios, preset.training_ratios[-1]]
    rng.shuffle(ratios)
    crops = [Crop(most ** rng.random(), rng.random(), rng.random()) for _ in pieces]
    drawn = list(zip(crops, cycle(ratios)))
    frames = read_clip(clip, Fraction(preset.fps), sum(pieces), (side, side), crop_at=lambda k: drawn[k // length][0])
    return [_detail_sample(vae, islice(frames, length), ratio, time_ratio) for _, ratio in drawn]


def _check_length(clip: Clip, pieces: list[int], least: Fraction) -> None:
    if not pieces:
        raise InputError(
            f"{clip.path} lasts {float(clip.seconds):.2f} s: training needs more than {float(least):.2f} s"
        )


def _detail_sample(
    vae: AutoencoderKLWan, frames: Iterator[torch.Tensor], ratio: Fraction, time_ratio: int
) -> tuple[Tensors, dict[str, str]]:
    dense = torch.stack(list(frames))
    side = int(dense.shape[-1] / ratio)
    small = F.interpolate(dense, size=(side, side), mode="bicubic", antialias=True).clamp_(-1, 1)
    pixels = {"latents": dense, f"proxy_{time_ratio}": small[::time_ratio], "proxy_1": small}
    return {n: encode_clips(vae, x.transpose(0, 1)[None])[0] for n, x in pixels.items()}, {"ratio": str(ratio)}
