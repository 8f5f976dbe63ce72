"""How often the embedded model does what held-out prompts say, by the detector of `metrics` on the decoded videos.

python -m atlasvid_cli.quality --count 40 --res 960x540 --seconds 4 -o quality
"""

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from . import pipeline, world
from .console import Console
from .metrics import adherence, detect, seam_energy
from .parse import parse_resolution, parse_seconds
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--res", default="960x540")
    parser.add_argument("--seconds", default="4")
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("-o", "--output", type=Path, default=Path("quality"))
    arguments = parser.parse_args()
    width, height = parse_resolution(arguments.res)
    session = Session(arguments.preset)
    console = Console(json_lines=True)
    totals: dict[str, int] = {}
    energy = np.zeros((2, 2))  # (made, true) x (on window borders, elsewhere)
    for i, (prompt, attributes) in enumerate(held_out_prompts(arguments.count)):
        plan = make_plan(Request(arguments.preset, width, height, parse_seconds(arguments.seconds), seed=i))
        video = arguments.output / f"{i:03}.mp4"
        pipeline.render(session, plan, prompt, "", arguments.output / f"{i:03}", video, console)
        wanted = {round(k * (plan.frames - 1) / (FRAMES - 1)) for k in range(FRAMES)}
        frames = [f for n, f in enumerate(read_frames(video)) if n in wanted]
        found = detect(frames, (plan.frames - 1) / plan.fps)
        right = adherence(found, attributes)
        right["colour, direction, count"] = right["colour"] and right["direction"] and right["count"]
        for name, value in right.items():
            totals[name] = totals.get(name, 0) + value
        lines = window_borders(plan)
        for row, source in enumerate((frames, true_frames(plan, attributes, i))):
            energy[row] += np.mean([seam_energy(f, *lines) for f in source], axis=0)
        console.emit({"prompt": prompt, "found": found.__dict__, "right": right}, "")
    made, true = energy[:, 0] / energy[:, 1]
    result = {name: f"{value}/{arguments.count}" for name, value in totals.items()} | {"seam": round(made / true, 3)}
    console.emit(result, "")
    (arguments.output / "quality.json").write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
