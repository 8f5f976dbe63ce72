"""The arms of the bench: full attention by diffusers, and our path at equal steps and as it renders (DESIGN §9)."""

import itertools
import shutil
import time
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
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
    Budget,
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
from .presets import Vae
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
StageTimes = dict[str, Timing]


@dataclass(frozen=True)
class Bench:
    """What all measurements share. Sessions and text are None where there are no weights.

    `rate`: FLOP/s of a big GEMM here. `seconds`: what an arm may take, all its repeats together.
    """

    proxy_session: Session | None
    detail_session: Session | None
    text: Any
    model: Any
    vae: Any
    folder: Path
    rate: float
    seconds: float
    repeats: int

    @property
    def has_weights(self) -> bool:
        return self.proxy_session is not None


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
    assert bench.proxy_session and bench.detail_session
    watch, run_dir = Stopwatch(), bench.folder / "run"
    shutil.rmtree(run_dir, ignore_errors=True)
    start = time.perf_counter()
    made = pipeline.make_proxy(bench.proxy_session, plan, run_dir, watch)
    latents = pipeline.refine(bench.detail_session, plan, made, run_dir, watch)
    if decode:
        video = bench.folder / "video.mp4"
        video.unlink(missing_ok=True)
        begun = time.perf_counter()
        pipeline.decode(bench.detail_session, latents, video, plan.request.codec, watch)
    end = time.perf_counter()
    marks = watch.marks
    seconds = {"text": marks["proxy"][0] - start}
    seconds |= {name: stop - first for name, (first, _, stop) in marks.items() if name not in ("text", "decode")}
    if decode:
        last_frame = marks["decode"][1]
        seconds |= {"decode": last_frame - begun, "mux": end - last_frame}
    return seconds | {"rest": end - start - sum(seconds.values())}


def _renders(bench: Bench, plan: Plan, repeats: int, decode: bool = True) -> StageTimes:
    runs = [_render(bench, plan, decode) for _ in range(repeats)]
    return {name: from_samples([r[name] for r in runs]) for name in runs[0]}


def expected_seconds(plan: Plan) -> float:
    """Of a render, as `plan` projects it."""
    return sum(row.seconds for row in rows(plan))


def few_step_arm(bench: Bench, plan: Plan, repeats: int) -> tuple[StageTimes, int | None]:
    """(times of each stage, peak bytes) as the preset renders, in full or, where the budget is too small, sampled.

    Samples are of the same stages, but for `rest`.
    """
    reset_peak()
    if bench.has_weights and expected_seconds(plan) * repeats <= bench.seconds:
        return _renders(bench, plan, repeats), peak_bytes()
    share = Budget(bench.rate, bench.seconds / 4, repeats)
    stages = {"proxy": proxy_sample(bench.model, plan, share)}
    level = share._replace(seconds=share.seconds / len(plan.levels))
    for name, stage in plan.named_stages()[1:]:
        stages[name] = detail_sample(bench.model, plan, stage, level)
        if stage.in_pixels:
            stages[f"{name} start"] = enlarge_sample(bench.vae, plan, stage, bench.folder, repeats)
    latents = torch.randn(1, plan.preset.transformer.channels, 1, 8, 8)
    if bench.proxy_session:
        stages["text"] = from_samples([warm_up(bench, plan) for _ in range(repeats)])
        latents = read_latents(bench.folder / "run" / "detail.safetensors", bench.proxy_session)[0][None]
    stages["preview"] = together(_decoded(bench, plan, plan.proxy, latents, bench.seconds / 8, repeats))
    stages["decode"], stages["mux"] = _decoded(bench, plan, plan.levels[-1], latents, bench.seconds * 3 / 8, repeats)
    (bench.folder / "sample.mp4").replace(bench.folder / "video.mp4")
    return stages, None


def _decoded(
    bench: Bench, plan: Plan, stage: Stage, latents: torch.Tensor, seconds: float, repeats: int
) -> tuple[Timing, Timing]:
    """(decode, mux) of all that a stage makes, from its first latent frames, or a part of each where they would take
    more than `seconds`, all repeats; they are `latents` (1, C, t, h, w) enlarged, so smooth, as a video is."""
    patch, count = plan.preset.geometry.patch, min(SAMPLED_LATENTS, stage.grid.t)
    h, w = stage.grid.h * patch, stage.grid.w * patch
    work = decode_flops(plan.preset.vae, h, w) * count / (h * w)
    part = crop(Grid(1, h, w), conv_rate(bench.vae.dtype) * DECODE_EFFICIENCY * seconds / repeats / work)
    picture = F.interpolate(latents, (count, part.h, part.w), mode="trilinear")[0]
    tile = vae_tile(plan.preset, h, w)
    smaller = tile if tile and tile < max(part.h, part.w) else None
    decode, mux = decode_sample(bench.vae, picture, plan, stage, smaller, bench.folder, repeats)
    more = h * w / part.tokens
    halos = overlap(plan.preset.vae, h, w, tile) / overlap(plan.preset.vae, part.h, part.w, smaller)
    return decode.times(more * halos), mux.times(more)


def equal_arm(bench: Bench, plan: Plan, steps: int, few: StageTimes) -> StageTimes:
    """The same path at native's steps and guidance; what is not sampled (text, decode, mux) is the few-step arm's."""
    equal = plan.at_equal_steps(steps)
    pairs = zip(plan.named_stages(), equal.named_stages(), strict=True)
    flops = {name: (plan.flops(as_rendered), equal.flops(stage)) for (name, as_rendered), (_, stage) in pairs}
    expected = sum(work for _, work in flops.values()) / (bench.rate * EFFICIENCY)
    if bench.has_weights and expected * bench.repeats <= bench.seconds:
        sampled = _renders(bench, equal, bench.repeats, decode=False)
    else:
        sampled = {name: few[name].times(work / done) for name, (done, work) in flops.items()}
    return few | {name: sampled[name] for name in flops}


# --- native --------------------------------------------------------------------------------------------------------


def native_arm(bench: Bench, plan: Plan, steps: int, frames: list[torch.Tensor]) -> tuple[StageTimes, int | None]:
    """(times of each stage, peak bytes) of diffusers at the asked size: WanPipeline, or samples of its parts.

    Muxing is timed with the frames of our video, so that both arms encode the same.
    """
    expected = plan.native_flops(steps, plan.proxy.passes) / (bench.rate * EFFICIENCY)
    whole = bench.has_weights and expected * bench.repeats <= bench.seconds
    stages: StageTimes = {}
    reset_peak()
    pipe = None
    if bench.proxy_session:
        scheduler = load_scheduler(bench.proxy_session.folder, plan.proxy.flow_shift, plan.proxy.sampler)
        pipe = WanPipeline(*bench.text, bench.vae, scheduler, bench.model)
        pipe.set_progress_bar_config(disable=True)
        stages["text"] = timed(partial(_native_text, pipe, plan), bench.repeats)
    stages["denoise"] = _native_denoise(bench, plan, steps, pipe if whole else None)
    stages["decode"] = _native_decode(bench, plan, whole)
    stages["mux"] = mux_alone(frames, plan, bench.folder, bench.repeats)
    return stages, peak_bytes() if whole and not any(t.projected for t in stages.values()) else None


def _native_text(pipe: WanPipeline, plan: Plan) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Embeddings of the prompt and, where it is guided, of the negative prompt."""
    text, length = (PROMPT, plan.preset.negative_prompt), plan.preset.transformer.text_length
    return pipe.encode_prompt(*text, plan.proxy.passes > 1, max_sequence_length=length)


def _native_denoise(bench: Bench, plan: Plan, steps: int, pipe: WanPipeline | None) -> Timing:
    """All steps of `pipe`, or without one projected from a forward of its transformer."""
    grid, geometry = plan.native_grid, plan.preset.geometry
    if pipe is None:
        budget = Budget(bench.rate, bench.seconds / 2, bench.repeats)
        forward = native_pass(bench.model, plan.preset.transformer, geometry.patch, grid, budget)
        return forward.times(steps * plan.proxy.passes)
    with torch.no_grad():
        prompt, negative = _native_text(pipe, plan)
    denoise = partial(
        pipe,
        prompt_embeds=prompt,
        negative_prompt_embeds=negative,
        height=grid.h * geometry.token_pixels,
        width=grid.w * geometry.token_pixels,
        num_frames=(grid.t - 1) * geometry.temporal + 1,
        num_inference_steps=steps,
        guidance_scale=plan.proxy.guidance_scale,
        output_type="latent",
    )
    timed(partial(denoise, num_inference_steps=1), 1, False)  # warm-up
    return timed(denoise, bench.repeats, False)


def _native_decode(bench: Bench, plan: Plan, whole: bool) -> Timing:
    """Decoding, in full where `whole` and memory and time allow, or else projected."""
    vae, grid, geometry = bench.vae, plan.native_grid, plan.preset.geometry
    h, w = grid.h * geometry.patch, grid.w * geometry.patch
    expected = decode_flops(Vae.stock(vae.config), h, w) * grid.t / (conv_rate(vae.dtype) * STOCK_CONV_RATE)
    fits = plan.frames * 9 * h * w * geometry.spatial**2 * 4 < available_ram() / 2
    if not (whole and fits and expected * bench.repeats <= bench.seconds):
        return native_decode(vae, grid, geometry.patch, bench.seconds / 4, bench.repeats)
    clip = torch.randn(1, vae.config.z_dim, grid.t, h, w, device=vae.device, dtype=vae.dtype)
    return timed(lambda: vae.decode(clip), bench.repeats, False)


def first_frames(path: Path, plan: Plan) -> list[torch.Tensor]:
    """The first frames (3, H, W) in 0..1 of our video, as many as a GiB holds."""
    count = max(2, GIB // (plan.request.width * plan.request.height * 12))
    frames = itertools.islice(read_frames(path), count)
    return [torch.from_numpy(f).permute(2, 0, 1).float() / 255 for f in frames]


def native_point(bench: Bench, plan: Plan, steps: int) -> StageTimes:
    """Native's denoising and decoding at a smaller size, from one forward and two latent frames."""
    grid, patch, share = plan.native_grid, plan.preset.geometry.patch, bench.seconds / 8
    one = native_pass(bench.model, plan.preset.transformer, patch, grid, Budget(bench.rate, share, 1))
    decode = native_decode(bench.vae, grid, patch, share, 1)
    return {"denoise": one.times(steps * plan.proxy.passes), "decode": decode}


# --- how far projections can be trusted ----------------------------------------------------------------------------


def native_error(bench: Bench, plan: Plan) -> Check:
    """`native_sample` where one forward can be timed in full as well, of as many heads as at the full size."""
    size, patch, grid = plan.preset.transformer, plan.preset.geometry.patch, plan.native_grid
    runs = max(3, bench.repeats)
    budget = Budget(bench.rate, bench.seconds / 4, runs).at_most(SAMPLE_SECONDS)
    while full_flops(size, patch, grid.tokens, size.text_length) > budget.flops and grid.tokens > 1:
        grid = crop(grid, grid.tokens - 1)
    whole = timed(native_forward(bench.model, patch, size.text_length, grid), runs)
    heads = heads_in_memory(size, plan.native_grid.tokens)
    half = budget._replace(seconds=budget.seconds / 2)
    sample = native_sample(bench.model, size, patch, grid, heads, half)
    return Check(sample.seconds / whole.seconds - 1, grid.tokens)


def detail_error(bench: Bench, plan: Plan, measured: StageTimes) -> dict[str, Check]:
    """The samples of the last level and of decoding, against the run in full just before."""
    stage, runs = plan.levels[-1], max(3, bench.repeats)
    one = plan.flops(stage) / stage.forwards() / (bench.rate * EFFICIENCY)
    sample = detail_sample(bench.model, plan, stage, Budget(bench.rate, one * (runs + 1) / 3, runs))
    assert bench.proxy_session
    errors = {"detail": sample.seconds / measured[plan.named_stages()[-1][0]].seconds - 1}
    latents = read_latents(bench.folder / "run" / "detail.safetensors", bench.proxy_session)[0]
    if latents.shape[1] > SAMPLED_LATENTS:
        tile = vae_tile(plan.preset, *latents.shape[2:])
        parts = decode_sample(bench.vae, latents[:, :SAMPLED_LATENTS], plan, stage, tile, bench.folder, runs)
        whole = measured["decode"].seconds + measured["mux"].seconds
        errors["decode"] = together(parts).seconds / whole - 1
    return {name: Check(error, stage.grid.tokens) for name, error in errors.items()}
