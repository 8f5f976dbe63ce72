"""What climbs from saved latents: the plan above them, the run directory that it fills, and the video."""

import dataclasses
import math
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

from . import pipeline
from .artefacts import (
    check_base,
    check_latents,
    describe,
    is_current,
    latents_shape,
    level_path,
    result_metadata,
    result_of_region,
    result_path,
)
from .console import Console
from .cost import check_resources
from .errors import UsageError
from .outputs import check_replaceable, is_finished, record_of, video_tags
from .plan import Plan, Request, make_plan
from .presets import load_preset
from .prompts import slug
from .session import Session
from .shapes import Grid
from .store import lock, run_directory
from .targets import check_writable, is_made, sheet_of

ASPECT_TOLERANCE = 0.06  # in logarithm: what rounding to tokens and even pixels can make of an aspect


def plan_from_proxy(path: Path, request: Request) -> Plan:
    """A plan whose levels climb from a saved proxy (or an earlier result), known by its header: length, prompt and seed
    come from it. UsageError for a size that would show a part of it only."""
    patch, (t, h, w), known = load_preset(request.preset).geometry.patch, latents_shape(path), describe(path)
    grid, aspect = Grid(t, h // patch, w // patch), int(known["width"]) / int(known["height"])
    if not _alike(request.width / request.height, aspect):
        height = math.sqrt(request.width * request.height / aspect)
        width, height = 2 * round(height * aspect / 2), 2 * round(height / 2)
        if _alike(request.height / request.width, aspect):
            width, height = request.height, request.width  # turned by mistake
        like = f"{width}x{height}"
        raise UsageError(
            f"{path} is {known['width']}x{known['height']} and {request.width}x{request.height} has another shape; give"
            f" one like --res {like}"
        )
    plan = make_plan(request, grid, Fraction(known["fps"]))
    shown = tuple(int(known[side]) * int(known["scale"]) for side in ("width", "height"))
    if plan.proxy_size != shown:  # another size than it was made for: grids, rounded up, know less of it than pixels
        sides = zip((request.width, request.height), shown, strict=True)
        ratio = max(Fraction(side * plan.scale, of) for side, of in sides)
        plan = make_plan(request, grid, Fraction(known["fps"]), ratio=max(Fraction(1), ratio))
    if plan.target.h < grid.h or plan.target.w < grid.w:
        size = "x".join(map(str, shown))
        raise UsageError(
            f"{path} was generated at {size}, larger than {request.width}x{request.height}; give --res {size} or more,"
            " or the proxy that it was made from"
        )
    return plan


def _alike(aspect: float, other: float) -> bool:
    return abs(math.log(aspect / other)) <= ASPECT_TOLERANCE


def run_folder(session: Session, plan: Plan, latents: Path, runs: Path) -> Path:
    """The run directory, in `runs`, of what is made above saved latents: named by all that decides the result.

    A region's is that of its video, which the same options made: with this seed, or with the latents' own; where
    neither is there, the run that the latents lie in.
    """
    known = describe(latents)

    def own(plan: Plan) -> Path:
        return runs / f"{slug(latents.stem)}-{result_metadata(session, plan, known)['key']}"

    if not plan.is_region:
        return own(plan)
    whole = dataclasses.replace(plan.request, region=None, frames=None)
    seeds = (plan.request.seed, int(known["seed"]))
    made = [own(plan_from_proxy(latents, dataclasses.replace(whole, seed=seed))) for seed in seeds]
    around = latents.absolute().parent
    if level_path(plan, around, len(plan.levels)).exists():
        made.append(around)
    return next((run for run in made if level_path(plan, run, len(plan.levels)).exists()), made[-1])


def refine_saved(latents: Path, plan: Plan, target: Path, run_dir: Path | None, console: Console) -> dict[str, Any]:
    """Saved latents -> video `target`, or of a region that video with a part sampled again. Returns the event."""
    if not (made := is_made(target)):  # what is finished needs no room
        check_resources(plan, target.parent, run_dir)
    check_writable(target)
    if run_dir:
        check_writable(run_dir / "detail.safetensors", "--run-dir")
    session = Session.of(plan.request, console)
    known = check_latents(latents, session)
    for lora in plan.request.loras:
        if lora.expert == "high":
            console.note(f"{lora.path}@high changes nothing here: detail is of the low-noise expert alone")
    folder = run_dir or run_folder(session, plan, latents, target.parent / "runs")
    if plan.is_region:
        check_base(plan, folder)
        (x, y, w, h), (first, end) = plan.region_shown
        console.note(
            f"of the video in {folder} what lies in tokens is sampled again: {w}x{h} pixels from ({x}, {y}), frames"
            f" {first}:{end}"
        )
        if str(plan.request.seed) == describe(level_path(plan, folder, len(plan.levels)))["seed"]:
            console.warn("with the seed of the video the part comes out much as it was; give another --seed")
        wanted = result_of_region(session, plan, known, folder)
    else:
        wanted = result_metadata(session, plan, known)
    result = result_path(plan, folder, wanted)
    event = {"prompt": known["prompt"], "seed": plan.request.seed, "status": "ok", "video": str(target)}
    event |= {"preview": str(sheet_of(target)), "latents": str(result), "run_dir": str(folder)}
    tagged = video_tags(session, wanted, plan.target_latents, plan.request.codec)
    if is_current(result, wanted) and is_finished(target, tagged, plan.frames):
        console.note(f"{target} was finished before")
        return event | {"status": "skipped"}
    if made:
        check_resources(plan, target.parent, folder)
    check_replaceable(target, wanted, plan.request.codec)
    with lock(run_directory(folder.parent, folder.name)):
        record = record_of(folder)
        begun = time.monotonic()
        pipeline.refine(session, plan, latents, folder, console)
        refined = time.monotonic()
        pipeline.finish(session, result, target, plan.request, console, folder)
        if not plan.is_region and record.get("key") != wanted["key"]:  # a region's run is the whole video's
            spent = {"detail": refined - begun, "decode": time.monotonic() - refined}
            pipeline.keep_record(session, plan, folder, result, target, spent)
    return event
