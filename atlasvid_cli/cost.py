"""What a plan costs on a machine, by default this one: bytes, FLOPs and seconds a stage, before anything loads."""

import dataclasses
import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .decode_cost import KEPT, decode_memory, file_bytes, start_tile, vae_itemsize, vae_tile
from .errors import ResourceError, UsageError
from .machine import (
    Machine,
    available_ram,
    conv_rate,
    decode_dtype,
    disk_of,
    gemm_rate,
    this_machine,
    total_ram,
)
from .memory import (
    GIB,
    HOST_SHARE,
    PLACEMENTS,
    WITHOUT_PROXY,
    Memory,
    Placement,
    detail_memory,
    latents_bytes,
    model_bytes,
    proxy_memory,
    text_memory,
)
from .plan import Plan, make_plan
from .stages import Stage

# parts that denoising reaches of a big GEMM's rate, and decoding beside the encoder of a convolution's, on two cores
# (docs/LOG.md)
EFFICIENCY, DECODE_EFFICIENCY = 0.6, 0.7

# seconds that a GPU takes for a block on a chunk of windows, however small: some seventy kernels (docs/LOG.md)
LAUNCH = 0.01

WORTH = 0.25  # part of what is missing that an option has to save to be named

DECODED = ("preview", "decode")  # stages that make frames of latents


@dataclass(frozen=True)
class Row:
    """What a stage takes: FLOPs, memory `needed` beside the program, projected `seconds` (NaN on a machine that is not
    this one), and bytes of files: the `latents` that it leaves, the `spool` of decoded tiles, the `video`."""

    stage: str
    flops: int
    needed: Memory
    seconds: float
    grid: str = ""
    tokens: int = 0
    windows: int = 0
    steps: int = 1
    latents: int = 0
    spool: int = 0
    video: int = 0

    @property
    def disk(self) -> int:
        """The most bytes on disk: while a stage runs its state is as large as the latents that it leaves."""
        return 2 * self.latents + self.spool + self.video

    def to_json(self) -> dict[str, Any]:
        return {
            "stage": self.stage,
            "grid": self.grid,
            "tokens": self.tokens,
            "windows": self.windows,
            "steps": self.steps,
            "flops": self.flops,
            "ram_bytes": self.needed.ram,
            "vram_bytes": self.needed.vram,
            "disk_bytes": self.disk,
            "seconds": None if math.isnan(self.seconds) else self.seconds,
        }


def memory(plan: Plan, stage: Stage, placement: Placement, machine: Machine) -> Memory:
    """What a stage needs beside the program."""
    narrow = plan.request.weight_dtype != "auto"
    if stage is plan.proxy:
        models = 1 + stage.is_autoguided
        return proxy_memory(plan.preset, stage.grid.tokens, placement.offload, machine.device, narrow, models)
    from .windows import aligned_span

    detail, below, grid = plan.preset.detail, plan.below(stage), plan.sampled(stage)
    copies = 3 + stage.passes + (stage.together if stage.together > 1 else 0) + (3 if plan.is_region else 0)
    spans = (aligned_span(w, below, stage.ratio, stage.time_ratio, detail.margin) for w in detail.windows)
    return detail_memory(
        plan.preset,
        grid,
        below,
        plan.chunk,
        stage.passes,
        # of a region also where it starts and what surrounds it, and the whole video's, as it starts, was and becomes
        copies * grid.tokens + (3 * stage.grid.tokens if plan.is_region else 0),
        placement,
        machine.device,
        narrow,
        max(map(math.prod, spans)) if detail.proxy_attention else 0,
        stage.together,
    )


def placement_of(plan: Plan, machine: Machine | None = None) -> Placement:
    """The fastest placement, of those that offload as was asked for, with which all that is sampled fits the GPU; if
    none does, the smallest. Keys go to host memory where it is as large: how much of it is free changes as models come
    and go, and another machine's is not known."""
    machine = machine or this_machine()
    on_cpu = machine.device.kind == "cpu"
    offload = plan.request.offload or ("none" if on_cpu else None)
    placements = PLACEMENTS if plan.preset.detail.proxy_attention else WITHOUT_PROXY
    *larger, smallest = (p for p in placements if offload in (None, p.offload))
    host = HOST_SHARE * total_ram() if machine.is_here else 0

    def fits(placement: Placement) -> bool:
        needed = [memory(plan, stage, placement, machine) for _, stage in plan.own_stages()]
        keys_in_host = placement.keeps and (on_cpu or placement.offload == "host")
        return all(each.vram <= machine.vram and (not keys_in_host or each.ram <= host) for each in needed)

    return next(filter(fits, larger), smallest)


def rows(plan: Plan, machine: Machine | None = None) -> list[Row]:
    """One row a stage, its seconds projected from a GEMM and a convolution timed just now."""
    machine = machine or this_machine()
    gemm = convolutions = math.nan
    if machine.is_here:
        gemm = gemm_rate() * EFFICIENCY
        convolutions = conv_rate(decode_dtype(plan.preset.decode_dtype)) * DECODE_EFFICIENCY
    made = [] if plan.request.clip and plan.request.proxy_only else [_text_row(plan, gemm, machine)]
    made += [_encode_row(plan, convolutions, machine)] if plan.request.clip else []
    placement = placement_of(plan, machine)
    for name, stage in plan.own_stages():
        grid, (convolved, needed) = plan.sampled(stage), _convolved(plan, stage, placement, machine)
        flops = plan.flops(stage, placement.keeps)
        seconds = flops / gemm
        if machine.device.kind == "cuda":
            seconds = max(seconds, LAUNCH * _chunks(plan, stage) * stage.forwards())
        made.append(
            Row(
                name,
                flops + convolved,
                needed,
                seconds + convolved / convolutions,
                grid="x".join(map(str, dataclasses.astuple(grid))),
                tokens=grid.tokens,
                windows=plan.windows(stage),
                steps=stage.steps,
                latents=latents_bytes(plan.preset, stage.grid.tokens),
            )
        )
    made.append(_decode_row(plan, convolutions, machine))
    return [dataclasses.replace(row, seconds=round(row.seconds, 1)) for row in made]


def _chunks(plan: Plan, stage: Stage) -> int:
    """How many chunks of windows all blocks of a forward take: the chunks of a block hold windows of one shape each."""
    from .windows import block_layout

    layers, layouts = plan.preset.transformer.layers, plan.preset.detail.layouts
    if stage is plan.proxy:
        return layers
    cycle = [
        sum(-(-len(g) // plan.chunk) for g in block_layout(i, layouts, plan.sampled(stage)))
        for i in range(len(layouts))
    ]
    return sum(cycle[i % len(cycle)] for i in range(layers))


def _convolved(plan: Plan, stage: Stage, placement: Placement, machine: Machine) -> tuple[int, Memory]:
    """FLOPs of the VAE in a sampling stage, and all that the stage needs beside the program."""
    needed = memory(plan, stage, placement, machine)
    flops, held = _enlarging(plan, stage, machine) if stage.in_pixels else (0, Memory(0, 0))
    return flops, Memory(max(needed.device, held.device), max(needed.host, held.host))


def _enlarging(plan: Plan, stage: Stage, machine: Machine) -> tuple[int, Memory]:
    """FLOPs and bytes of decoding the level below and encoding it as large as a stage."""
    from .vae_cost import decode_flops, encode_bytes, encode_flops, overlap

    vae, patch = plan.preset.vae, plan.preset.geometry.patch
    below, grid = plan.below(stage), stage.grid
    h, w = below.h * patch, below.w * patch
    flops = round(below.t * decode_flops(vae, h, w) * overlap(vae, h, w, start_tile(plan, stage, machine)))
    half = bool(stage.entry)
    flops += grid.t * encode_flops(vae, grid.h * patch, grid.w * patch, half)
    pixels, size = plan.preset.geometry.token_pixels, vae_itemsize(plan.preset, machine)
    held = decode_memory(plan.preset, (below.t, h, w), below.w * pixels, below.h * pixels, None, machine)
    on_gpu = machine.device.kind == "cuda"
    encoder = int(KEPT[size] * encode_bytes(vae, grid.h * patch, grid.w * patch, size, not on_gpu, half))
    large = 2 * 4 * 3 * grid.h * grid.w * (pixels // (1 + half)) ** 2  # a frame in fp32 as it is made, and the last one
    latents = latents_bytes(plan.preset, grid.tokens)
    if on_gpu:
        return flops, Memory(held.device + encoder, held.host + latents + large)
    stays = 0 if stage is plan.own_stages()[0][1] else model_bytes(plan.preset, machine.device)  # of the stage before
    return flops, Memory(0, held.host + encoder + latents + large + stays)


def _text_row(plan: Plan, rate: float, machine: Machine) -> Row:
    """The text encoder on a prompt of full length, as if no embedding were cached."""
    text, tokens = plan.preset.text, plan.preset.transformer.text_length
    flops = 2 * (text.parameters - text.looked_up) * tokens
    needed = text_memory(plan.preset, machine.device)
    return Row("text", flops, needed, flops / rate, tokens=tokens)


def check_resources(
    plan: Plan,
    output_dir: Path | None,
    run_dir: Path | None = None,
    videos: int = 1,
    costs: list[Row] | None = None,
    machine: Machine | None = None,
) -> None:
    """Raises ResourceError, before anything is loaded, where memory will not do, or the disk for so many `videos`.

    `run_dir` takes the latents; without it they lie beside the video, and without `output_dir` all lies here. `costs`
    are the plan's `rows`, where they are known. Of a `machine` that is not this one only the GPU's memory is known.
    """
    machine = machine or this_machine()
    costs = rows(plan, machine) if costs is None else costs
    tightest = max(costs, key=lambda row: row.needed.vram, default=None)
    if tightest and tightest.needed.vram > machine.vram:
        remedy = _remedy(plan, tightest.stage, "device", tightest.needed.vram - machine.vram, machine)
        raise ResourceError(
            f"the {tightest.stage} stage needs {tightest.needed.vram / GIB:.1f} GiB of GPU memory and"
            f" {machine.vram / GIB:.1f} GiB are free; {remedy}"
        )
    if not machine.is_here:
        return
    worst = max(costs, key=lambda row: row.needed.ram, default=None)
    available = available_ram()
    if worst and worst.needed.ram > available:
        remedy = _remedy(plan, worst.stage, "host", worst.needed.ram - available, machine)
        raise ResourceError(
            f"the {worst.stage} stage needs {worst.needed.ram / GIB:.1f} GiB of memory and"
            f" {available / GIB:.1f} GiB are free; {remedy}"
        )
    # a stage's state goes when its latents are there, and tiles when they are decoded: both are there once
    latents = (videos + 1) * sum(row.latents for row in costs) + sum(row.spool for row in costs)
    needs: dict[int, int] = {}  # bytes by file system
    files = videos * sum(row.video for row in costs)
    places = (output_dir, files, "--output"), (run_dir, latents, "--run-dir" if run_dir else "--output")
    for folder, size, option in places:
        place = folder or output_dir or Path()
        if place.is_file():
            raise ResourceError(f"{place} cannot be written (it is a file); choose another {option}")
        device, free = disk_of(place)
        needs[device] = needs.get(device, 0) + size
        if needs[device] > free:
            elsewhere = f" or choose another {option}" if output_dir else ""
            raise ResourceError(
                f"the job writes about {needs[device] / GIB:.1f} GiB and {place} has {free / GIB:.1f} GiB free;"
                f" free some space{elsewhere}"
            )


def _remedy(plan: Plan, stage: str, where: Literal["device", "host"], missing: int, machine: Machine) -> str:
    """What makes a stage fit that does not, by so many `missing` bytes of the GPU's or of host memory."""
    if stage == "text":
        return "close other programs, or choose a preset with a smaller text encoder"
    if stage == "encode":
        return "close other programs, or give a smaller --res"
    if stage in DECODED:
        return "close other programs, or lower decode_gib in a preset of your own"

    def needed(plan: Plan) -> int:
        placement = placement_of(plan, machine)
        return max(getattr(_convolved(plan, s, placement, machine)[1], where) for _, s in plan.own_stages())

    now = needed(plan)
    helping = [option for option, changed in _smaller(plan) if now - needed(changed) >= WORTH * missing]
    *others, last = helping or ["a machine with more memory"]
    return f"choose {' or '.join(filter(None, (', '.join(others), last)))}"


def _smaller(plan: Plan) -> Iterator[tuple[str, Plan]]:
    """Options that may need less, each with the plan that it makes of this one. A saved proxy has a length of its own,
    and the video of a region a size."""
    request, given = plan.request, plan.given_proxy
    options: dict[str, dict[str, Any]] = {
        "--weight-dtype int8": {"weight_dtype": "int8"},
        "--offload auto": {"offload": None},
        "a smaller --chunk": {"chunk": 1},
        "a smaller --res": {} if plan.is_region else {"width": request.width // 2, "height": request.height // 2},
        "fewer --seconds": {} if given else {"seconds": request.seconds / 2},
    }
    for option, fields in options.items():
        with suppress(UsageError):  # too small to be made
            changed, fps = dataclasses.replace(request, **fields), plan.proxy_fps if given else None
            smaller = make_plan(changed, plan.proxy.grid if given else None, fps, plan.preset)
            if smaller.target.h >= smaller.proxy.grid.h and smaller.target.w >= smaller.proxy.grid.w:
                yield option, smaller


def _encode_row(plan: Plan, rate: float, machine: Machine) -> Row:
    """A clip as the proxy."""
    from .vae_cost import encode_bytes, encode_flops

    vae, grid, patch = plan.preset.vae, plan.proxy.grid, plan.preset.geometry.patch
    size, (h, w) = vae_itemsize(plan.preset, machine), (grid.h * patch, grid.w * patch)
    on_gpu = machine.device.kind == "cuda"
    encoder = int(KEPT[size] * encode_bytes(vae, h, w, size, not on_gpu)) + plan.preset.vae_parameters * size
    flops = grid.t * encode_flops(vae, h, w)
    return Row(
        "encode",
        flops,
        Memory(encoder, 0) if on_gpu else Memory(0, encoder),
        flops / rate,
        grid=f"{grid.t}x{h}x{w}",
        tokens=grid.tokens,
        latents=latents_bytes(plan.preset, grid.tokens),
    )


def _decode_row(plan: Plan, rate: float, machine: Machine) -> Row:
    """The video's frames, or where only the proxy is made its preview's, which is not counted as a file."""
    from .vae_cost import decode_flops, overlap, spool_bytes

    request, preset, patch = plan.request, plan.preset, plan.preset.geometry.patch
    stage, grid, size, codec = "decode", plan.target, (request.width, request.height), request.codec
    if request.proxy_only:
        stage, grid, size, codec = "preview", plan.proxy.grid, plan.proxy_size, "h264"
    h, w = grid.h * patch, grid.w * patch
    tile = vae_tile(preset, h, w, machine)
    flops = round(decode_flops(preset.vae, h, w) * grid.t * overlap(preset.vae, h, w, tile))
    needed = decode_memory(preset, (grid.t, h, w), *size, codec, machine)
    if machine.device.kind == "cpu" and plan.own_stages():  # the transformer stays, for the next video
        needed = Memory(0, needed.host + model_bytes(preset, machine.device))
    return Row(
        stage,
        flops,
        needed,
        flops / rate,
        grid=f"{grid.t}x{h}x{w}",
        spool=spool_bytes(preset.vae, grid.t, h, w) if tile else 0,
        video=0 if request.proxy_only else file_bytes(*size, plan.frames, codec),
    )
