"""The commands that make something: flags -> Request -> Plan -> pipeline. Heavy imports are in the bodies."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from . import options as opt
from .batch import run_batch
from .errors import UsageError
from .parse import parse_frames, parse_region
from .prompts import items_of, shard_of
from .request import make_request, with_clip
from .show import show_plan
from .targets import check_apart, check_writable, is_made, target_of


def render(
    prompt: opt.Prompt = None,
    res: opt.Res = "960x540",
    seconds: opt.ClipSeconds = None,
    fps: opt.Fps = None,
    seed: opt.Seed = 0,
    steps: opt.Steps = None,
    guidance_scale: opt.Guidance = None,
    flow_shift: opt.Shift = None,
    sampler: opt.ProxySampler = None,
    negative_prompt: opt.Negative = None,
    preset: opt.PresetName = "tiny",
    model_path: opt.ModelPath = None,
    lora: opt.Loras = None,
    strict: opt.Strict = False,
    attention_backend: opt.Backend = None,
    compile_blocks: opt.Compile = False,
    offload: opt.OffloadMode = "auto",
    weight_dtype: opt.WeightDtype = "auto",
    chunk: opt.Chunk = None,
    codec: opt.CodecName = "h264",
    output: opt.Output = None,
    run_dir: opt.RunDir = None,
    from_video: opt.FromVideo = None,
    prompt_file: opt.PromptFile = None,
    shard: opt.Shard = None,
    as_json: opt.Json = False,
    dry_run: opt.DryRun = False,
    debug: opt.Debug = False,
) -> None:
    """Make a video from a prompt (or many, with --prompt-file): proxy, detail, decode."""
    from .console import Console

    request = make_request(
        res,
        seconds,
        preset,
        lora,
        fps=fps,
        seed=seed,
        steps=steps,
        guidance_scale=guidance_scale,
        flow_shift=flow_shift,
        sampler=sampler,
        chunk=chunk,
        codec=codec,
        model_path=model_path,
        offload=offload,
        weight_dtype=weight_dtype,
        attention_backend=attention_backend,
        compiled=compile_blocks,
        strict=strict,
    )
    console = Console(as_json)
    request = with_clip(request, from_video, seconds, prompt_file, console)
    if prompt_file and run_dir:
        raise UsageError("--run-dir names one run: leave it out with --prompt-file")
    part = shard_of(shard, prompt_file)
    items = items_of(prompt, prompt_file, negative_prompt, seed, from_video)
    run_batch(items, part, request, output, run_dir, console, bool(prompt_file), dry_run)


def proxy(
    prompt: opt.Prompt = None,
    res: opt.Res = "960x540",
    seconds: opt.ClipSeconds = None,
    fps: opt.Fps = None,
    seed: opt.Seed = 0,
    steps: opt.Steps = None,
    guidance_scale: opt.Guidance = None,
    flow_shift: opt.Shift = None,
    sampler: opt.ProxySampler = None,
    negative_prompt: opt.Negative = None,
    preset: opt.PresetName = "tiny",
    model_path: opt.ModelPath = None,
    lora: opt.Loras = None,
    strict: opt.Strict = False,
    attention_backend: opt.Backend = None,
    compile_blocks: opt.Compile = False,
    offload: opt.OffloadMode = "auto",
    weight_dtype: opt.WeightDtype = "auto",
    output: opt.Output = None,
    from_video: opt.FromVideo = None,
    prompt_file: opt.PromptFile = None,
    shard: opt.Shard = None,
    as_json: opt.Json = False,
    dry_run: opt.DryRun = False,
    debug: opt.Debug = False,
) -> None:
    """Stage 1 only: the proxy of a video of the given size and length, saved as latents for refine."""
    from .console import Console

    request = make_request(
        res,
        seconds,
        preset,
        lora,
        fps=fps,
        seed=seed,
        steps=steps,
        guidance_scale=guidance_scale,
        flow_shift=flow_shift,
        sampler=sampler,
        model_path=model_path,
        offload=offload,
        weight_dtype=weight_dtype,
        attention_backend=attention_backend,
        compiled=compile_blocks,
        strict=strict,
        proxy_only=True,
    )
    console = Console(as_json)
    request = with_clip(request, from_video, seconds, prompt_file, console)
    part = shard_of(shard, prompt_file)
    items = items_of(prompt, prompt_file, negative_prompt, seed, from_video)
    run_batch(items, part, request, output, None, console, bool(prompt_file), dry_run)


def refine(
    latents: Annotated[Path, typer.Argument(help="A proxy, or an earlier result (.safetensors).", readable=False)],
    res: opt.Res = "960x540",
    region: Annotated[
        str | None, typer.Option("--region", help="x,y,w,h in pixels: sample this part again, in whole tokens.")
    ] = None,
    frames: Annotated[
        str | None, typer.Option("--frames", help="first:end: sample these frames again, in whole latent frames.")
    ] = None,
    seed: opt.RefineSeed = None,
    steps: opt.LevelSteps = None,
    guidance_scale: opt.LevelGuidance = None,
    flow_shift: opt.LevelShift = None,
    fps: opt.RefineFps = None,
    preset: opt.SavedPreset = None,
    model_path: opt.ModelPath = None,
    lora: opt.Loras = None,
    strict: opt.Strict = False,
    attention_backend: opt.Backend = None,
    compile_blocks: opt.Compile = False,
    offload: opt.OffloadMode = "auto",
    weight_dtype: opt.WeightDtype = "auto",
    chunk: opt.Chunk = None,
    codec: opt.CodecName = "h264",
    output: opt.Output = None,
    run_dir: opt.RunDir = None,
    as_json: opt.Json = False,
    dry_run: opt.DryRun = False,
    debug: opt.Debug = False,
) -> None:
    """Stage 2: climb from a saved proxy (or result) to --res; prompt, length and seed come from the file."""
    from .console import Console

    span = None if frames is None else parse_frames(frames)
    request = make_request(
        res,
        None,
        preset or "",
        lora,
        steps=steps,
        guidance_scale=guidance_scale,
        flow_shift=flow_shift,
        chunk=chunk,
        codec=codec,
        frames=span,
        model_path=model_path,
        offload=offload,
        weight_dtype=weight_dtype,
        attention_backend=attention_backend,
        compiled=compile_blocks,
        strict=strict,
    )
    width, height = request.width, request.height
    box = None if region is None else parse_region(region, width, height)
    console = Console(as_json)
    from . import above, artefacts
    from .plan import make_plan
    from .session import check_session
    from .video import check_target, suffix_for, warn_of_player

    artefacts.check_preset(latents, preset)
    given = {"preset": preset, "fps": fps, "seed": seed}
    taken = artefacts.request_defaults(latents) | {name: value for name, value in given.items() if value is not None}
    request = dataclasses.replace(request, region=box, **taken)
    own_seed = "" if seed is None else f"-seed{seed}"
    part = "-region" if box or span else ""
    default = latents.with_name(f"{latents.stem}-{width}x{height}{own_seed}{part}")
    target = target_of(output, default, suffix_for(codec))
    check_target(target, codec, width, height)
    check_apart(target, run_dir)
    warn_of_player(console, codec, width, height)
    make_plan(request)  # usage errors first
    plan = above.plan_from_proxy(latents, request)
    if span and span[1] > plan.frames:
        raise UsageError(f"--frames {frames} ends after the video's {plan.frames} frames; end it there")
    if dry_run:
        if session := check_session(request, console):
            session.identify(console, *session.parts)  # which the file is bound to
            artefacts.check_latents(latents, session)
        return show_plan(plan, console, target.parent, run_dir)
    console.emit(above.refine_saved(latents, plan, target, run_dir, console), str(target))


def decode(
    latents: Annotated[
        Path, typer.Argument(help="Saved latents: detail.safetensors, or a proxy to look at.", readable=False)
    ],
    output: opt.Output = None,
    codec: opt.CodecName = "h264",
    preset: opt.SavedPreset = None,
    model_path: opt.ModelPath = None,
    as_json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Saved latents to a video again, say with another codec; no sampling."""
    from .video import check_target, suffix_for, warn_of_player

    suffix = suffix_for(codec)  # an unknown codec is said before the heavy imports
    from . import artefacts, outputs, pipeline
    from .console import Console
    from .decode_cost import check_decode
    from .presets import load_preset
    from .session import Session

    artefacts.check_preset(latents, preset)
    known, console = artefacts.describe(latents), Console(as_json)
    size = width, height = int(known["width"]), int(known["height"])
    target = target_of(output, latents.with_suffix(""), suffix)
    check_target(target, codec, width, height)
    check_writable(target)
    outputs.check_replaceable(target, known, codec)
    loaded, frames, made = load_preset(preset or known["preset"]), int(known["frames"]), is_made(target)
    room = partial(check_decode, loaded, shape := artefacts.latents_shape(latents), size, frames, codec, target.parent)
    if not made:  # what is finished needs no room
        room()
    session = Session(loaded, model_path, only="vae")
    if outputs.is_finished(target, outputs.video_tags(session, known, shape[1:], codec), frames):
        console.note(f"{target} was finished before")
        return console.emit({"video": str(target), "status": "skipped"}, str(target))
    if made:
        room()
    warn_of_player(console, codec, width, height)
    pipeline.decode(session, latents, target, codec, console)
    console.emit({"video": str(target), "status": "ok"}, str(target))
