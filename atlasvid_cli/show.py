"""A plan, shown before anything is loaded."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import ResourceError
from .targets import may_write

if TYPE_CHECKING:
    from .console import Console
    from .machine import Machine
    from .plan import Plan


def short(flops: float) -> str:
    """FLOPs with a metric prefix, in three digits: 15.2 T."""
    for prefix in ("G", "T", "P"):
        flops, unit = flops / (1e9 if prefix == "G" else 1e3), prefix
        if flops < 1000:
            break
    return f"{flops:.3g} {unit}" if flops < 1000 else f"{flops:,.0f} {unit}"


def show_plan(
    plan: "Plan",
    console: "Console",
    folder: Path | None,
    run_dir: Path | None = None,
    videos: int = 1,
    machine: "Machine | None" = None,
) -> None:
    """Prints the plan of so many `videos` in `folder`, if one is named, a table or with --json an object, and warns
    where they do not fit the `machine`, by default this one, or cannot be written there."""
    from .console import duration
    from .cost import check_resources, placement_of
    from .cost import rows as costs_of

    rows, misfit = [], None
    try:
        rows = costs_of(plan, machine)
        check_resources(plan, folder, run_dir, videos, rows, machine)
    except ResourceError as error:
        misfit = str(error)
        console.warn(misfit)
    for place, option in ((folder, "--output"), (run_dir, "--run-dir")):
        if place and not may_write(place):
            console.warn(f"{place.absolute()} cannot be written; choose another {option}")
    total = sum(r.seconds for r in rows)
    is_timed = not math.isnan(total)
    on_gpu = any(r.needed.device for r in rows)
    shown = [
        {
            "stage": r.stage,
            "grid": r.grid,
            "tokens": f"{r.tokens:,}",
            "windows": f"{r.windows:,}" if r.windows else "",
            "steps": r.steps,
            "FLOP": short(r.flops),
            **({"VRAM\nGiB": f"{r.needed.vram / 2**30:.2f}"} if on_gpu else {}),
            "RAM\nGiB": f"{r.needed.ram / 2**30:.2f}",
            "disk\nGiB": f"{r.disk / 2**30:.2f}",
            **({"time": duration(r.seconds)} if is_timed else {}),
        }
        for r in rows
    ]
    summary = plan.summary
    frames = f"{summary['frames']} frame{'s' * (summary['frames'] != 1)}"
    title = f"{summary['size']} x {summary['seconds']:g} s, {frames}, preset {summary['preset']}"
    if is_timed:
        title += f": about {duration(total)}"
        title += f" each, {duration(total * videos)} for {videos} videos" if videos > 1 else ""
    placement = placement_of(plan, machine)
    title += f", --offload {placement.offload}" if on_gpu else ""
    title += "" if placement.keeps else ", proxy keys anew at each step"
    title += f", {machine.device.name}" if machine else ""
    if console.json_lines:
        console.emit(
            {
                **plan.to_json(),
                "offload": placement.offload,
                "keeps_proxy_keys": placement.keeps,
                "rows": [r.to_json() for r in rows],
                "videos": videos,
                "fits": misfit is None,
            },
            title,
        )
    else:
        console.table(title, shown, asked_for=True)
