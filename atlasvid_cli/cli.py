"""The command line: flags -> Request -> Plan -> pipeline. Heavy imports are in the bodies."""

import os
import signal
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from . import options as opt
from .batch import check_writable, keep_foreign, proxy_one, render_one, run_batch, show_plan, with_clip, with_suffix
from .errors import ExitCode, UsageError, explain, one_line
from .parse import check_finite, make_request, parse_frames, parse_lora, parse_region, parse_resolution, parse_shard
from .prompts import Item, read_prompts, select, single, slug

if TYPE_CHECKING:
    from .console import Console

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
    lora: opt.Loras = None,
    strict: opt.Strict = False,
    attention_backend: opt.Backend = None,
    offload: opt.OffloadMode = None,
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
        chunk=chunk,
        codec=codec,
        model_path=model_path,
        offload=offload,
        attention_backend=attention_backend,
        strict=strict,
    )
    console = _console(as_json)
    request = with_clip(request, from_video, seconds, prompt_file, console)
    items = _items(prompt, prompt_file, shard, negative_prompt, seed, from_video)
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
    lora: opt.Loras = None,
    strict: opt.Strict = False,
    attention_backend: opt.Backend = None,
    offload: opt.OffloadMode = None,
    output: opt.Output = None,
    from_video: opt.FromVideo = None,
    prompt_file: opt.PromptFile = None,
    shard: opt.Shard = None,
    as_json: opt.Json = False,
    dry_run: opt.DryRun = False,
    debug: opt.Debug = False,
) -> None:
    """Stage 1 only: the proxy of a video of the given size and length, saved as latents for refine."""
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
        model_path=model_path,
        offload=offload,
        attention_backend=attention_backend,
        strict=strict,
    )
    console = _console(as_json)
    request = with_clip(request, from_video, seconds, prompt_file, console)
    items = _items(prompt, prompt_file, shard, negative_prompt, seed, from_video)
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
    lora: opt.Loras = None,
    strict: opt.Strict = False,
    attention_backend: opt.Backend = None,
    offload: opt.OffloadMode = None,
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
        offload=offload,
        attention_backend=attention_backend,
        loras=tuple(map(parse_lora, lora or ())),
        strict=strict,
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
    session = Session(request.preset, model_path, attention_backend, request.loras, strict)
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
    offload: opt.OffloadMode = None,
    codec: opt.CodecName = "h264",
    as_json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """What a render would take: tokens, windows, FLOPs, memory, disk and time. Nothing is loaded."""
    request = make_request(
        res,
        seconds,
        preset,
        fps=fps,
        steps=steps,
        guidance_scale=guidance_scale,
        chunk=chunk,
        codec=codec,
        offload=offload,
    )
    from .plan import make_plan

    resolved = make_plan(request)
    console = _console(as_json)
    if as_json:
        console.emit({**resolved.to_json(), "rows": resolved.rows()}, "")
    else:
        show_plan(resolved, console, True)


@app.command()
def bench(
    res: opt.BenchRes = None,
    seconds: opt.BenchSeconds = None,
    steps: opt.Steps = None,
    preset: opt.PresetName = "tiny",
    model_path: opt.ModelPath = None,
    repeats: opt.Repeats = None,
    budget_seconds: opt.Budget = None,
    quick: opt.Quick = False,
    page: opt.Html = None,
    as_json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Times this tool against full attention with the same weights, here; says what was projected and how well."""
    size, length, runs, budget = ("512x320", "1", 1, 15.0) if quick else ("960x540", "2", 3, 60.0)
    budget = budget if budget_seconds is None else budget_seconds
    check_finite("--budget-seconds", budget, 1)
    if page and page.suffix != ".html":
        raise UsageError(f"--html {page} must end in .html; name it report.html, say")
    request = make_request(res or size, seconds or length, preset, model_path=model_path)
    console = _console(as_json)
    from .plan import make_plan

    make_plan(request)  # usage errors before the heavy imports
    if page:
        check_writable(page.absolute())
    from . import bench, report
    from .store import atomic

    found = bench.run(request, steps, repeats or runs, budget, console)
    console.table("seconds, medians (min..max); loading weights left out", report.rows(found))
    console.table("", report.facts(found))
    if page:
        with atomic(page.absolute()) as file:
            file.write(report.page(found).encode())
    console.emit(found, report.sentences(found))


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
    what: Annotated[str, typer.Argument(help="What to train: tiny, the embedded model, from nothing.")],
    work: Annotated[Path, typer.Option("--work", help="Checkpoints, latents, logs; resumed from.")] = Path("training"),
    output: Annotated[Path, typer.Option("--output", "-o", help="The model folder.")] = Path("presets/tiny"),
    debug: opt.Debug = False,
) -> None:
    """Train the embedded model from nothing, a few hours on two cores; parts that exist are kept."""
    if what != "tiny":
        raise UsageError(f"there is no training called {what!r}; the one there is: atlasvid train tiny")
    from .train_tiny import make

    work.mkdir(parents=True, exist_ok=True)
    make(work, output)
    _console(False).emit({}, str(output))


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


def _items(
    prompt: str | None,
    prompt_file: str | None,
    shard: str | None,
    negative: str | None,
    seed: int,
    clip: Path | None = None,
) -> list[Item]:
    if clip is not None:
        name = slug(clip.stem)
        return [Item(name, (prompt or "").strip(), negative, seed, f"{name}-{seed}")]
    if (prompt is None) == (prompt_file is None):
        raise UsageError('give either a prompt, as in atlasvid render "a red ball moving right", or --prompt-file')
    if prompt_file is None:
        return [single(prompt or "", negative, seed)]
    return select(read_prompts(prompt_file, negative, seed), parse_shard(shard) if shard else None)


if __name__ == "__main__":
    main()
