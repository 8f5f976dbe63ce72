"""The command line: flags -> Request -> Plan -> pipeline. Heavy imports are in the bodies."""

import os
import signal
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from . import options as opt
from .batch import (
    check_writable,
    keep_foreign,
    proxy_one,
    render_one,
    run_batch,
    show_plan,
    train_part,
    with_clip,
    with_suffix,
)
from .errors import ExitCode, UsageError, explain, one_line
from .parse import check_finite, parse_frames, parse_region, parse_resolution, parse_seconds
from .prompts import items_of, slug

if TYPE_CHECKING:
    from .console import Console
    from .plan import Request

app = typer.Typer(
    help="Text to 4K video of any length on your own machine: a global proxy, then jointly denoised detail.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # half the time of --help
)


@app.command()
def render(
    prompt: opt.Prompt = None,
    res: opt.Res = "960x540",
    seconds: opt.ClipSeconds = None,
    fps: opt.Fps = None,
    seed: opt.Seed = 0,
    steps: opt.Steps = None,
    guidance_scale: opt.Guidance = None,
    flow_shift: opt.Shift = None,
    negative_prompt: opt.Negative = None,
    preset: opt.PresetName = "tiny",
    model_path: opt.ModelPath = None,
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
    request = _request(res, seconds, fps, seed, steps, guidance_scale, flow_shift, preset, model_path, chunk, codec)
    console = _console(as_json)
    request = with_clip(request, from_video, seconds, prompt_file, console)
    items = items_of(prompt, prompt_file, shard, negative_prompt, seed, from_video)
    if prompt_file and run_dir:
        raise UsageError("--run-dir names one run: leave it out with --prompt-file")
    run_batch(items, request, output, run_dir, console, bool(prompt_file), dry_run, render_one, ".mp4")


@app.command()
def proxy(
    prompt: opt.Prompt = None,
    res: opt.Res = "960x540",
    seconds: opt.ClipSeconds = None,
    fps: opt.Fps = None,
    seed: opt.Seed = 0,
    steps: opt.Steps = None,
    guidance_scale: opt.Guidance = None,
    flow_shift: opt.Shift = None,
    negative_prompt: opt.Negative = None,
    preset: opt.PresetName = "tiny",
    model_path: opt.ModelPath = None,
    output: opt.Output = None,
    from_video: opt.FromVideo = None,
    prompt_file: opt.PromptFile = None,
    shard: opt.Shard = None,
    as_json: opt.Json = False,
    dry_run: opt.DryRun = False,
    debug: opt.Debug = False,
) -> None:
    """Stage 1 only: the proxy of a video of the given size and length, saved as latents for refine."""
    request = _request(res, seconds, fps, seed, steps, guidance_scale, flow_shift, preset, model_path)
    console = _console(as_json)
    request = with_clip(request, from_video, seconds, prompt_file, console)
    items = items_of(prompt, prompt_file, shard, negative_prompt, seed, from_video)
    run_batch(items, request, output, None, console, bool(prompt_file), dry_run, proxy_one, ".safetensors")


@app.command()
def refine(
    latents: Annotated[Path, typer.Argument(help="A proxy, or an earlier result (.safetensors).")],
    res: opt.Res = "960x540",
    region: Annotated[
        str | None, typer.Option("--region", help="x,y,w,h in pixels: sample only this part again.")
    ] = None,
    frames: Annotated[
        str | None, typer.Option("--frames", help="first:end in frames: sample only these again.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Seed [default: the proxy's].")] = None,
    steps: opt.Steps = None,
    fps: opt.Fps = None,
    preset: opt.SavedPreset = None,
    model_path: opt.ModelPath = None,
    chunk: opt.Chunk = None,
    codec: opt.CodecName = "h264",
    output: opt.Output = None,
    run_dir: opt.RunDir = None,
    as_json: opt.Json = False,
    dry_run: opt.DryRun = False,
    debug: opt.Debug = False,
) -> None:
    """Stage 2: climb from a saved proxy (or result) to --res; prompt, length and seed come from the file."""
    width, height = parse_resolution(res)
    box = parse_region(region, width, height) if region else None
    span = parse_frames(frames) if frames else None
    console = _console(as_json)
    from . import artefacts, pipeline
    from .plan import Request, make_plan
    from .session import Session
    from .store import lock, run_directory
    from .video import check_target

    known = artefacts.request_defaults(latents)
    request = Request(
        width=width,
        height=height,
        steps=steps,
        chunk=chunk,
        codec=codec,
        region=box,
        frames=span,
        model_path=model_path,
        preset=preset or known["preset"],
        seconds=known["seconds"],
        fps=fps or known["fps"],
        seed=known["seed"] if seed is None else seed,
    )
    own_seed = "" if seed is None else f"-seed{seed}"
    part = "-region" if box or span else ""
    target = with_suffix(output or latents.with_name(f"{latents.stem}-{width}x{height}{own_seed}{part}"), codec)
    check_target(target, codec, width, height)
    make_plan(request)  # usage errors first
    session = Session(request.preset, model_path)
    plan = pipeline.plan_from_proxy(latents, request, session)
    if span and span[1] > plan.frames:
        raise UsageError(f"--frames {frames} ends after the video's {plan.frames} frames; end it there")
    if show_plan(plan, console, dry_run):
        return
    plan.check_resources(target.parent, run_dir)
    # a region is redone in the run of its video, whose seed is the proxy's unless --run-dir names another
    run_seed = known["seed"] if plan.is_region else request.seed
    source = artefacts.describe(latents)["key"]
    folder = run_dir or target.parent / "runs" / f"{slug(latents.stem)}-{width}x{height}-{source}-{run_seed}"
    check_writable(target)
    with lock(run_directory(folder.parent, folder.name)):
        keep_foreign(target, artefacts.result_key(session, plan, latents, folder))
        result = pipeline.refine(session, plan, latents, folder, console)
        pipeline.decode(session, result, target, codec, console)
    console.emit({"video": str(target), "latents": str(result), "status": "ok"}, str(target))


@app.command()
def decode(
    latents: Annotated[Path, typer.Argument(help="Saved latents: detail.safetensors, or a proxy to look at.")],
    output: opt.Output = None,
    codec: opt.CodecName = "h264",
    preset: opt.SavedPreset = None,
    model_path: opt.ModelPath = None,
    as_json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Saved latents to a video again, say with another codec; no sampling."""
    from . import artefacts, pipeline
    from .session import Session
    from .video import check_target

    known = artefacts.describe(latents)
    target = with_suffix(output or latents.with_suffix(""), codec)
    check_target(target, codec, int(known["width"]), int(known["height"]))
    keep_foreign(target, known["key"])
    session = Session(preset or known["preset"], model_path)
    console = _console(as_json)
    pipeline.decode(session, latents, target, codec, console)
    console.emit({"video": str(target), "status": "ok"}, str(target))


@app.command()
def plan(
    res: opt.Res = "960x540",
    seconds: opt.Seconds = "4",
    fps: opt.Fps = None,
    steps: opt.Steps = None,
    guidance_scale: opt.Guidance = None,
    preset: opt.PresetName = "tiny",
    chunk: opt.Chunk = None,
    codec: opt.CodecName = "h264",
    as_json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """What a render would take: tokens, windows, FLOPs, memory, disk and time. Nothing is loaded."""
    request = _request(res, seconds, fps, 0, steps, guidance_scale, None, preset, None, chunk, codec)
    from .plan import make_plan

    resolved = make_plan(request)
    console = _console(as_json)
    if as_json:
        console.emit({**resolved.to_json(), "rows": resolved.rows()}, "")
    else:
        show_plan(resolved, console, True)


@app.command()
def presets(as_json: opt.Json = False, debug: opt.Debug = False) -> None:
    """The presets that come with the tool."""
    from .presets import load_preset, preset_names

    console = _console(as_json)
    for name in preset_names():
        preset = load_preset(name)
        console.emit({"name": name, "description": preset.description}, f"{name}\t{preset.description}")


@app.command()
def info(
    file: Annotated[Path, typer.Argument(help="A video, a latents file or a run directory.")],
    as_json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """What a file was made from."""
    from .info import describe, lines

    facts = describe(file)
    _console(as_json).emit(facts, "\n".join(lines(facts)))


@app.command()
def doctor(as_json: opt.Json = False, debug: opt.Debug = False) -> None:
    """The machine as atlasvid sees it: device, versions, codecs, memory and disk, and what each preset can do here."""
    from .doctor import examine
    from .info import lines

    facts = examine(Path())
    _console(as_json).emit(facts, "\n".join(lines(facts)))


@app.command()
def train(
    what: Annotated[str, typer.Argument(help="tiny: the embedded model, from nothing; proxy or detail: an adapter.")],
    data: opt.Data = None,
    preset: opt.PresetName = "tiny",
    model_path: opt.ModelPath = None,
    work: Annotated[Path, typer.Option("--work", help="Checkpoints, latents, logs; resumed from.")] = Path("training"),
    output: opt.Trained = None,
    steps: opt.TrainSteps = None,
    lr: opt.Rate = None,
    rank: opt.Rank = None,
    seed: opt.TrainSeed = None,
    debug: opt.Debug = False,
) -> None:
    """Train an adapter for a stage on captioned clips, or the embedded model itself; the same command resumes."""
    check_finite("--lr", lr, 0)
    given = {"data": data, "steps": steps, "lr": lr, "rank": rank, "seed": seed, "model-path": model_path}
    console = _console(False)
    console.emit({}, str(train_part(what, preset, work, output, given, console)))


def main() -> NoReturn:
    """The entry point: the one place where errors become sentences and exit codes."""
    debug = "--debug" in sys.argv
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads starve the encoder's
    try:
        code = app(standalone_mode=False)
        if code == ExitCode.INTERRUPTED:  # typer turns Ctrl-C into its own exit code
            raise KeyboardInterrupt
        sys.exit(code if isinstance(code, int) else ExitCode.OK)
    except (KeyboardInterrupt, typer.Abort):
        _fail(
            "interrupted: run the same command again to go on from the last finished step", ExitCode.INTERRUPTED, debug
        )
    except Exception as error:
        # typer brings its own Click, whose usage errors are only known by what they carry
        usage = getattr(error, "exit_code", None) == 2 and hasattr(error, "format_message")
        if usage:
            _fail(f"{error.format_message()} (see atlasvid --help)", ExitCode.USAGE, debug)  # type: ignore[attr-defined]
        _fail(*explain(error), debug)


def _fail(message: str, code: ExitCode, debug: bool) -> NoReturn:
    if debug:
        traceback.print_exc()
    print(f"error: {one_line(message)}", file=sys.stderr)
    sys.exit(code)


def _console(json_lines: bool) -> "Console":
    from .console import Console

    return Console(json_lines=json_lines)


def _request(
    res: str,
    seconds: str | None,
    fps: int | None,
    seed: int,
    steps: int | None,
    guidance_scale: float | None,
    flow_shift: float | None,
    preset: str,
    model_path: str | None,
    chunk: int | None = None,
    codec: str = "h264",
) -> "Request":
    width, height = parse_resolution(res)
    length = parse_seconds(seconds or "4")
    check_finite("--guidance-scale", guidance_scale, 0)
    check_finite("--flow-shift", flow_shift, 0)
    from .plan import Request
    from .video import suffix_for

    suffix_for(codec)  # an unknown codec is said before anything else

    return Request(
        preset,
        width,
        height,
        length,
        fps,
        seed,
        steps,
        guidance_scale,
        flow_shift,
        chunk,
        codec,
        None,
        None,
        model_path,
    )


if __name__ == "__main__":
    main()
