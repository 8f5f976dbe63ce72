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
from functools import cache
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan

from . import shapes, store, tensor_file
from .console import Console
from .dataset import split
from .encode import encode_clips, encode_stream
from .errors import InputError
from .footage import Clip, Crop, content, open_clip, read_clip
from .presets import Preset
from .session import Session
from .weights import load_vae, model_hash

Tensors = dict[str, torch.Tensor]
Encoded = list[tuple[Tensors, dict[str, str]]]

RECIPE = 1  # of cuts, crops and draws of ratios: counted up with each change, as latents are kept by it
ENLARGED = 1.1  # as much as a clip may be for stage 1: more would teach it blur
SLOW = 0.95  # of the rate that is taken: below, frames are repeated that one sees
HELD_OUT = 10  # every tenth clip is not trained on
VALIDATED = 16  # samples of held-out clips that a validation takes at most


@dataclass(frozen=True)
class Captioned:
    """A video file and what it shows."""

    path: Path
    caption: str


def read_index(data: Path, console: Console) -> list[Captioned]:
    """The clips of a folder of clip.mp4 + clip.txt pairs, or of a JSON Lines file of {"video": path, "caption": text}.

    Paths in an index count from its folder. `InputError` where `data` is neither or has none, or an entry cannot be
    understood; videos without a caption are named in a warning.
    """
    try:
        found = _read_folder(data, console) if data.is_dir() else _read_lines(data)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{data} cannot be read ({error}): give a folder of clip.mp4 + clip.txt, or a JSON Lines index"
        ) from None
    for entry in found:
        if not entry.caption.strip():
            console.warn(f"{entry.path} is skipped: its caption is empty")
    captioned = [entry for entry in found if entry.caption.strip()]
    if not captioned:
        raise InputError(f"{data} holds no clip with a caption; give clip.mp4 beside clip.txt, or an index")
    return captioned


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


def _read_lines(index: Path) -> list[Captioned]:
    lines = index.read_text(encoding="utf-8-sig").split("\n")
    return [_entry(line, index, number) for number, line in enumerate(lines, 1) if line.strip()]


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
    clip that is there is not opened. What is odd about a clip that is used is a warning. `InputError` where no clip can
    be used.
    """
    entries = read_index(data, console)
    folder = store.run_directory(work, f"latents-{store.artefact_hash(figures(session, stage))}")

    @cache
    def vae() -> AutoencoderKLWan:
        return load_vae(session.folder).to(session.device)

    def made(path: Path, leads: bool) -> tuple[Encoded, list[str]]:
        clip, preset = open_clip(path), session.preset
        if stage == "proxy":
            encoded = encode_for_proxy(vae(), preset, clip)
        else:
            encoded = encode_for_detail(vae(), preset, clip, leads)
        return encoded, _remarks(clip, frame_rate(preset, stage))

    groups: list[list[dict]] = []
    used: dict[str, None] = {}  # an ordered set
    skipped = 0
    with console.stage("clips", len(entries)) as advance:
        for entry in entries:
            try:
                sha256 = content(entry.path)
                leads = stage == "detail" and sha256 == next(iter(used), sha256)
                path = folder / f"{sha256[:32]}{'-leads' if leads else ''}.safetensors"
                if (kept := _cached(path)) is None:
                    _save(path, *made(entry.path, leads))
                    kept = _cached(path)
                assert kept is not None
                samples, remarks = kept
                for remark in remarks if sha256 not in used else ():
                    console.warn(f"{entry.path} {remark}")
                used[sha256] = None
                groups.append([{**sample, "caption": entry.caption, "clip": sha256} for sample in samples])
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
    names and captions, as validation must not be of what was trained on. The first one is always trained on. A world's
    samples are each a clip."""
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
        "recipe": RECIPE,
        "vae": model_hash(session.folder, "vae"),
        "stage": stage,
        "fps": [preset.fps, preset.proxy.time_ratio],
        "geometry": [preset.geometry.temporal, preset.geometry.spatial, preset.geometry.patch],
        "size": proxy_size if stage == "proxy" else preset.training_crop,
        "ratios": [] if stage == "proxy" else preset.training_ratios,
    }


def _remarks(clip: Clip, fps: Fraction) -> list[str]:
    """What is odd about a clip that is taken at `fps` all the same."""
    remarks = []
    if clip.is_hdr:
        remarks.append("is HDR and is taken as it is, pale: convert it to SDR, or leave it out")
    if clip.fps < SLOW * fps:
        remarks.append(
            f"has {float(clip.fps):.3g} frames a second where training takes {float(fps):g}, so that frames are"
            " repeated: give it at a higher rate, or leave it out"
        )
    return remarks


def _cached(path: Path) -> tuple[list[dict], list[str]] | None:
    """The samples of a clip, and what is odd about it; None where they are to be made."""
    if not path.exists():
        return None
    try:
        tensors, metadata = tensor_file.open_tensors(path)
        return split(tensors, json.loads(metadata["samples"])), json.loads(metadata["remarks"])
    except (InputError, KeyError, ValueError):
        return None  # damaged: made anew


def _save(path: Path, encoded: Encoded, remarks: list[str]) -> None:
    tensors = {f"{i}.{name}": x for i, (own, _) in enumerate(encoded) for name, x in own.items()}
    infos = json.dumps([info for _, info in encoded])
    tensor_file.save_tensors(path, tensors, {"samples": infos, "remarks": json.dumps(remarks)})


def frame_rate(preset: Preset, stage: str) -> Fraction:
    """Frames a second at which a stage sees clips."""
    return Fraction(preset.fps, preset.proxy.time_ratio if stage == "proxy" else 1)


def proxy_latents(preset: Preset) -> int:
    """Latent frames of the longest training clip of stage 1: its training grid, which bounds the proxy's attention."""
    return preset.detail.proxy_window[0]


def cut(frames: int, longest: int, shortest: int, step: int) -> list[int]:
    """Lengths, each step*k + 1, of the pieces of a clip of `frames`: as long as they may be, one after the other."""
    whole, rest = divmod(frames, longest)
    rest = (rest - 1) // step * step + 1
    return [longest] * whole + ([rest] if rest >= shortest else [])


def encode_for_proxy(vae: AutoencoderKLWan, preset: Preset, clip: Clip) -> Encoded:
    """The clip at the proxy's frame rate and size, in pieces as long as stage 1 trains on; fp16."""
    geometry, fps = preset.geometry, frame_rate(preset, "proxy")
    longest = (proxy_latents(preset) - 1) * geometry.temporal + 1
    pieces = cut(math.ceil(clip.seconds * fps), longest, geometry.temporal + 1, geometry.temporal)
    _check_length(clip, pieces, geometry.temporal / fps)
    # the grid of a video of this aspect, as a plan would choose it
    target = shapes.video_grid(max(1, round(2160 * clip.width / clip.height)), 2160, 1, geometry)
    grid = shapes.base_grid(target, preset.proxy.base_tokens, preset.detail.max_ratio, 1)
    size = grid.w * geometry.token_pixels, grid.h * geometry.token_pixels
    # of about `base_tokens`, rounded up: a clip of the size that the model was trained at may lack some pixels
    if max(size[0] / clip.width, size[1] / clip.height) > ENLARGED:
        raise InputError(f"{_sized(clip)}: its proxy needs {size[0]}x{size[1]} or more")
    frames = read_clip(clip, fps, sum(pieces), size)
    return [({"latents": encode_stream(vae, islice(frames, length)).half()}, {}) for length in pieces]


def encode_for_detail(vae: AutoencoderKLWan, preset: Preset, clip: Clip, leads: bool = False) -> Encoded:
    """Square crops of the clip at any zoom that it has the pixels for, each with its own proxies; fp16.

    A piece has one crop and one ratio, drawn from the clip's content: all ratios in turn, so that a clip of enough
    pieces has them all. One that `leads` its corpus begins with the largest: of few short clips none might have it, and
    the adapter would be refused where its own preset climbs by that.
    """
    geometry, time_ratio = preset.geometry, preset.proxy.time_ratio
    latents, tokens = preset.training_crop
    side, length = tokens * geometry.token_pixels, (latents - 1) * geometry.temporal + 1
    fps = frame_rate(preset, "detail")
    pieces = cut(math.ceil(clip.seconds * fps), length, length, geometry.temporal)
    _check_length(clip, pieces, (length - 1) / fps)
    most = min(clip.width, clip.height) / side
    if most < 1:
        raise InputError(f"{_sized(clip)}: detail needs {side} px a side or more")
    rng = random.Random(clip.sha256)
    ratios = [*preset.training_ratios, preset.training_ratios[-1]]
    rng.shuffle(ratios)
    if leads:
        ratios.insert(0, ratios.pop(ratios.index(max(ratios))))
    crops = [Crop(most ** rng.random(), rng.random(), rng.random()) for _ in pieces]
    drawn = list(zip(crops, cycle(ratios)))
    frames = read_clip(clip, fps, sum(pieces), (side, side), crop_at=lambda k: drawn[k // length][0])
    return [_detail_sample(vae, islice(frames, length), ratio, time_ratio) for _, ratio in drawn]


def _sized(clip: Clip) -> str:
    return f"{clip.path} is {clip.width:.0f}x{clip.height:.0f}"


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
    return {n: encode_clips(vae, x.transpose(0, 1)[None])[0].half() for n, x in pixels.items()}, {"ratio": str(ratio)}
