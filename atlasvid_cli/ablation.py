"""`atlasvid bench --ablation`: what each part of the method is worth, on held-out prompts and seeds (DESIGN §9).

Every arm takes the same weights, prompts, seeds and, but for the one that changes it, the same proxies, from which
sampled arms also start (the preset's `strength`). An arm called untrained samples in a way that its adapters were not
trained for.
"""

import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from . import pipeline, store, world
from .ablation_arms import NATIVE, RECONSTRUCTED, Arm, arms
from .artefacts import job_hash, proxy_metadata
from .bench import native_render_seconds
from .console import Console
from .cost import EFFICIENCY, GIB, check_resources
from .experts import experts_of
from .machine import gemm_rate, peak_bytes, reset_peak
from .plan import Plan, Request, make_plan
from .quality import (
    Assessment,
    assess,
    check,
    frames_at,
    held_out_prompts,
    looked_at,
    proxy_frames,
    seams,
)
from .session import Session

SAMPLED_SECONDS = 60.0  # of native, where it is projected
APART = 1000  # seeds of a prompt are this far apart, so that more prompts or seeds leave the others' as they are
COLUMNS = (
    "adherence_percent",
    "spread",
    "missing_percent",
    "repeated_percent",
    "seam",
    "seam_within",
    "seam_chance",
    "coherence_db",
    "edge_width_px",
    "seconds",
    "peak_gib",
)


@dataclass(frozen=True)
class Seen:
    """One video of an arm: what was seen, the seconds that it and its proxy took, the most bytes held meanwhile."""

    assessment: Assessment
    seconds: float
    peak_bytes: int


def run(
    request: Request,
    count: int,
    seeds: int,
    budget: float,
    folder: Path,
    console: Console,
    large: Request | None = None,
) -> dict[str, Any]:
    """Makes `count` held-out prompts with `seeds` seeds each in every arm, and the first of them once as `large` asks;
    videos in `folder` that are done are kept, and looked at again. Where one of native's would take more than `budget`
    seconds, only its time is told, projected.
    """
    plan = check(request, "--ablation")
    tables = [(request, count, seeds, folder)] + ([(large, 1, 1, folder / "large")] if large else [])
    for wanted, prompts, repeats, _ in tables:
        check_resources(make_plan(wanted), folder.absolute(), videos=prompts * repeats)
    with store.results(folder):
        rows, *at_large = ([_row(*table, arm, budget, console) for arm in arms(request, console)] for table in tables)
    facts = {name: plan.summary[name] for name in ("preset", "size", "seconds")}
    facts |= {"prompts": count, "seeds": seeds, "arms": rows}
    if large:
        facts["large"] = {"size": f"{large.width}x{large.height}", "seconds": float(large.seconds), "arms": at_large[0]}
    return facts


def _row(
    request: Request, count: int, seeds: int, folder: Path, arm: Arm, budget: float, console: Console
) -> dict[str, Any]:
    """An arm's line of a table."""
    console.note(f"{arm.name}, {request.width}x{request.height}")
    takes = _native_takes(make_plan(request)) if arm.name == NATIVE else 0.0
    if takes > budget and not _all_made(arm, request, count, seeds, folder):
        video = folder / _folder_name(RECONSTRUCTED) / "0.mp4"
        seconds = round(native_render_seconds(request, min(budget, SAMPLED_SECONDS), video), 1)
        return {"arm": f"{NATIVE} (projected)", **dict.fromkeys(COLUMNS), "seconds": seconds}
    by_seed: list[list[Seen]] = [[] for _ in range(seeds)]
    for k, job, attributes in jobs(arm, request, count, seeds):
        by_seed[k].append(look(arm, job, attributes, folder, console))
    columns = summary(by_seed)
    if arm.name in (NATIVE, RECONSTRUCTED):
        columns["coherence_db"] = None  # they never saw that proxy
    return {"arm": arm.name + ("" if arm.trained else " (untrained)"), **columns}


def jobs(arm: Arm, request: Request, count: int, seeds: int) -> Iterator[tuple[int, Plan, world.Attributes]]:
    """Every video of an arm: the number of its seed, its plan and what its prompt asks for."""
    for i, (prompt, attributes) in enumerate(held_out_prompts(count)):
        for k in range(seeds):
            own = dataclasses.replace(request, prompt=prompt, seed=k * APART + i)
            yield k, make_plan(own, preset=arm.session.preset), attributes


def _all_made(arm: Arm, request: Request, count: int, seeds: int, folder: Path) -> bool:
    made = folder / _folder_name(arm.name)
    return all(
        _kept(video := made / f"{plan.request.seed}.mp4", video, job_hash(arm.session, plan))
        for _, plan, _ in jobs(arm, request, count, seeds)
    )


def look(arm: Arm, plan: Plan, attributes: world.Attributes, folder: Path, console: Console) -> Seen:
    """Makes a video where it is not there yet, and looks at it."""
    seed = str(plan.request.seed)
    # the same for all arms that sample it alike
    proxy = folder / ("proxy" if plan.proxy.scaled_time else "proxy-unscaled") / seed
    job = job_hash(arm.session, plan)
    # the preview is the VAE's work
    proxy_job = f"{proxy_metadata(arm.session, plan)['key']} {arm.session.vae_hash}"
    sample = partial(pipeline.make_proxy, arm.session, plan, proxy, console)
    warm = partial(_warm_proxy, arm.session, plan, console)
    proxy_seconds, proxy_peak = _timed(proxy, proxy / "proxy.mp4", proxy_job, warm, sample)
    work = folder / _folder_name(arm.name) / seed
    video = work.with_suffix(".mp4")
    make = partial(arm.make, plan, attributes, proxy, video)
    seconds, peak = _timed(work, video, job, partial(arm.warm, plan), make)
    frames = frames_at(video, looked_at(plan))
    seen = assess(plan, frames, proxy_frames(plan, proxy / "proxy.mp4"), attributes)
    if arm.name in (NATIVE, RECONSTRUCTED):
        return Seen(seen, seconds, peak)
    return Seen(seen, proxy_seconds + seconds, max(proxy_peak, peak))


def _warm_proxy(session: Session, plan: Plan, console: Console) -> None:
    """Loads what a proxy needs, and encodes its prompt, which other seeds find encoded."""
    embeddings = session.embeddings((plan.request.prompt, plan.request.negative_prompt)[: plan.proxy.passes], console)
    session.vae()
    experts_of(session, plan, embeddings, console)(1000.0)  # last, since on a GPU one part stays: the one needed first


def _native_takes(plan: Plan) -> float:
    """Seconds that full attention would take for a video, about."""
    return plan.native_flops(plan.proxy.steps, plan.proxy.passes) / (gemm_rate() * EFFICIENCY)


def _folder_name(arm: str) -> str:
    return arm.replace(" ", "-").replace(",", "").replace("'", "")


def _kept(work: Path, made: Path, job: str) -> tuple[float, int] | None:
    """What `_timed` recorded of the file `made`, where the same job made it."""
    try:
        found = json.loads(work.with_suffix(".json").read_text(encoding="utf-8"))
        return (found["seconds"], found["peak_bytes"]) if found["job"] == job and made.exists() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _timed(
    work: Path, made: Path, job: str, warm: Callable[[], object], make: Callable[[], object]
) -> tuple[float, int]:
    """Seconds and peak bytes of making the file `made`, which is kept where the same `job` made it.

    It is made from nothing, in an empty folder `work`: what an interrupted run left would make it look fast.
    """
    if kept := _kept(work, made, job):
        return kept
    shutil.rmtree(work, ignore_errors=True)
    made.unlink(missing_ok=True)
    store.run_directory(work.parent, work.name)
    warm()
    reset_peak()
    started = time.monotonic()
    make()
    seconds, peak = round(time.monotonic() - started, 2), peak_bytes()
    store.write_json(work.with_suffix(".json"), {"job": job, "seconds": seconds, "peak_bytes": peak})
    return seconds, peak


def summary(by_seed: list[list[Seen]]) -> dict[str, Any]:
    """The columns of an arm, over all prompts and seeds: percent of the attributes that came true, with the standard
    deviation over seeds; percent of the videos with no object and with more than one; seams over all, the same within
    windows, and what chance does to seams; mean coherence; the median edge width where there is an object; median
    seconds; the highest peak."""
    everything = [seen for row in by_seed for seen in row]
    assessments = [seen.assessment for seen in everything]
    adherence = [100 * float(np.mean([list(s.assessment.right.values()) for s in row])) for row in by_seed]
    widths = [a.edge_width for a in assessments if a.edge_width is not None]
    values = (
        round(float(np.mean(adherence)), 1),
        round(float(np.std(adherence, ddof=1)), 1) if len(adherence) > 1 else None,
        round(100 * float(np.mean([a.repetition < 0 for a in assessments]))),
        round(100 * float(np.mean([a.repetition > 0 for a in assessments]))),
        *(v and round(v, 2) for v in seams(assessments)),
        round(float(np.mean([a.coherence for a in assessments])), 1),
        round(float(np.median(widths)), 1) if widths else None,
        round(float(np.median([s.seconds for s in everything])), 1),
        round(max(s.peak_bytes for s in everything) / GIB, 2),
    )
    return dict(zip(COLUMNS, values, strict=True))


def row(arm: dict[str, Any]) -> dict[str, str]:
    """An arm's columns as a terminal of 80 has room for them."""

    def shown(key: str, digits: int) -> str:
        value = arm.get(key)
        return "" if value is None else f"{value:.{digits}f}"

    return {
        "arm": arm["arm"].replace(" (untrained)", "*"),
        "right": "±".join(filter(None, (shown("adherence_percent", 0), shown("spread", 0)))),
        "no/many": "/".join(filter(None, (shown("missing_percent", 0), shown("repeated_percent", 0)))),
        "seam": "±".join(filter(None, (shown("seam", 2), shown("seam_chance", 1)))),
        "dB": shown("coherence_db", 1),
        "px": shown("edge_width_px", 1),
        "s": shown("seconds", 1),
        "GiB": shown("peak_gib", 1),
    }
