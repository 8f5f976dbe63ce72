"""`atlasvid bench --quality`: how often the embedded model does what held-out prompts say, measured on its videos.

The detector of `metrics` looks at the decoded files and knows nothing of the model.
"""

import dataclasses
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from . import dataset, pipeline, world
from .console import Console
from .errors import UsageError
from .metrics import adherence, detect, seam_energy
from .plan import Plan, Request, make_plan
from .session import Session
from .video import read_frames
from .windows import borders

FRAMES = 9  # looked at in each video, evenly spread


def held_out_prompts(count: int) -> list[tuple[str, tuple[str, str, str, str, str]]]:
    """The first `count` held-out combinations of a fixed sequence, as plain captions."""
    rng = random.Random("quality")
    prompts = []
    for _ in range(count):
        attributes = world.sample_attributes(rng, held_out=True)
        colour, shape, direction, ground_colour, ground = attributes
        prompts.append((f"a {colour} {shape} moving {direction} over a {ground_colour} {ground}", attributes))
    return prompts


def window_borders(plan: Plan) -> tuple[list[int], list[int]]:
    """Rows and columns of a video's pixels at which windows of its last level meet."""
    token, windows = plan.preset.geometry.token_pixels, plan.preset.detail.windows
    sizes = (plan.target.h, plan.target.w)
    rows, columns = (
        [at * token // plan.scale for at in borders(size, [w[axis] for w in windows])]
        for axis, size in enumerate(sizes, start=1)
    )
    return rows, columns


def true_frames(plan: Plan, attributes: tuple[str, str, str, str, str], seed: int) -> Iterator[np.ndarray]:
    """Frames of a true render of a scene with these attributes, as large and as far apart as those looked at."""
    width, height = plan.request.width, plan.request.height
    seconds = float(plan.request.seconds)
    scene = world.sample_scene(random.Random(seed), width / height, seconds, attributes)
    for t in torch.linspace(0, seconds, FRAMES):
        pixels = world.render(scene, t[None], height, width)[:, 0]
        yield ((pixels + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()


def coherence(plan: Plan, frames: list[np.ndarray], proxy: list[np.ndarray]) -> float:
    """PSNR in dB between (H, W, 3) uint8 `frames`, made as small as their proxy, and the proxy's at those times."""
    width, height = plan.proxy_size
    shown = [F.adaptive_avg_pool2d(_pixels(f), (height, width)) for f in frames]
    return float(np.mean([_psnr(a, _pixels(b[:height, :width])) for a, b in zip(shown, proxy, strict=True)]))


def _pixels(frame: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1).float() / 255


def _psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return -10 * float(torch.log10(F.mse_loss(a, b).clamp_min(1e-10)))


def check(request: Request) -> Plan:
    """The plan of one video; UsageError for a preset whose world the detector does not know."""
    plan = make_plan(request)
    if plan.preset.geometry.token_pixels != dataset.TOKEN or plan.preset.fps != dataset.FPS:
        raise UsageError(f"--quality knows the world of preset tiny only, not what {plan.preset.name} shows")
    return plan


def run(request: Request, count: int, folder: Path, console: Console) -> dict[str, Any]:
    """Renders `count` held-out prompts into `folder` and looks at them; finished identical ones are kept.

    In how many each attribute came true, and all of them; in how many no object appears twice; the seam statistic; the
    mean coherence in dB (DESIGN §9).
    """
    plan = check(request)
    session = Session(request.preset, request.model_path)
    right: Counter[str] = Counter()
    energy = np.zeros((2, 2))  # (made, true) x (on window borders, elsewhere)
    likeness = []
    for i, (prompt, attributes) in enumerate(held_out_prompts(count)):
        plan = make_plan(dataclasses.replace(request, seed=i))
        video, run_dir = folder / f"{i:03}.mp4", folder / f"{i:03}"
        if not pipeline.finished_video(session, plan, prompt, "", run_dir, video):
            console.note(f"{i + 1} of {count}: {prompt}")
            pipeline.render(session, plan, prompt, "", run_dir, video, console)
        # evenly spread, at times that the proxy shows too
        sparse = range(0, plan.frames, plan.proxy.time_ratio)
        wanted = [sparse[round(k * (len(sparse) - 1) / (FRAMES - 1))] for k in range(FRAMES)]
        frames = _frames_at(video, wanted)
        proxy = _frames_at(run_dir / "proxy.mp4", [n // plan.proxy.time_ratio for n in wanted])
        found = adherence(detect(frames, wanted[-1] / plan.fps), attributes)
        right.update(name for name, is_right in found.items() if is_right)
        right["all of these"] += all(found.values())
        likeness.append(coherence(plan, frames, proxy))
        lines = window_borders(plan)
        for row, source in enumerate((frames, true_frames(plan, attributes, i))):
            energy[row] += np.mean([seam_energy(f, *lines) for f in source], axis=0)
    made, true = energy[:, 0] / energy[:, 1]
    names = [*found, "all of these"]
    return {
        "preset": plan.preset.name,
        "size": plan.summary["size"],
        "seconds": plan.summary["seconds"],
        "prompts": count,
        "right": {name: right[name] for name in names},
        "seam": round(float(made / true), 3),
        "coherence_db": round(float(np.mean(likeness)), 1),
    }


def _frames_at(path: Path, wanted: list[int]) -> list[np.ndarray]:
    """Frames of a video by number, in ascending order and perhaps more than once."""
    found = {n: frame for n, frame in enumerate(read_frames(path)) if n in set(wanted)}
    return [found[n] for n in wanted]
