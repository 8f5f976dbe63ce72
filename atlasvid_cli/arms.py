"""The arms of the bench: full attention by diffusers, and our path at equal steps and as it renders (DESIGN §9)."""

import itertools
import shutil
import time
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import WanPipeline

from . import pipeline
from .artefacts import read_latents
from .cost import DECODE_EFFICIENCY, EFFICIENCY, GIB, rows
from .decode_cost import vae_tile
from .flops import full_flops
from .machine import available_ram, conv_rate, peak_bytes, reset_peak
from .measure import (
    SAMPLE_SECONDS,
    STOCK_CONV_RATE,
    crop,
    decode_sample,
    detail_sample,
    enlarge_sample,
    heads_in_memory,
    mux_alone,
    native_decode,
    native_forward,
    native_pass,
    native_sample,
    proxy_sample,
)
from .plan import Plan, make_plan
from .session import Session
from .shapes import Grid
from .stages import Stage
from .timing import Stopwatch, Timing, from_samples, timed, together
from .vae_cost import decode_flops, overlap
from .video import read_frames
from .weights import load_scheduler

PROMPT = "a red ball moving right over a green checkerboard"
SAMPLED_LATENTS = 3
WARM_UP = (512, 320)  # pixels of a clip of half a second
Stages = dict[str, Timing]


@dataclass(frozen=True)
class Bench:
    """What all measurements share. Sessions and text are None where there are no weights.

    `rate`: FLOP/s of a big GEMM here. `seconds`: what an arm may take, all its repeats together.
    """

    proxy: Session | None
    detail: Session | None
    text: Any
    model: Any
    vae: Any
    folder: Path
    rate: float
    seconds: float
    repeats: int


@dataclass(frozen=True)
class Check:
    """How far a projection was off, relatively, and at how many tokens that was seen."""

    error: float
    tokens: int


def warm_up(bench: Bench, plan: Plan) -> float:
    """A small render; returns the seconds that its text took."""
    width, height = WARM_UP
    small = replace(plan.request, width=width, height=height, seconds=Fraction(1, 2))
    return _render(bench, make_plan(small))["text"]


# --- our arms ------------------------------------------------------------------------------------------------------


def _render(bench: Bench, plan: Plan, decode: bool = True) -> dict[str, float]:
    """Seconds of each stage of a render by `pipeline`, files included. `rest` is what lies between the stages."""
    assert bench.proxy and bench.detail
    watch, run_dir = Stopwatch(), bench.folder / "run"
    shutil.rmtree(run_dir, ignore_errors=True)
    start = time.perf_counter()
    made = pipeline.make_proxy(bench.proxy, plan, run_dir, watch)
    latents = pipeline.refine(bench.detail, plan, made, run_dir, watch)
    if decode:
        video = bench.folder / "video.mp4"
        video.unlink(missing_ok=True)
        begun = time.perf_counter()
        pipeline.decode(bench.detail, latents, video, plan.request.codec, watch)
    end = time.perf_counter()
    marks = watch.marks
    seconds = {"text": marks["proxy"][0] - start}
    seconds |= {name: stop - first for name, (first, _, stop) in marks.items() if name not in ("text", "decode")}
    if decode:
        last_frame = marks["decode"][1]
        seconds |= {"decode": last_frame - begun, "mux": end - last_frame}
    return seconds | {"rest": end - start - sum(seconds.values())}


def _renders(bench: Bench, plan: Plan, repeats: int, decode: bool = True) -> Stages:
    runs = [_render(bench, plan, decode) for _ in range(repeats)]
    return {name: from_samples([r[name] for r in runs]) for name in runs[0]}


def expected_seconds(plan: Plan) -> float:
    """Of a render, as `plan` projects it."""
    return sum(row["seconds"] for row in rows(plan))


def few_step_arm(bench: Bench, plan: Plan, repeats: int) -> tuple[Stages, int | None]:
    """(times of each stage, peak bytes) as the preset renders, in full or, where the budget is too small, sampled.

    Samples are of the same stages, but for `rest`.
    """
    reset_peak()
    if bench.proxy and expected_seconds(plan) * repeats <= bench.seconds:
        return _renders(bench, plan, repeats), peak_bytes()
    share = bench.seconds / 4
    stages = {"proxy": proxy_sample(bench.model, plan, bench.rate, share, repeats)}
    for name, stage in plan.named_stages()[1:]:
        stages[name] = detail_sample(bench.model, plan, stage, bench.rate, share / len(plan.levels), repeats)
        if stage.in_pixels:
            stages[f"{name} start"] = enlarge_sample(bench.vae, plan, stage, bench.folder, repeats)
    latents = torch.randn(1, plan.preset.transformer.channels, 1, 8, 8)
    if bench.proxy:
        stages["text"] = from_samples([warm_up(bench, plan) for _ in range(repeats)])
        latents = read_latents(bench.folder / "run" / "detail.safetensors", bench.proxy)[0][None]
    stages["preview"] = together(_decoded(bench, plan, plan.proxy, latents, bench.seconds / 8, repeats))
    stages["decode"], stages["mux"] = _decoded(bench, plan, plan.levels[-1], latents, bench.seconds * 3 / 8, repeats)
    (bench.folder / "sample.mp4").replace(bench.folder / "video.mp4")
    return stages, None


def _decoded(
    bench: Bench, plan: Plan, stage: Stage, latents: torch.Tensor, seconds: float, repeats: int
) -> tuple[Timing, Timing]:
    """(decode, mux) of all that a stage makes, from its first latent frames, or a part of each where they would take
    more than `seconds`; they are `latents` (1, C, t, h, w) enlarged, so smooth, as a video is."""
    patch, count = plan.preset.geometry.patch, min(SAMPLED_LATENTS, stage.grid.t)
    h, w = stage.grid.h * patch, stage.grid.w * patch
    config = asdict(plan.preset.vae)
    work = decode_flops(config, h, w) * count / (h * w)
    part = crop(Grid(1, h, w), conv_rate(bench.vae.dtype) * DECODE_EFFICIENCY * seconds / work)
    picture = F.interpolate(latents, (count, part.h, part.w), mode="trilinear")[0]
    tile = vae_tile(plan.preset, h, w)
    smaller = tile if tile and tile < max(part.h, part.w) else None
    decode, mux = decode_sample(bench.vae, picture, plan, stage, smaller, bench.folder, repeats)
    more = h * w / part.tokens
    halos = overlap(config, h, w, tile) / overlap(config, part.h, part.w, smaller)
    return decode.times(more * halos), mux.times(more)


def equal_arm(bench: Bench, plan: Plan, steps: int, few: Stages) -> Stages:
    """The same path at native's steps and guidance; what is not sampled (text, decode, mux) is the few-step arm's."""
    equal = plan.at_equal_steps(steps)
    pairs = zip(plan.named_stages(), equal.named_stages(), strict=True)
    flops = {name: (plan.flops(as_rendered), equal.flops(stage)) for (name, as_rendered), (_, stage) in pairs}
    expected = sum(work for _, work in flops.values()) / (bench.rate * EFFICIENCY)
    if bench.proxy and expected * bench.repeats <= bench.seconds:
        sampled = _renders(bench, equal, bench.repeats, decode=False)
    else:
        sampled = {name: few[name].times(work / done) for name, (done, work) in flops.items()}
    return few | {name: sampled[name] for name in flops}


# --- native --------------------------------------------------------------------------------------------------------


def native_arm(bench: Bench, plan: Plan, steps: int, frames: list[torch.Tensor]) -> tuple[Stages, int | None]:
    """(times of each stage, peak bytes) of diffusers at the asked size: WanPipeline, or a sample of its transformer.

    Muxing is timed with the frames of our video, so that both arms encode the same.
    """
    grid, patch, config = plan.native_grid, plan.preset.geometry.patch, plan.preset
    passes, h, w = plan.proxy.passes, grid.h * patch, grid.w * patch
    expected = plan.native_flops(steps, passes) / (bench.rate * EFFICIENCY)
    whole = bench.proxy is not None and expected * bench.repeats <= bench.seconds
    stages: Stages = {}
    reset_peak()
    pipe = None
    if bench.proxy:
        scheduler = load_scheduler(bench.proxy.folder, plan.proxy.flow_shift, plan.proxy.sampler)
        pipe = WanPipeline(*bench.text, bench.vae, scheduler, bench.model)
        pipe.set_progress_bar_config(disable=True)
        texts = (PROMPT, config.negative_prompt, passes > 1)
        stages["text"] = timed(lambda: pipe.encode_prompt(*texts, max_sequence_length=512), bench.repeats)
    if whole and pipe:
        with torch.no_grad():
            prompt, negative = pipe.encode_prompt(*texts, max_sequence_length=512)
        pixels = config.geometry.token_pixels
        call = {
            "height": grid.h * pixels,
            "width": grid.w * pixels,
            "num_frames": (grid.t - 1) * config.geometry.temporal + 1,
            "num_inference_steps": steps,
            "guidance_scale": plan.proxy.guidance_scale,
        }
        embeddings = {"prompt_embeds": prompt, "negative_prompt_embeds": negative}
        one = {**call, "num_inference_steps": 1}
        timed(lambda: pipe(**embeddings, **one, output_type="latent"), 1, False)  # warm-up
        stages["denoise"] = timed(lambda: pipe(**embeddings, **call, output_type="latent"), bench.repeats, False)
    else:
        size = config.transformer
        forward = native_pass(bench.model, size, patch, grid, bench.rate, bench.seconds / 2, bench.repeats)
        stages["denoise"] = forward.times(steps * passes)
    work = decode_flops(bench.vae.config, h, w) * grid.t / (conv_rate(bench.vae.dtype) * STOCK_CONV_RATE)
    fits = plan.frames * 9 * h * w * config.geometry.spatial**2 * 4 < available_ram() / 2
    if whole and fits and work * bench.repeats <= bench.seconds:
        like = {"device": bench.vae.device, "dtype": bench.vae.dtype}
        clip = torch.randn(1, bench.vae.config.z_dim, grid.t, h, w, **like)
        stages["decode"] = timed(lambda: bench.vae.decode(clip), bench.repeats, False)
    else:
        stages["decode"] = native_decode(bench.vae, grid, patch, bench.seconds / 4, bench.repeats)
    stages["mux"] = mux_alone(frames, plan, bench.folder, bench.repeats)
    return stages, peak_bytes() if whole and not any(t.projected for t in stages.values()) else None


def first_frames(path: Path, plan: Plan) -> list[torch.Tensor]:
    """The first frames (3, H, W) in 0..1 of our video, as many as a GiB holds."""
    if not path.exists():
        return []
    count = max(2, GIB // (plan.request.width * plan.request.height * 12))
    frames = itertools.islice(read_frames(path), count)
    return [torch.from_numpy(f).permute(2, 0, 1).float() / 255 for f in frames]


def native_point(bench: Bench, plan: Plan, steps: int) -> Stages:
    """Native's denoising and decoding at a smaller size, from one forward and two latent frames."""
    grid, patch, share = plan.native_grid, plan.preset.geometry.patch, bench.seconds / 8
    one = native_pass(bench.model, plan.preset.transformer, patch, grid, bench.rate, share, 1)
    decode = native_decode(bench.vae, grid, patch, share, 1)
    return {"denoise": one.times(steps * plan.proxy.passes), "decode": decode}


# --- how far projections can be trusted ----------------------------------------------------------------------------


def native_error(bench: Bench, plan: Plan) -> Check:
    """`native_sample` where one forward can be timed in full as well, of as many heads as at the full size."""
    size, patch, grid = plan.preset.transformer, plan.preset.geometry.patch, plan.native_grid
    runs = max(3, bench.repeats)
    seconds = min(bench.seconds / 4, SAMPLE_SECONDS)
    budget = bench.rate * EFFICIENCY * seconds / (runs + 1)
    while full_flops(size, patch, grid.tokens, size.text_length) > budget and grid.tokens > 1:
        grid = crop(grid, grid.tokens - 1)
    whole = timed(native_forward(bench.model, patch, size.text_length, grid), runs)
    heads = heads_in_memory(size, plan.native_grid.tokens)
    sample = native_sample(bench.model, size, patch, grid, heads, bench.rate, seconds / 2, runs)
    return Check(sample.seconds / whole.seconds - 1, grid.tokens)


def detail_error(bench: Bench, plan: Plan, measured: Stages) -> dict[str, Check]:
    """The samples of the last level and of decoding, against the run in full just before."""
    stage, runs = plan.levels[-1], max(3, bench.repeats)
    one = plan.flops(stage) / stage.forwards() / (bench.rate * EFFICIENCY)
    sample = detail_sample(bench.model, plan, stage, bench.rate, one * (runs + 1) / 3, runs)
    assert bench.proxy
    errors = {"detail": sample.seconds / measured[plan.named_stages()[-1][0]].seconds - 1}
    latents = read_latents(bench.folder / "run" / "detail.safetensors", bench.proxy)[0]
    if latents.shape[1] > SAMPLED_LATENTS:
        tile = vae_tile(plan.preset, *latents.shape[2:])
        parts = decode_sample(bench.vae, latents[:, :SAMPLED_LATENTS], plan, stage, tile, bench.folder, runs)
        whole = measured["decode"].seconds + measured["mux"].seconds
        errors["decode"] = together(parts).seconds / whole - 1
    return {name: Check(error, stage.grid.tokens) for name, error in errors.items()}
