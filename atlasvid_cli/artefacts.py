"""What latents files say of themselves, where they lie in a run directory, and when one is current.

A file's `key` is the hash of all that decides its values: plan, prompts, weights, and the key of the level below.
"""

import re
from collections.abc import Callable
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import torch

from . import __version__, store, tensor_file
from .decode_cost import start_tile
from .errors import InputError, UsageError
from .parse import MAX_FPS, MAX_SECONDS, MAX_SEED, MAX_SIDE_PX
from .plan import Plan
from .presets import load_preset, preset_names
from .refine import Region
from .results import state_of
from .session import Session
from .stages import Stage

FORMAT = "atlasvid-latents/1"


def _number(most: int, whole: bool = True) -> Callable[[str], object]:
    """Reads a number above zero and up to `most`, or raises ValueError: the file may be anybody's."""

    def read(text: str) -> Fraction:
        if not re.fullmatch(r"\d{1,19}" if whole else r"\d{1,19}(/\d{1,19})?", text, re.ASCII):
            raise ValueError(text)  # Fraction("1e999999999") takes for ever
        if not 0 < (value := Fraction(text)) <= most:
            raise ValueError(text)
        return value

    return read


# what readers of a latents file rely on
FIELDS: dict[str, Callable[[str], object]] = {
    **dict.fromkeys(("kind", "version", "preset", "model", "vae", "dtype", "attention"), str),
    **dict.fromkeys(("prompt", "negative_prompt", "below", "key"), str),
    "seed": lambda text: text == "0" or _number(MAX_SEED)(text),
    "seconds": _number(MAX_SECONDS, whole=False),
    "fps": _number(MAX_FPS, whole=False),
    "target_fps": _number(MAX_FPS),
    "frames": _number(MAX_SECONDS * MAX_FPS),
    **dict.fromkeys(("width", "height"), _number(MAX_SIDE_PX)),
    "scale": _number(MAX_SIDE_PX),
}


def job_hash(session: Session, plan: Plan) -> str:
    """Stands for all that decides a finished video: the plan, the prompts, the weights, the size and the codec."""
    return store.artefact_hash({"run": run_hash(session, plan), "codec": plan.request.codec})


def run_hash(session: Session, plan: Plan) -> str:
    """Stands for all that decides what lies in a run directory: two jobs that differ never share one."""
    return store.artefact_hash(
        {
            **plan.key(),
            "size": plan.summary["size"],
            "prompts": [plan.request.prompt, plan.request.negative_prompt],
            "weights": weights_of(session, plan),
            **session.arithmetic,
        }
    )


def weights_of(session: Session, plan: Plan) -> dict[str, Any]:
    """Identities of all weights that make a video; `starts` are those by which levels start in pixels."""
    starts = [session.pixels_hash(start_tile(plan, level), level.entry) for level in plan.levels if level.in_pixels]
    return {
        "proxy": session.hash("proxy"),
        "detail": session.hash("detail"),
        "starts": starts,
        "vae": session.vae_hash,
    }


def proxy_metadata(session: Session, plan: Plan) -> dict[str, str]:
    """What the proxy of a plan will say of itself, sampled or encoded from the request's clip."""
    request, clip = plan.request, plan.request.clip
    encoder = session.vae_hash if clip else ""
    prompts = request.prompt, request.negative_prompt
    metadata = stage_metadata(session, plan, plan.proxy, "proxy", *prompts, encoder=encoder)
    return metadata | ({"clip": clip.path.name} if clip else {})


def result_metadata(session: Session, plan: Plan, proxy: dict[str, str]) -> dict[str, str]:
    """What the latents made above a proxy with this metadata will say of themselves, before anything is sampled."""
    metadata = proxy
    for stage in plan.levels:
        metadata = level_metadata(session, plan, stage, metadata)
    return metadata


def check_base(plan: Plan, run_dir: Path) -> None:
    """Raises InputError where a run does not hold the finished video of which a region is to be sampled again."""
    if not (base := level_path(plan, run_dir, len(plan.levels))).exists():
        raise InputError(
            f"{base} does not exist: run refine with the same options and without --region first, or name the run that"
            " made the video by --run-dir"
        )


def result_of_region(session: Session, plan: Plan, proxy: dict[str, str], run_dir: Path) -> dict[str, str]:
    """`result_metadata` of latents of which a region is sampled again, in the run that made them."""
    base = level_path(plan, run_dir, len(plan.levels))
    below = describe(level_path(plan, run_dir, len(plan.levels) - 1)) if len(plan.levels) > 1 else proxy
    found = level_metadata(session, plan, plan.levels[-1], below)
    return region_metadata(plan, describe(base), found)


def read_latents(
    path: Path, session: Session, bound_to: Literal["model", "vae"] = "model"
) -> tuple[torch.Tensor, dict[str, str]]:
    """Latents (C, T, H, W) fp32 of a file of ours that passes `check_latents`, and its metadata."""
    metadata = check_latents(path, session, bound_to)
    return tensor_file.open_tensors(path, _expected(session))[0]["latents"], metadata


def check_latents(path: Path, session: Session, bound_to: Literal["model", "vae"] = "model") -> dict[str, str]:
    """The metadata of a file of ours, from its header alone; InputError for other tensors and those of another model.

    To be decoded they need only be of the same VAE, as a clip's always do, and what `--lora` adds is free.
    """
    tensor_file.check_header(path, _expected(session))
    metadata = describe(path)
    tensor_file.check_artefact(metadata, {"preset": session.preset.name}, path)
    if bound_to == "vae" or "clip" in metadata:
        expected = {"vae": session.vae_hash}
    else:
        expected = {"model": session.model_hash(metadata["kind"])}
    tensor_file.check_artefact(metadata, expected, path)
    return metadata


def _expected(session: Session) -> dict[str, tuple[str, tensor_file.Shape]]:
    return {"latents": ("F32", (session.preset.transformer.channels, None, None, None))}


def describe(path: Path) -> dict[str, str]:
    """The metadata of a latents file, from its header alone. Raises InputError for any other file."""
    metadata, _ = tensor_file.read_header(path)
    tensor_file.check_artefact(metadata, {"format": FORMAT}, path)
    for name, kind in FIELDS.items():
        try:
            kind(metadata[name])
        except (KeyError, ValueError, ZeroDivisionError):
            raise InputError(f"{path} does not say its {name}, or wrongly: make it again") from None
    return metadata


def latents_shape(path: Path) -> tuple[int, int, int]:
    """Latents (t, h, w) of a file, from its header alone. Raises InputError where it holds none."""
    entries = tensor_file.read_header(path)[1]
    if "latents" not in entries or len(shape := entries["latents"].shape) != 4 or not all(shape):
        raise InputError(f"{path} holds no latents of a video: give a proxy or an earlier result")
    return shape[1], shape[2], shape[3]


def check_preset(path: Path, preset: str | None) -> None:
    """Raises InputError where saved latents were made with another preset than the one asked for, or, where none is,
    with one that is not here."""
    made = describe(path)["preset"]
    if preset and load_preset(preset).name != made:
        raise InputError(f"{path} was made with preset {made} and cannot be used with {preset}; leave --preset out")
    if not preset and made not in preset_names():
        raise InputError(f"{path} was made with preset {made}, which does not come with atlasvid; give it by --preset")


def request_defaults(path: Path) -> dict[str, Any]:
    """What `refine` takes over from a saved proxy: preset, seed, fps and the exact duration."""
    metadata = describe(path)
    return {
        "preset": metadata["preset"],
        "seed": int(metadata["seed"]),
        "fps": int(metadata["target_fps"]),
        "seconds": Fraction(metadata["seconds"]),
    }


def stage_metadata(
    session: Session,
    plan: Plan,
    stage: Stage,
    kind: str,
    prompt: str,
    negative: str,
    below: str = "",
    encoder: str = "",
) -> dict[str, str]:
    """Metadata of a stage's latents. `key` is the hash of all that decides them: of a clip's, which have none `below`,
    the `encoder` too. Size and fps are the latents' own, a proxy's size that of what the video shows of it, in even
    numbers, so that its preview plays everywhere."""
    weights = session.hash(kind)
    fields = {**plan.key(stage), "prompt": prompt, "negative": negative, "model": weights, "below": below or encoder}
    fields |= session.arithmetic
    if stage.in_pixels:
        fields["start"] = session.pixels_hash(start_tile(plan, stage), stage.entry)
    geometry, grid, last = session.preset.geometry, stage.grid, stage is plan.levels[-1]
    pixels = geometry.token_pixels
    width, height = plan.request.width if last else grid.w * pixels, plan.request.height if last else grid.h * pixels
    if kind == "proxy":
        width, height = (side - side % 2 or side for side in plan.proxy_size)
    return {
        "format": FORMAT,
        "kind": kind,
        "version": __version__,
        "preset": session.preset.name,
        "model": session.model_hash(kind),
        "vae": session.vae_hash,
        **session.arithmetic,
        "prompt": prompt,
        "negative_prompt": negative,
        "seed": str(plan.request.seed),
        "seconds": str(plan.request.seconds),
        "target_fps": str(plan.fps),
        "fps": str(plan.proxy_fps if kind == "proxy" else Fraction(plan.fps)),
        "frames": str(plan.frames if last else (grid.t - 1) * geometry.temporal + 1),
        "width": str(width),
        "height": str(height),
        "scale": str(plan.scale if last else 1),
        "below": below,
        "key": store.artefact_hash(fields),
    }


def level_metadata(session: Session, plan: Plan, stage: Stage, below: dict[str, str]) -> dict[str, str]:
    return stage_metadata(session, plan, stage, "detail", below["prompt"], below["negative_prompt"], below["key"])


def region_metadata(plan: Plan, base: dict[str, str], metadata: dict[str, str]) -> dict[str, str]:
    region = {"of": metadata["key"], "base": base["key"], "region": plan.request.region, "frames": plan.request.frames}
    return metadata | {"key": store.artefact_hash(region)}


def is_current(path: Path, metadata: dict[str, str]) -> bool:
    if not path.exists():
        return False
    try:
        return describe(path)["key"] == metadata["key"]
    except InputError:
        return False  # damaged or foreign: made anew


def check_ours(path: Path, metadata: dict[str, str]) -> None:
    """UsageError where a file, or the state that its stage goes on from, is not of the latents with this metadata: of
    another job, hours of work that no run takes over, or something that no run has made."""
    for kept, form in ((path, FORMAT), (state_of(path), tensor_file.STATE)):
        with suppress(InputError):  # missing, or damaged: made anew
            found, _ = tensor_file.read_header(kept)
            if found.get("format") != form:
                raise UsageError(f"{kept} is not of a run; give another --run-dir, or move it away")
            if found.get("key", metadata["key"]) != metadata["key"]:
                raise UsageError(f"{kept} is of another job; give another --run-dir, or move it away")


def check_levels_ours(session: Session, plan: Plan, proxy: dict[str, str], run_dir: Path) -> None:
    """`check_ours` for every level above a proxy with this metadata, before the first is sampled."""
    metadata = proxy
    for number, stage in enumerate(plan.levels, start=1):
        metadata = level_metadata(session, plan, stage, metadata)
        check_ours(level_path(plan, run_dir, number), metadata)


def region_of(
    session: Session, plan: Plan, stage: Stage, path: Path, below: str, metadata: dict[str, str]
) -> tuple[Region, dict[str, str]]:
    """The region of the finished video at `path`, made above the latents with the key `below`."""
    latents, base = read_latents(path, session)
    geometry, grid = session.preset.geometry, stage.grid
    size = (grid.t, grid.h * geometry.patch, grid.w * geometry.patch)
    if latents.shape[1:] != size or base["below"] != below:
        raise InputError(
            f"{path} was made from something else: give the --res of the video and the proxy that it was made from, or"
            " run refine without --region first"
        )
    return Region(*plan.region, latents), region_metadata(plan, base, metadata)


def level_path(plan: Plan, run_dir: Path, number: int) -> Path:
    return run_dir / ("detail.safetensors" if number == len(plan.levels) else f"level-{number}.safetensors")


def result_path(plan: Plan, run_dir: Path, metadata: dict[str, str]) -> Path:
    """Where the last latents of a plan, which will have this metadata, lie: each region has a file of its own."""
    if plan.is_region:
        return run_dir / f"detail-region-{metadata['key']}.safetensors"
    return level_path(plan, run_dir, len(plan.levels))
