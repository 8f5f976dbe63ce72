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
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import WanPipeline

from . import pipeline, store, world
from .artefacts import job_hash, proxy_metadata, read_latents
from .bench import native_render_seconds
from .console import Console
from .cost import EFFICIENCY, GIB, check_resources, offload_of, vae_tile
from .decode import decode_stream
from .encode import encode_stream
from .machine import gemm_rate, peak_rss, reset_peak
from .plan import Plan, Request, make_plan
from .presets import Preset
from .quality import (
    Assessment,
    Attributes,
    assess,
    check,
    frames_at,
    held_out_prompts,
    looked_at,
    proxy_frames,
    seam_ratio,
    true_scene,
)
from .session import Session
from .video import write_video
from .weights import load_scheduler, load_text, load_transformer

SAMPLED_SECONDS = 60.0  # of native, where it is projected
APART = 1000  # seeds of a prompt are this far apart, so that more prompts or seeds leave the others' as they are


def _detail(**changes: Any) -> Callable[[Preset], Preset]:
    return lambda preset: dataclasses.replace(preset, detail=dataclasses.replace(preset.detail, **changes))


def _unscaled_time(preset: Preset) -> Preset:
    return dataclasses.replace(preset, proxy=dataclasses.replace(preset.proxy, scaled_time=False))


def _half_the_steps(preset: Preset) -> Preset:
    levels = (preset.detail.first, preset.detail.upper)
    first, upper = (dataclasses.replace(level, steps=-(-level.steps // 2)) for level in levels)
    return _detail(first=first, upper=upper)(preset)


def _tiles(preset: Preset) -> Preset:
    return _detail(proxy_attention=False, shifted=False, windows=preset.detail.windows[:1])(preset)


FULL = "the full method"
# arms that sample detail, as changes of the preset, and whether its adapters were trained for that
SAMPLED: dict[str, tuple[Callable[[Preset], Preset], bool]] = {
    FULL: (lambda preset: preset, True),
    "half the detail steps": (_half_the_steps, True),
    "without proxy attention": (_detail(proxy_attention=False), False),
    "without shifts": (_detail(shifted=False), False),
    "without scaled positions": (_detail(scaled_positions=False), False),
    "without scaled time": (_unscaled_time, False),
    "proxy at the detail's timestep": (_detail(clean_proxy=False), False),
    "no detail adapter": (_detail(lora=None), False),
    "tiles, each alone": (_tiles, False),
}
RECONSTRUCTED, UPSAMPLED, NATIVE = "a true render through the VAE", "upsampled proxy", "native full attention"


@dataclass(frozen=True)
class Arm:
    """How an arm makes the video of a prompt above the proxy in a run directory:
    `make(plan, prompt, attributes, proxy, video)`. `warm` loads what it needs, which is not timed."""

    name: str
    session: Session
    trained: bool
    warm: Callable[[Plan], object]
    make: Callable[[Plan, str, Attributes, Path, Path], object]


@dataclass(frozen=True)
class Seen:
    """One video of an arm: what was seen, the seconds that it and its proxy took, the most bytes held meanwhile."""

    assessment: Assessment
    seconds: float
    peak_bytes: int


def run(request: Request, count: int, seeds: int, budget: float, folder: Path, console: Console) -> dict[str, Any]:
    """Makes `count` held-out prompts with `seeds` seeds each in every arm; videos in `folder` that are done are kept,
    and looked at again. Where one of native's would take more than `budget` seconds, only its time is told, projected.
    """
    plan = check(request, "--ablation")
    check_resources(plan, folder.absolute(), videos=count * seeds)
    rows: list[dict[str, Any]] = []
    with store.results(folder):
        for arm in arms(request, console):
            console.note(arm.name)
            if (
                arm.name == NATIVE
                and _native_takes(plan) > budget
                and not _all_made(arm, request, count, seeds, folder)
            ):
                video = folder / _folder_name(RECONSTRUCTED) / "0.mp4"
                seconds = round(native_render_seconds(request, min(budget, SAMPLED_SECONDS), video), 1)
                rows.append({**dict.fromkeys(rows[-1]), "arm": f"{NATIVE} (projected)", "seconds": seconds})
                continue
            by_seed: list[list[Seen]] = [[] for _ in range(seeds)]
            for k, job, prompt, attributes in jobs(arm, request, count, seeds):
                by_seed[k].append(look(arm, job, prompt, attributes, folder, console))
            columns = summary(by_seed)
            if arm.name in (NATIVE, RECONSTRUCTED):
                columns["coherence_db"] = None  # they never saw that proxy
            rows.append({"arm": arm.name + ("" if arm.trained else " (untrained)"), **columns})
    facts = {name: plan.summary[name] for name in ("preset", "size", "seconds")}
    return {**facts, "prompts": count, "seeds": seeds, "arms": rows}


def jobs(arm: Arm, request: Request, count: int, seeds: int) -> Iterator[tuple[int, Plan, str, Attributes]]:
    """Every video of an arm: the number of its seed, its plan, its prompt and what that asks for."""
    for i, (prompt, attributes) in enumerate(held_out_prompts(count)):
        for k in range(seeds):
            plan = make_plan(dataclasses.replace(request, seed=k * APART + i), preset=arm.session.preset)
            yield k, plan, prompt, attributes


def _all_made(arm: Arm, request: Request, count: int, seeds: int, folder: Path) -> bool:
    made = folder / _folder_name(arm.name)
    return all(
        _kept(video := made / f"{plan.request.seed}.mp4", video, job_hash(arm.session, plan, prompt, ""))
        for _, plan, prompt, _ in jobs(arm, request, count, seeds)
    )


def arms(request: Request, console: Console) -> Iterator[Arm]:
    """Every arm; of those that sample, all that the preset does not come to anyway."""
    base = Session(request.preset, request.model_path)
    yield Arm(RECONSTRUCTED, base, True, lambda plan: base.vae(), partial(reconstruct, base))
    yield Arm(UPSAMPLED, base, True, lambda plan: base.vae(), partial(upsample, base))
    for name, (change, trained) in SAMPLED.items():
        if name == FULL or change(base.preset) != base.preset:
            yield _sampled(name, Session(change(base.preset), request.model_path), trained, console)
    yield _native(base)


def _sampled(name: str, session: Session, trained: bool, console: Console) -> Arm:
    def warm(plan: Plan) -> None:
        session.detail_models(offload_of(plan), console)
        session.vae()

    def make(plan: Plan, prompt: str, attributes: Attributes, proxy: Path, video: Path) -> None:
        latents = pipeline.refine(session, plan, proxy / "proxy.safetensors", video.with_suffix(""), console)
        pipeline.decode(session, latents, video, plan.request.codec, console)

    return Arm(name, session, trained, warm, make)


def _native(session: Session) -> Arm:
    """diffusers' WanPipeline with the base weights under full attention at the asked size, with the proxy's steps."""

    @cache
    def load() -> WanPipeline:
        text, model = load_text(session.folder), load_transformer(session.folder, dtype=session.dtype)
        scheduler = load_scheduler(session.folder, session.preset.proxy.flow_shift)
        pipe = WanPipeline(*text, session.vae(), scheduler, model).to(session.device)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def make(plan: Plan, prompt: str, attributes: Attributes, proxy: Path, video: Path) -> None:
        grid, geometry = plan.native_grid, session.preset.geometry
        frames = load()(
            prompt,
            "",
            height=grid.h * geometry.token_pixels,
            width=grid.w * geometry.token_pixels,
            num_frames=(grid.t - 1) * geometry.temporal + 1,
            num_inference_steps=plan.proxy.steps,
            guidance_scale=plan.proxy.guidance_scale,
            generator=torch.Generator().manual_seed(plan.request.seed),
            output_type="pt",
        ).frames[0]
        write_video(video, iter(frames.float().cpu().split(1)), **_shape(plan))

    return Arm(NATIVE, session, True, lambda plan: load(), make)


def reconstruct(session: Session, plan: Plan, prompt: str, attributes: Attributes, proxy: Path, video: Path) -> None:
    """A true render encoded and decoded again: what the VAE costs, and so the best that any arm can reach."""
    scene, grid, geometry = true_scene(plan, attributes), plan.target, session.preset.geometry
    width, height = grid.w * geometry.token_pixels, grid.h * geometry.token_pixels
    window = (0.0, 0.0, height / (plan.request.height * plan.scale))
    times = torch.arange((grid.t - 1) * geometry.temporal + 1) / plan.fps
    latents = encode_stream(session.vae(), (world.render(scene, t[None], height, width, window)[:, 0] for t in times))
    tile = vae_tile(session.preset, *latents.shape[2:])
    frames = decode_stream(session.vae(), latents, tile, video.parent)
    sizes = plan.request.height * plan.scale, plan.request.width * plan.scale
    cropped = (chunk[..., : sizes[0], : sizes[1]] for chunk in frames)
    write_video(video, (F.avg_pool2d(chunk, plan.scale) for chunk in cropped), **_shape(plan))


def upsample(session: Session, plan: Plan, prompt: str, attributes: Attributes, proxy: Path, video: Path) -> None:
    """The proxy made as large as the video by bicubic interpolation, each of its frames shown until the next."""
    latents, _ = read_latents(proxy / "proxy.safetensors", session, "vae")
    width, height = plan.proxy_size
    size = plan.request.height, plan.request.width

    def frames() -> Iterator[torch.Tensor]:
        tile = vae_tile(session.preset, *latents.shape[2:])
        for chunk in decode_stream(session.vae(), latents, tile, video.parent):
            large = F.interpolate(chunk[..., :height, :width], size=size, mode="bicubic").clamp(0, 1)
            yield large.repeat_interleave(plan.proxy.time_ratio, dim=0)

    write_video(video, frames(), **_shape(plan))


def _shape(plan: Plan) -> dict[str, Any]:
    request = plan.request
    size = {"width": request.width, "height": request.height, "fps": plan.fps, "frame_count": plan.frames}
    return {**size, "codec": request.codec}


def look(arm: Arm, plan: Plan, prompt: str, attributes: Attributes, folder: Path, console: Console) -> Seen:
    """Makes a video where it is not there yet, and looks at it."""
    seed = str(plan.request.seed)
    # the same for all arms that sample it alike
    proxy = folder / ("proxy" if plan.proxy.scaled_time else "proxy-unscaled") / seed
    job = job_hash(arm.session, plan, prompt, "")
    # the preview is the VAE's work
    proxy_job = f"{proxy_metadata(arm.session, plan, prompt, '')['key']} {arm.session.vae_hash}"
    sample = partial(pipeline.make_proxy, arm.session, plan, prompt, "", proxy, console)
    proxy_seconds, _ = _timed(proxy, proxy / "proxy.mp4", proxy_job, lambda: None, sample)
    work = folder / _folder_name(arm.name) / seed
    video = work.with_suffix(".mp4")
    make = partial(arm.make, plan, prompt, attributes, proxy, video)
    seconds, peak = _timed(work, video, job, partial(arm.warm, plan), make)
    frames = frames_at(video, looked_at(plan))
    seen = assess(plan, frames, proxy_frames(plan, proxy / "proxy.mp4"), attributes)
    return Seen(seen, seconds if arm.name in (NATIVE, RECONSTRUCTED) else proxy_seconds + seconds, peak)


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
    store.run_directory(work.parent, work.name)
    warm()
    reset_peak()
    started = time.monotonic()
    make()
    seconds, peak = round(time.monotonic() - started, 2), peak_rss()
    store.write_json(work.with_suffix(".json"), {"job": job, "seconds": seconds, "peak_bytes": peak})
    return seconds, peak


def summary(by_seed: list[list[Seen]]) -> dict[str, Any]:
    """The columns of an arm, over all prompts and seeds: percent of the attributes that came true, with the standard
    deviation over seeds; percent of the videos with no object and with more than one; seams over all; mean coherence;
    the median edge width where there is an object; median seconds; the highest peak."""
    everything = [seen for row in by_seed for seen in row]
    assessments = [seen.assessment for seen in everything]
    adherence = [100 * float(np.mean([list(s.assessment.right.values()) for s in row])) for row in by_seed]
    widths = [a.edge_width for a in assessments if a.edge_width is not None]
    return {
        "adherence_percent": round(float(np.mean(adherence)), 1),
        "spread": round(float(np.std(adherence, ddof=1)), 1) if len(adherence) > 1 else None,
        "missing_percent": round(100 * float(np.mean([a.repetition < 0 for a in assessments]))),
        "repeated_percent": round(100 * float(np.mean([a.repetition > 0 for a in assessments]))),
        "seam": round(seam_ratio(assessments), 2),
        "coherence_db": round(float(np.mean([a.coherence for a in assessments])), 1),
        "edge_width_px": round(float(np.median(widths)), 1) if widths else None,
        "seconds": round(float(np.median([s.seconds for s in everything])), 1),
        "peak_gib": round(max(s.peak_bytes for s in everything) / GIB, 2),
    }


def row(arm: dict[str, Any]) -> dict[str, str]:
    """An arm's columns as a terminal of 80 has room for them."""

    def shown(key: str, digits: int) -> str:
        value = arm.get(key)
        return "" if value is None else f"{value:.{digits}f}"

    return {
        "arm": arm["arm"].replace(" (untrained)", "*"),
        "right": "±".join(filter(None, (shown("adherence_percent", 0), shown("spread", 0)))),
        "no/many": "/".join(filter(None, (shown("missing_percent", 0), shown("repeated_percent", 0)))),
        "seam": shown("seam", 2),
        "dB": shown("coherence_db", 1),
        "px": shown("edge_width_px", 1),
        "s": shown("seconds", 1),
        "GiB": shown("peak_gib", 1),
    }
