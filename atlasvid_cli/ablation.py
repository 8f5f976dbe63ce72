"""`atlasvid bench --ablation`: what each part of the method is worth, on held-out prompts and seeds (DESIGN §9).

Every arm takes the same weights, prompts, seeds and, but for the one that changes it, the same proxies. An arm without
a part keeps the adapters that were trained with it: those are called untrained.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import WanPipeline

from . import pipeline, store
from .artefacts import job_hash
from .console import Console
from .cost import GIB
from .machine import peak_rss, reset_peak
from .plan import Plan, Request, make_plan
from .presets import Preset
from .quality import Assessment, assess, check, frames_at, held_out_prompts, looked_at, proxy_frames, seam_ratio
from .session import Session
from .weights import load_scheduler, load_text, load_transformer, load_vae

Frames = list[np.ndarray]


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


# arms that sample detail, as changes of the preset, and whether its adapters were trained for that
SAMPLED: dict[str, tuple[Callable[[Preset], Preset], bool]] = {
    "the full method": (lambda preset: preset, True),
    "half the detail steps": (_half_the_steps, True),
    "without proxy attention": (_detail(proxy_attention=False), False),
    "without shifts": (_detail(shifted=False), False),
    "without scaled positions": (_detail(scaled_positions=False), False),
    "without scaled time": (_unscaled_time, False),
    "proxy at the detail's timestep": (_detail(clean_proxy=False), False),
    "no detail adapter": (_detail(lora=None), False),
    "tiles, each alone": (_tiles, False),
}


@dataclass(frozen=True)
class Seen:
    """One video of an arm: what was seen, the seconds after its proxy, and the process's peak bytes meanwhile."""

    assessment: Assessment
    seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Arm:
    """How an arm makes the frames to look at, of a prompt and above the proxy in a run directory."""

    name: str
    session: Session
    trained: bool
    frames: Callable[[Plan, str, Path, Path], Frames]


def run(request: Request, count: int, seeds: int, folder: Path, console: Console) -> dict[str, Any]:
    """Makes `count` held-out prompts with `seeds` seeds each in every arm; what `folder` holds already is kept."""
    plan = check(request)
    rows = []
    for arm in arms(request, folder, console):
        console.note(arm.name)
        by_seed: list[list[Seen]] = [[] for _ in range(seeds)]
        for i, (prompt, attributes) in enumerate(held_out_prompts(count)):
            for k, seen in enumerate(by_seed):
                job = dataclasses.replace(request, seed=i * seeds + k)
                seen.append(look(arm, make_plan(job, preset=arm.session.preset), prompt, attributes, folder, console))
        rows.append({"arm": arm.name + ("" if arm.trained else " (untrained)"), **summary(by_seed)})
    facts = {name: plan.summary[name] for name in ("preset", "size", "seconds")}
    return {**facts, "prompts": count, "seeds": seeds, "arms": rows}


def arms(request: Request, folder: Path, console: Console) -> Iterator[Arm]:
    """Every arm, the next one's weights loaded when the one before is done."""
    base = Session(request.preset, request.model_path)
    yield Arm("upsampled proxy", base, True, lambda plan, prompt, proxy, made: upsampled(plan, proxy))
    for name, (change, trained) in SAMPLED.items():
        session = Session(change(base.preset), request.model_path)

        def sampled(plan: Plan, prompt: str, proxy: Path, made: Path, session: Session = session) -> Frames:
            latents = pipeline.refine(session, plan, proxy / "proxy.safetensors", made, console)
            video = made.with_suffix(".mp4")
            return frames_at(pipeline.decode(session, latents, video, plan.request.codec, console), looked_at(plan))

        yield Arm(name, session, trained, sampled)
    yield Arm("native full attention", base, True, native(base))


def look(
    arm: Arm, plan: Plan, prompt: str, attributes: tuple[str, str, str, str, str], folder: Path, console: Console
) -> Seen:
    """Makes a video and looks at it, or remembers what was seen of it before."""
    seed = str(plan.request.seed)
    made = folder / arm.name.replace(" ", "-").replace(",", "").replace("'", "") / seed
    record = made.with_suffix(".json")
    job = store.artefact_hash({"arm": arm.name, "job": job_hash(arm.session, plan, prompt, "")})
    if (kept := _kept(record, job)) is not None:
        return kept
    store.run_directory(made.parent, made.name)
    # the same for all arms that sample it alike
    proxy = folder / ("proxy" if plan.proxy.scaled_time else "proxy-unscaled") / seed
    pipeline.make_proxy(arm.session, plan, prompt, "", proxy, console)
    reset_peak()
    started = time.monotonic()
    frames = arm.frames(plan, prompt, proxy, made)
    seconds, peak = round(time.monotonic() - started, 2), peak_rss()
    seen = Seen(assess(plan, frames, proxy_frames(plan, proxy / "proxy.mp4"), attributes), seconds, peak)
    store.write_json(record, {"job": job, **dataclasses.asdict(seen)})
    return seen


def _kept(record: Path, job: str) -> Seen | None:
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
        same = found.pop("job") == job
        return Seen(**found | {"assessment": Assessment(**found["assessment"])}) if same else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def upsampled(plan: Plan, proxy: Path) -> Frames:
    """Frames of the proxy's preview, made as large as the video by bicubic interpolation."""
    width, height = plan.proxy_size
    size = plan.request.height, plan.request.width
    made = []
    for frame in proxy_frames(plan, proxy / "proxy.mp4"):
        pixels = torch.from_numpy(np.ascontiguousarray(frame[:height, :width])).permute(2, 0, 1)[None].float()
        large = F.interpolate(pixels, size=size, mode="bicubic").clamp(0, 255).round().byte()[0]
        made.append(np.ascontiguousarray(large.permute(1, 2, 0).numpy()))
    return made


def native(session: Session) -> Callable[[Plan, str, Path, Path], Frames]:
    """diffusers' WanPipeline with the base weights under full attention at the asked size, with the proxy's steps."""

    @cache
    def load() -> WanPipeline:
        text, vae, model = load_text(session.folder), load_vae(session.folder), load_transformer(session.folder)
        pipe = WanPipeline(*text, vae, load_scheduler(session.folder, session.preset.proxy.flow_shift), model)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def frames(plan: Plan, prompt: str, proxy: Path, made: Path) -> Frames:
        grid, geometry = plan.native_grid, session.preset.geometry
        video = load()(
            prompt,
            "",
            height=grid.h * geometry.token_pixels,
            width=grid.w * geometry.token_pixels,
            num_frames=(grid.t - 1) * geometry.temporal + 1,
            num_inference_steps=plan.proxy.steps,
            guidance_scale=plan.proxy.guidance_scale,
            generator=torch.Generator().manual_seed(plan.request.seed),
            output_type="np",
        ).frames[0]
        shown = (video[n, : plan.request.height, : plan.request.width] for n in looked_at(plan))
        return [(frame * 255).round().astype(np.uint8) for frame in shown]

    return frames


def summary(by_seed: list[list[Seen]]) -> dict[str, Any]:
    """The columns of an arm: means over prompts, with the spread (standard deviation) of adherence over seeds."""
    everything = [seen for row in by_seed for seen in row]
    assessments = [seen.assessment for seen in everything]
    adherence = [100 * float(np.mean([list(s.assessment.right.values()) for s in row])) for row in by_seed]
    widths = [a.edge_width for a in assessments if a.edge_width is not None]
    return {
        "adherence_percent": round(float(np.mean(adherence)), 1),
        "spread_percent": round(float(np.std(adherence)), 1),
        "repetition": round(float(np.mean([max(0, a.repetition) for a in assessments])), 2),
        "seam": round(seam_ratio(assessments), 2),
        "coherence_db": round(float(np.mean([a.coherence for a in assessments])), 1),
        "edge_width_px": round(float(np.median(widths)), 1) if widths else None,
        "seconds": round(float(np.median([s.seconds for s in everything])), 1),
        "peak_gib": round(max(s.peak_bytes for s in everything) / GIB, 2),
    }
