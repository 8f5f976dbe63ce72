"""What a plan costs on this machine: bytes, FLOPs and seconds a stage, before anything loads."""

import dataclasses
from pathlib import Path
from typing import Any

from .errors import ResourceError
from .machine import available_ram, available_vram, compute_device, conv_rate, decode_dtype, disk_of, gemm_rate
from .memory import OFFLOADS, Memory, Offload, detail_memory, proxy_memory, text_memory
from .plan import Plan, Stage
from .presets import Preset

GIB = 1 << 30
PROGRAM_BYTES = int(0.6 * GIB)  # torch, diffusers and transformers, imported, before any weight
PROGRAM_VRAM = GIB  # the CUDA context and what its allocator cannot reuse
# bytes a pixel and frame of a video file, on the safe side of detailed footage at the quality of `video.CODECS`
VIDEO_BYTES = {"h264": 0.05, "hevc10": 0.05, "av1": 0.05, "prores": 0.8, "ffv1": 2.0}
# parts that denoising reaches of a big GEMM's rate, and decoding beside the encoder of a convolution's, on two cores
# (docs/LOG.md)
EFFICIENCY, DECODE_EFFICIENCY = 0.6, 0.7

# what the allocator and the convolutions' scratch make of the decoder's tensors, by bytes a value (docs/LOG.md)
KEPT = {4: 1.35, 2: 1.9}


def memory(plan: Plan, stage: Stage, offload: Offload) -> Memory:
    """What a stage needs beside the program."""
    narrow = plan.request.weight_dtype != "auto"
    if stage is plan.proxy:
        return proxy_memory(plan.preset, stage.grid.tokens, offload, compute_device(), narrow)
    return detail_memory(
        plan.preset,
        stage.grid,
        plan.below(stage).tokens,
        plan.chunk,
        stage.passes,
        3 + stage.passes + (3 if plan.is_region else 0),  # of a region also its noise and what surrounds it
        offload,
        compute_device(),
        narrow,
    )


def offload_of(plan: Plan) -> Offload:
    """The way to offload that was asked for, or else the least that fits the compute device."""
    if plan.request.offload:
        return plan.request.offload
    on_cpu, free = compute_device().kind == "cpu", available_vram()
    for offload in OFFLOADS[:-1]:
        needed = max(memory(plan, stage, offload).device for _, stage in plan.own_stages())
        if on_cpu or needed + PROGRAM_VRAM <= free:
            return offload
    return OFFLOADS[-1]


def rows(plan: Plan) -> list[dict[str, Any]]:
    """One row a stage: tokens, windows, flops, bytes, seconds (a projection from a GEMM timed just now)."""
    gemm = gemm_rate()
    made = [_text_row(plan, gemm * EFFICIENCY)]
    for name, stage in plan.own_stages():
        flops, needed = plan.flops(stage), memory(plan, stage, offload_of(plan))
        disk = stage.grid.tokens * plan.preset.transformer.channels * plan.preset.geometry.patch**2 * 4
        made.append(
            {
                "stage": name,
                "grid": "x".join(map(str, dataclasses.astuple(stage.grid))),
                "tokens": stage.grid.tokens,
                "windows": plan.windows(stage),
                "steps": stage.steps,
                "flops": flops,
                "ram_bytes": PROGRAM_BYTES + needed.host,
                "vram_bytes": needed.device and PROGRAM_VRAM + needed.device,
                "disk_bytes": disk * 2,
                "seconds": round(flops / (gemm * EFFICIENCY), 1),
            }
        )
    if plan.request.proxy_only:  # whose preview is a matter of seconds
        return made
    made.append(_decode_row(plan, conv_rate(decode_dtype(plan.preset.decode_dtype)) * DECODE_EFFICIENCY))
    return made


def _text_row(plan: Plan, rate: float) -> dict[str, Any]:
    """The text encoder on a prompt of full length, as if no embedding were cached."""
    text, tokens = plan.preset.text, plan.preset.transformer.text_length
    needed = text_memory(plan.preset, available_vram(), compute_device())
    flops = 2 * (text.parameters - text.looked_up) * tokens
    return {
        "stage": "text",
        "grid": "",
        "tokens": tokens,
        "windows": 0,
        "steps": 1,
        "flops": flops,
        "ram_bytes": PROGRAM_BYTES + needed.host,
        "vram_bytes": needed.device and PROGRAM_VRAM + needed.device,
        "disk_bytes": 0,
        "seconds": round(flops / rate, 1),
    }


def video_bytes(plan: Plan) -> int:
    """An upper estimate of the video file."""
    if plan.request.proxy_only:
        return 0
    return int(plan.request.width * plan.request.height * plan.frames * VIDEO_BYTES[plan.request.codec])


def check_resources(plan: Plan, output_dir: Path, run_dir: Path | None = None) -> None:
    """Raises ResourceError, before anything is loaded, where memory or disk will not do.

    `run_dir` takes the latents; without it they lie beside the video.
    """
    costs = rows(plan)
    tightest = max(costs, key=lambda r: r["vram_bytes"])
    if tightest["vram_bytes"] > available_vram():
        raise ResourceError(
            f"the {tightest['stage']} stage needs {tightest['vram_bytes'] / GIB:.1f} GiB of GPU memory and"
            f" {available_vram() / GIB:.1f} GiB are free; choose --offload host, a smaller --chunk or --seconds"
        )
    worst = max(costs, key=lambda r: r["ram_bytes"])
    available = available_ram()
    if worst["ram_bytes"] > available:
        raise ResourceError(
            f"the {worst['stage']} stage needs {worst['ram_bytes'] / GIB:.1f} GiB of memory and"
            f" {available / GIB:.1f} GiB are free; "
            + (
                "close other programs, or choose a preset with a smaller text encoder"
                if worst["stage"] == "text"
                else "choose a smaller --res, fewer --seconds or a smaller --chunk"
            )
        )
    latents = sum(r["disk_bytes"] for r in costs) - video_bytes(plan)
    needs: dict[int, int] = {}  # bytes by file system
    for folder, size, option in ((output_dir, video_bytes(plan), "--output"), (run_dir, latents, "--run-dir")):
        place = folder or output_dir
        device, free = disk_of(place)
        needs[device] = needs.get(device, 0) + size
        if needs[device] > free:
            raise ResourceError(
                f"the job writes about {needs[device] / GIB:.1f} GiB and {place} has {free / GIB:.1f} GiB free;"
                f" free some space or choose another {option}"
            )


def _decode_row(plan: Plan, rate: float) -> dict[str, Any]:
    from .vae_cost import decode_flops, spool_bytes

    config = dataclasses.asdict(plan.preset.vae)
    h, w = plan.target.h * plan.preset.geometry.patch, plan.target.w * plan.preset.geometry.patch
    needed = decode_memory(plan.preset, (plan.target.t, h, w), plan.request.width, plan.request.height)
    flops = decode_flops(config, h, w) * plan.target.t
    return {
        "stage": "decode",
        "grid": f"{plan.target.t}x{h}x{w}",
        "tokens": 0,
        "windows": 0,
        "steps": 1,
        "flops": flops,
        "ram_bytes": PROGRAM_BYTES + needed.host,
        "vram_bytes": needed.device and PROGRAM_VRAM + needed.device,
        "disk_bytes": (spool_bytes(config, plan.target.t, h, w) if vae_tile(plan.preset, h, w) else 0)
        + video_bytes(plan),
        "seconds": round(flops / rate, 1),
    }


def decode_memory(preset: Preset, latents: tuple[int, int, int], width: int, height: int) -> Memory:
    """What decoding `latents` (t, h, w) to a video of `width` x `height` pixels needs beside the program."""
    from .vae_cost import decode_bytes

    t, h, w = latents
    size = decode_dtype(preset.decode_dtype).itemsize
    decoder = int(KEPT[size] * decode_bytes(dataclasses.asdict(preset.vae), h, w, vae_tile(preset, h, w), size))
    decoder += preset.vae_parameters * size
    # and the encoder keeps about 35 frames of 4:2:0
    host = t * h * w * preset.transformer.channels * 4 + int(35 * 1.5 * width * height)
    on_gpu = compute_device().kind == "cuda"
    return Memory(decoder, host) if on_gpu else Memory(0, host + decoder)


def check_decode(preset: Preset, latents: tuple[int, int, int], width: int, height: int, folder: Path) -> None:
    """Raises ResourceError, before anything is loaded, where saved latents cannot be decoded to `folder` in the memory
    and on the disk here."""
    from .vae_cost import spool_bytes

    if vae_tile(preset, *latents[1:]):
        size, (_, free) = spool_bytes(dataclasses.asdict(preset.vae), *latents), disk_of(folder)
        if size > free:
            raise ResourceError(
                f"decoding tiles writes {size / GIB:.1f} GiB and {folder} has {free / GIB:.1f} GiB free;"
                " free some space or choose another --output"
            )
    needed = decode_memory(preset, latents, width, height)
    for kind, size, free in (
        ("GPU memory", needed.device and PROGRAM_VRAM + needed.device, available_vram()),
        ("memory", PROGRAM_BYTES + needed.host, available_ram()),
    ):
        if size > free:
            raise ResourceError(
                f"decoding needs {size / GIB:.1f} GiB of {kind} and {free / GIB:.1f} GiB are free;"
                " close other programs, or lower decode_gib in the preset"
            )


def vae_tile(preset: Preset, h: int, w: int) -> int | None:
    """The tile side in latents with which decoding h x w latents fits in `decode_gib`; None for whole frames."""
    from .vae_cost import choose_tile

    return choose_tile(
        dataclasses.asdict(preset.vae), h, w, int(preset.decode_gib * GIB), decode_dtype(preset.decode_dtype).itemsize
    )
