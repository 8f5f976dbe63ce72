"""`atlasvid bench --quality`: how often the embedded model does what held-out prompts say, measured on its videos.

The detector of `metrics` looks at the decoded files and knows nothing of the model.
"""

import dataclasses
import math
import random
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from . import captions, dataset, pipeline, store, world
from .artefacts import run_hash
from .console import Console
from .cost import check_resources
from .errors import UsageError
from .metrics import adherence, detect, edge_width, step_energy
from .plan import Plan, Request, make_plan
from .session import Session
from .video import read_frames
from .windows import borders

Lines = tuple[list[int], list[int]]  # rows and columns

FRAMES = 9  # looked at in each video, evenly spread
NORMAL = 1.4826  # a normal distribution's standard deviation over its median absolute deviation
STEADY = 0.15  # of its speed may an object's be off in a quarter of the video


@dataclass(frozen=True)
class Assessment:
    """What was seen in a video: which attributes came true, how many objects there are beyond the one asked for,
    the energy of steps across window borders and across the lines beside them, and the same of tokens' borders within
    windows, dB of coherence, pixels of edge width, and how unsteady the object's speed is."""

    right: dict[str, bool]
    repetition: int
    energy: np.ndarray
    within: np.ndarray
    coherence: float
    edge_width: float | None
    unsteady: float | None = None


def held_out_prompts(count: int) -> list[tuple[str, world.Attributes]]:
    """The first `count` held-out combinations of a fixed sequence, every other one not as the plain sentence but in a
    held-out form."""
    rng, words = random.Random("quality"), random.Random("forms")
    prompts = []
    for i in range(count):
        attributes, form = world.sample_attributes(rng, held_out=True), captions.sample_form(words, held_out=True)
        prompts.append((captions.sentence(attributes, form if i % 2 else None), attributes))
    return prompts


def token_borders(plan: Plan) -> tuple[Lines, Lines]:
    """Rows and columns of a video's pixels at which windows of its last level meet, and those at which tokens do within
    all windows."""
    side, layouts = Fraction(plan.preset.geometry.token_pixels, plan.scale), plan.preset.detail.layouts
    meet, within = [], []
    for axis, size in ((1, plan.target.h), (2, plan.target.w)):
        cuts = borders(size, [(shape[axis], shifted) for shape, shifted in layouts])
        meet.append([math.floor(at * side) for at in cuts])
        within.append([math.floor(at * side) for at in range(1, size) if at not in cuts])
    return (meet[0], meet[1]), (within[0], within[1])


def true_scene(plan: Plan, attributes: world.Attributes) -> world.Scene:
    """A scene with these attributes whose object stays in the frame for as long as the video lasts."""
    request = plan.request
    aspect = request.width / request.height
    return world.sample_scene(random.Random(request.seed), aspect, float(request.seconds), attributes)


def coherence(plan: Plan, frames: list[np.ndarray], proxy: list[np.ndarray]) -> float:
    """PSNR in dB between (H, W, 3) uint8 `frames`, made as small as their proxy, and its preview's at those times."""
    width, height = plan.proxy_size
    shown = [F.adaptive_avg_pool2d(_pixels(f), (height, width)) for f in frames]
    seen = [_pixels(p) for p in proxy]  # without the last row or column where that is an odd one
    return float(np.mean([_psnr(a[:, : b.shape[1], : b.shape[2]], b) for a, b in zip(shown, seen, strict=True)]))


def _pixels(frame: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1).float() / 255


def _psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return -10 * float(torch.log10(F.mse_loss(a, b).clamp_min(1e-10)))


def check(request: Request, flag: str = "--quality") -> Plan:
    """The plan of one video; UsageError for a preset whose world the detector does not know."""
    plan = make_plan(request)
    if plan.preset.geometry.token_pixels != dataset.TOKEN or plan.preset.fps != dataset.FPS:
        raise UsageError(f"{flag} knows the world of preset tiny only, not what {plan.preset.name} shows")
    return plan


def run(request: Request, count: int, folder: Path, console: Console) -> dict[str, Any]:
    """Renders `count` held-out prompts into `folder` and looks at them; finished identical ones are kept.

    In how many each attribute came true, and all of them; in how many no object shows beside the one asked for, and in
    how many its speed is steady; the seam statistic, the same of tokens' borders within windows, and what chance does
    to it; the mean coherence in dB; the median edge width (DESIGN §9).
    """
    plan = check(request)
    check_resources(plan, folder.absolute(), videos=count)
    session = Session(request.preset, request.model_path)
    seen = []
    with store.results(folder):
        for i, (prompt, attributes) in enumerate(held_out_prompts(count)):
            job = make_plan(dataclasses.replace(request, prompt=prompt, seed=i))
            video = folder / f"{i:03}.mp4"
            run_dir = folder / f"{i:03}-{run_hash(session, job)}"
            done = pipeline.finished_video(session, job, run_dir, video)
            if not (done and (run_dir / "proxy.mp4").exists()):
                console.note(f"{i + 1} of {count}: {prompt}")
                video.unlink(missing_ok=True)  # another job's
                pipeline.render(session, job, run_dir, video, console)
            frames = frames_at(video, looked_at(plan))
            seen.append(assess(plan, frames, proxy_frames(plan, run_dir / "proxy.mp4"), attributes))
    right = {name: sum(s.right[name] for s in seen) for name in seen[0].right}
    widths = [s.edge_width for s in seen if s.edge_width is not None]
    seam, within, chance = seams(seen)
    return {
        "preset": plan.preset.name,
        "size": plan.summary["size"],
        "seconds": plan.summary["seconds"],
        "prompts": count,
        "right": right | {"all of these": sum(all(s.right.values()) for s in seen)},
        "not_repeated": sum(s.repetition <= 0 for s in seen),
        "steady": sum(s.unsteady is not None and s.unsteady <= STEADY for s in seen),
        "seam": seam,
        "seam_within": within,
        "seam_chance": chance,
        "coherence_db": round(float(np.mean([s.coherence for s in seen])), 1),
        "edge_width_px": round(float(np.median(widths)), 1) if widths else None,
    }


def looked_at(plan: Plan) -> list[int]:
    """The numbers of the frames to look at: about evenly spread, at times that the proxy shows too."""
    sparse = range(0, plan.frames, plan.proxy.time_ratio)
    return sorted({sparse[round(k * (len(sparse) - 1) / (FRAMES - 1))] for k in range(FRAMES)})


def proxy_frames(plan: Plan, preview: Path) -> list[np.ndarray]:
    """What a proxy's preview shows at the times of the frames to look at."""
    return frames_at(preview, [n // plan.proxy.time_ratio for n in looked_at(plan)])


def assess(plan: Plan, frames: list[np.ndarray], proxy: list[np.ndarray], attributes: world.Attributes) -> Assessment:
    """Looks at the uint8 (H, W, 3) `frames` of a video and those of its proxy at the same times."""
    found = detect(frames, [n / plan.fps for n in looked_at(plan)])
    pitch = plan.preset.geometry.token_pixels // plan.scale
    meet, within = (np.mean([step_energy(f, *lines, pitch) for f in frames], axis=0) for lines in token_borders(plan))
    widths = [w for f in frames if (w := edge_width(f)) is not None]
    return Assessment(
        adherence(found, attributes),
        found.count - 1,
        meet,
        within,
        coherence(plan, frames, proxy),
        float(np.median(widths)) if widths else None,
        found.unsteady,
    )


def seams(seen: list[Assessment]) -> list[float | None]:
    """Energy of steps across window borders over that across the lines beside them, means over videos; the same of
    tokens' borders within windows, where what the VAE leaves on its lattice shows and windows do not; and how the lines
    beside window borders deviate from each other, which is what chance does. None where there are no such borders."""
    meet, within = (np.mean([getattr(s, which) for s in seen], axis=0) for which in ("energy", "within"))
    beside, between = (max(float(np.mean(lines[1:])), 1e-12) for lines in (meet, within))
    # by the median: the few lines of the VAE's lattice among them are not chance
    deviation = NORMAL * float(np.median(np.abs(meet[1:] - np.median(meet[1:]))))
    found = float(meet[0]) / beside, float(within[0]) / between, deviation / beside
    return [round(value, 3) if math.isfinite(value) else None for value in found]


def frames_at(path: Path, wanted: list[int]) -> list[np.ndarray]:
    """Frames of a video by number, in ascending order and perhaps more than once."""
    found = {n: frame for n, frame in enumerate(read_frames(path)) if n in set(wanted)}
    return [found[n] for n in wanted]
