"""`atlasvid bench`: full attention against proxy and detail, on the same weights, in one process (DESIGN §9).

Three arms. *native* is diffusers' WanPipeline at the asked size. *equal steps* is our path with native's steps and
guidance at every level. *few-step* is what `render` runs. Loading weights is left out of all. What a budget of seconds
cannot measure in full is projected from a sample (see `measure`) and marked so.
"""

import math
import tempfile
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.attention_dispatch import attention_backend

from .arms import (
    PROMPT,
    Bench,
    Check,
    StageTimes,
    detail_error,
    equal_arm,
    expected_seconds,
    few_step_arm,
    first_frames,
    native_arm,
    native_error,
    native_point,
    warm_up,
)
from .causal import hold_still, make_idle
from .console import Console
from .cost import GIB, placement_of, rows
from .errors import ResourceError
from .machine import available_ram, compute_device, copy_rate, decode_dtype, gemm_rate, versions
from .measure import KERNELS, random_model
from .plan import Plan, Request, make_plan
from .presets import load_preset
from .session import Session
from .timing import Rates, Timing, together
from .weights import load_text, load_transformer

SIZES = ((1, "1/4"), (1, "1/2"), (0.35, "1"), (0.5, "1"), (0.75, "1"))  # (side, seconds) of the growth fit
MOST_DRIFT = 1.1  # of the machine's rate over the arms, beyond which it is told


@attention_backend(KERNELS.attention)  # diffusers' arm too, whatever the environment says
def run(request: Request, steps: int | None, repeats: int, seconds: float, console: Console) -> dict[str, Any]:
    """Measures everything and returns the report as JSON can hold it.

    An arm may take `seconds`, all its repeats together; beyond, it is sampled.

    Raises UsageError and ResourceError before anything is loaded.
    """
    plan = make_plan(replace(request, prompt=PROMPT, negative_prompt=load_preset(request.preset).negative_prompt))
    steps = steps or plan.proxy.steps
    # on a GPU sessions load a part whenever it is needed, which would be timed: there, random weights and samples
    at_hand = bool(request.model_path) or plan.preset.folder.is_dir()
    has_weights = at_hand and compute_device().kind == "cpu"
    if has_weights and expected_seconds(plan) * repeats <= seconds:
        _check_memory(plan)
    smaller = smaller_plans(plan)
    with (
        tempfile.TemporaryDirectory(prefix="atlasvid-bench-") as name,
        console.stage("bench", 5 + len(smaller)) as advance,
    ):
        bench = _load(plan, has_weights, Path(name), seconds, repeats)
        if has_weights:
            warm_up(bench, plan)
        advance()
        errors: dict[str, Check] = {}
        few, peak = few_step_arm(bench, plan, repeats)
        gemms = {"before": bench.rate, "few-step": _gemm_rate()}
        frames = first_frames(bench.folder / "video.mp4", plan)
        of_target = {} if is_projected(few) else detail_error(bench, plan, few)
        advance()
        equal = equal_arm(bench, plan, steps, few)
        gemms["equal steps"] = _gemm_rate()
        advance()
        native, native_peak = native_arm(bench, plan, steps, frames)
        gemms["native"] = _gemm_rate()
        advance()
        points = []
        for part in smaller:
            stages, part_peak = few_step_arm(bench, part, 1)
            if not is_projected(stages):
                errors |= detail_error(bench, part, stages)
            points.append(_point(part, stages, native_point(bench, part, steps), part_peak, None))
            advance()
        errors |= of_target | {"native": native_error(bench, plan)}
        advance()
    points.append(_point(plan, few, native, peak, native_peak))
    arms = {"native": native, "equal steps": equal, "few-step": few}
    in_float32 = max(gemms.values()) if compute_device().dtype == "float32" else _gemm_rate("float32")
    rates = Rates(gemms, copy_rate(), in_float32)
    found = result(plan, steps, arms, errors, points, rates, has_weights)
    if rates.drift > MOST_DRIFT:
        console.warn(
            f"a big matrix product was {100 * (rates.drift - 1):.0f} % faster beside one arm than beside another, so"
            " speedups may be as far off; measure again with nothing else running"
        )
    if found["ceiling_fraction"] > 1:
        console.warn("denoising seems faster than without any attention: something else ran meanwhile; measure again")
    return found | {"repeats": repeats, "budget_seconds": seconds}


def _gemm_rate(dtype: str | None = None) -> float:
    """FLOP/s of the matrix product that rates are compared with, as large as the device needs to reach its own."""
    return gemm_rate(2048 if compute_device().kind == "cpu" else None, 1.0, dtype)


@attention_backend(KERNELS.attention)
def native_render_seconds(request: Request, seconds: float, video: Path) -> float:
    """What diffusers' WanPipeline would take from text to file, projected where more than `seconds` would be needed.

    `video` is one of this size, whose frames are encoded.
    """
    plan = make_plan(request)
    with tempfile.TemporaryDirectory(prefix="atlasvid-bench-") as name:
        bench = _load(plan, compute_device().kind == "cpu", Path(name), seconds, 1)
        stages, _ = native_arm(bench, plan, plan.proxy.steps, first_frames(video, plan))
    return total(stages).seconds


def _load(plan: Plan, has_weights: bool, folder: Path, seconds: float, repeats: int) -> Bench:
    """The parts of a preset, with its weights where they are there, else random ones of its sizes."""
    request, rate = plan.request, _gemm_rate()
    if has_weights:
        # one session keeps one stage's adapter at a time: with two, no arm loads while it is timed
        # and they share a cache that each run begins without
        proxy, detail = (Session(request.preset, request.model_path, KERNELS, cache=folder / "run") for _ in range(2))
        model, text, vae = load_transformer(proxy.folder, dtype=proxy.dtype), load_text(proxy.folder), proxy.vae()
        return Bench(proxy, detail, text, model, vae, folder, rate, seconds, repeats)
    model = random_model(plan.preset.transformer, plan.preset.geometry.patch)
    channels, spread = plan.preset.vae.out_channels, [1.0] * plan.preset.vae.z_dim
    told = asdict(plan.preset.vae)
    still, idle = told.pop("still"), told.pop("idle")
    config = {k: list(v) if isinstance(v, tuple) else v for k, v in told.items()}
    config |= {"in_channels": channels, "latents_mean": spread, "latents_std": spread}
    dtype = decode_dtype(plan.preset.decode_dtype)
    vae = AutoencoderKLWan.from_config(config).to(compute_device().kind, dtype).eval().requires_grad_(False)
    hold_still(vae, still)
    make_idle(vae, idle)
    return Bench(None, None, None, model, vae, folder, rate, seconds, repeats)


def _check_memory(plan: Plan) -> None:
    worst, free = max(rows(plan), key=lambda row: row.needed.ram), available_ram()
    if worst.needed.ram > free:
        raise ResourceError(
            f"the {worst.stage} stage needs {worst.needed.ram / GIB:.1f} GiB of memory and {free / GIB:.1f} GiB"
            " are free; choose a smaller --res, fewer --seconds, or a smaller --budget-seconds, which samples the stage"
        )


def smaller_plans(plan: Plan) -> list[Plan]:
    """Smaller jobs with as many levels, not supersampled, each of its own number of tokens: where growth is fitted."""
    request, pixels = plan.request, plan.preset.geometry.token_pixels
    plans: dict[int, Plan] = {}
    for side, length in SIZES if plan.scale == 1 else ():
        width, height = (round(v * side / pixels) * pixels for v in (request.width, request.height))
        if side == 1:
            width, height = request.width, request.height
        part = make_plan(
            replace(
                request,
                width=max(pixels, width),
                height=max(pixels, height),
                seconds=request.seconds * Fraction(length),
            )
        )
        if part.scale == 1 and len(part.levels) == len(plan.levels) and part.target.tokens < plan.target.tokens:
            plans.setdefault(part.target.tokens, part)
    return sorted(plans.values(), key=lambda p: p.target.tokens)


# --- from times to the report --------------------------------------------------------------------------------------


def is_projected(stages: StageTimes) -> bool:
    return total(stages).projected


def total(stages: StageTimes, *names: str) -> Timing:
    """The stages whose names begin with one of `names`, by default all."""
    return together(t for name, t in stages.items() if name.startswith(names or ("",)))


def denoise(stages: StageTimes) -> Timing:
    """Denoising: native's, or that of the proxy and the detail levels."""
    return total(stages, "denoise", "proxy", "detail")


def _speedups(native: StageTimes, ours: StageTimes) -> dict[str, Any]:
    """How many times as fast ours is; a range is from the worst pair of native's and our times to the best."""
    found: dict[str, Any] = {}
    for name, part in (("speedup", total), ("speedup_denoise", denoise)):
        slow, fast = part(native), part(ours)
        found[name] = slow.seconds / fast.seconds
        found[f"{name}_range"] = [slow.low / fast.high, slow.high / fast.low]
    return found


def growth_exponent(points: list[tuple[float, float]]) -> float | None:
    """Slope of log(seconds) against log(tokens), by least squares; None with fewer than two sizes."""
    logs = [(math.log(tokens), math.log(seconds)) for tokens, seconds in points if seconds > 0]
    if len({x for x, _ in logs}) < 2:
        return None
    mean_x, mean_y = (sum(axis) / len(logs) for axis in zip(*logs, strict=True))
    return sum((x - mean_x) * (y - mean_y) for x, y in logs) / sum((x - mean_x) ** 2 for x, _ in logs)


def _point(
    plan: Plan, ours: StageTimes, native: StageTimes, peak: int | None, native_peak: int | None
) -> dict[str, Any]:
    """One size of the growth fit: seconds of denoising and decoding, start-up, text and files left out; peak memory."""
    on_gpu = compute_device().kind == "cuda"
    return {
        "width": plan.request.width,
        "height": plan.request.height,
        "frames": plan.frames,
        "tokens": plan.target.tokens,
        "atlasvid_seconds": denoise(ours).seconds + total(ours, "decode").seconds,
        "native_seconds": denoise(native).seconds + total(native, "decode").seconds,
        "atlasvid_projected": is_projected(ours),
        "native_projected": is_projected(native),
        "atlasvid_peak_bytes": peak,
        "native_peak_bytes": native_peak,
        "planned_peak_bytes": max(row.needed.vram if on_gpu else row.needed.ram for row in rows(plan)),
    }


def result(
    plan: Plan,
    steps: int,
    arms: dict[str, StageTimes],
    errors: dict[str, Check],
    points: list[dict[str, Any]],
    rates: Rates,
    has_weights: bool,
) -> dict[str, Any]:
    """The report: speedups, what they rest on, and the machine; `arms` as `run` names them."""
    native, equal, few = arms["native"], arms["equal steps"], arms["few-step"]
    rendered, at_equal = plan.named_stages(), plan.at_equal_steps(steps)
    passes = plan.proxy.passes
    speedups = _speedups(native, equal)
    ceiling = plan.attention_free_ceiling
    detail_seconds = sum(few[name].seconds for name, _ in rendered[1:])
    detail_rate = sum(plan.flops(stage) for _, stage in rendered[1:]) / detail_seconds
    fits = {
        who: growth_exponent([(p["tokens"], p[f"{who}_seconds"]) for p in points]) for who in ("atlasvid", "native")
    }
    return {
        **speedups,
        "few_step": {
            **_speedups(native, few),
            "steps": [stage.steps for _, stage in rendered],
            "guidance_scale": [stage.guidance_scale for _, stage in rendered],
        },
        "projected": any(is_projected(stages) for stages in arms.values()),
        "projection_error": max(abs(check.error) for check in errors.values()),
        "projection_errors": {name: check.error for name, check in errors.items()},
        "projection_tokens": {name: check.tokens for name, check in errors.items()},
        "attention_free_ceiling": ceiling,
        "ceiling_fraction": speedups["speedup_denoise"] / ceiling,
        "growth_exponent": fits["atlasvid"],
        "growth_exponent_native": fits["native"],
        "growth": points,
        "gemm_fraction": detail_rate / rates.gemm,
        "gemm_flops_per_second": rates.gemm,
        "gemm_tflops": {when: rate / 1e12 for when, rate in rates.gemms.items()},
        "gemm_fraction_float32": detail_rate / rates.float32,
        "gemm_flops_per_second_float32": rates.float32,
        "roofline": _roofline(plan, arms, steps, rates),
        "peak_bytes": {
            "atlasvid": points[-1]["atlasvid_peak_bytes"],
            "native": points[-1]["native_peak_bytes"],
            "planned": points[-1]["planned_peak_bytes"],
        },
        "stages": {arm: {name: _plain(t) for name, t in stages.items()} for arm, stages in arms.items()},
        "totals": {arm: total(stages).seconds for arm, stages in arms.items()},
        "totals_range": {arm: [total(stages).low, total(stages).high] for arm, stages in arms.items()},
        "flops": {
            "native": plan.native_flops(steps, passes),
            "equal steps": sum(at_equal.flops(stage) for _, stage in at_equal.named_stages()),
            "few-step": sum(plan.flops(stage) for _, stage in rendered),
        },
        "tokens": plan.native_grid.tokens,
        "stage_tokens": {name: stage.grid.tokens for name, stage in rendered},
        "frames": plan.frames,
        "size": f"{plan.request.width}x{plan.request.height}",
        "fps": plan.fps,
        "steps": steps,
        "guidance_scale": plan.proxy.guidance_scale,
        "model": plan.preset.name + ("" if has_weights else " (random weights)"),
        "baseline": f"diffusers {versions()['diffusers']} WanPipeline, full attention, {steps} steps x {passes} passes",
        "device": compute_device().name,
        "dtype": compute_device().dtype,
        "threads": torch.get_num_threads(),
        "backend": KERNELS.attention,
        "offload": placement_of(plan).offload,
        "keeps_proxy_keys": placement_of(plan).keeps,
        "versions": versions(),
    }


def _roofline(plan: Plan, arms: dict[str, StageTimes], steps: int, rates: Rates) -> dict[str, Any]:
    """FLOP/s that denoising reaches against its FLOPs a byte of the least traffic.

    A block reads and writes the hidden state, and reads its weights and the keys and values of what guides it.
    """
    size, level = plan.preset.transformer, plan.levels[-1]
    weights = size.block_parameters

    def least_bytes(tokens: int, guide: int) -> int:
        return compute_device().bytes_per_value * size.layers * (2 * size.dim * (tokens + guide) + weights)

    passes, native_tokens = plan.proxy.passes, plan.native_grid.tokens
    detail = plan.named_stages()[-1][0]
    rows = (
        ("native", plan.native_flops(steps, passes), denoise(arms["native"]).seconds, native_tokens, 0, steps * passes),
        (
            "atlasvid, last detail level",
            plan.flops(level),
            arms["few-step"][detail].seconds,
            level.grid.tokens,
            plan.below(level).tokens,
            level.forwards(),
        ),
    )
    points = [
        {"name": name, "intensity": flops / least_bytes(tokens, guide) / runs, "flops_per_second": flops / seconds}
        for name, flops, seconds, tokens, guide, runs in rows
    ]
    return {"flops_per_second": rates.gemm, "bytes_per_second": rates.copy, "points": points}


def _plain(timing: Timing) -> dict[str, Any]:
    return {name: getattr(timing, name) for name in ("seconds", "low", "high", "runs", "fraction", "projected")}
