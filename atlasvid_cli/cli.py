"""The command line: flags -> Request -> Plan -> pipeline. Heavy imports are in the bodies."""

import dataclasses
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from .errors import AtlasError, ExitCode, UsageError, one_line
from .parse import check_finite, parse_frames, parse_region, parse_resolution, parse_seconds, parse_shard
from .prompts import Item, read_prompts, select, single, slug

if TYPE_CHECKING:
    from .console import Console
    from .pipeline import Session
    from .plan import Plan, Request

app = typer.Typer(
    help="Text to 4K video of any length on your own machine: a global proxy, then jointly denoised detail.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # half the time of --help
)

Res = Annotated[str, typer.Option("--res", help="Size in pixels: 3840x2160, 3840*2160, 4k, 1080p, 720p ...")]
Seconds = Annotated[str, typer.Option("--seconds", help="Length in seconds; exactly seconds * fps frames are written.")]
Fps = Annotated[int | None, typer.Option("--fps", min=1, max=120, help="Frames a second [default: the preset's].")]
Seed = Annotated[int, typer.Option("--seed", min=0, max=2**63 - 1, help="Seed; in a batch each item adds its index.")]
Steps = Annotated[int | None, typer.Option("--steps", min=1, max=1000, help="Denoising steps [default: the preset's].")]
Guidance = Annotated[
    float | None, typer.Option("--guidance-scale", help="Classifier-free guidance of the proxy; 1 turns it off.")
]
Shift = Annotated[float | None, typer.Option("--flow-shift", help="Time shift of the proxy's flow-matching schedule.")]
PresetName = Annotated[str, typer.Option("--preset", help="A preset by name, or the path of a .toml file.")]
SavedPreset = Annotated[str | None, typer.Option("--preset", help="Preset [default: the one the file names].")]
ModelPath = Annotated[
    str | None, typer.Option("--model-path", help="Model folder in diffusers layout instead of the preset's.")
]
Chunk = Annotated[int | None, typer.Option("--chunk", min=1, help="Windows computed at a time; bounds memory.")]
CodecName = Annotated[str, typer.Option("--codec", help="h264 (8 bit), hevc10, av1, prores or ffv1 (10 bit).")]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Where the result goes.")]
RunDir = Annotated[
    Path | None, typer.Option("--run-dir", help="Where intermediate results go [default: runs/ beside the output].")
]
Negative = Annotated[str | None, typer.Option("--negative-prompt", help="What to steer away from.")]
PromptFile = Annotated[
    str | None, typer.Option("--prompt-file", help="One prompt a line, or JSON Lines; '-' is stdin.")
]
Shard = Annotated[str | None, typer.Option("--shard", help="i/n: every n-th prompt from the i-th on.")]
Json = Annotated[bool, typer.Option("--json", help="JSON Lines on stdout.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop; nothing is loaded.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Prompt = Annotated[str | None, typer.Argument(help="What to show.")]


@app.command()
def render(
    prompt: Prompt = None,
    res: Res = "960x540",
    seconds: Seconds = "4",
    fps: Fps = None,
    seed: Seed = 0,
    steps: Steps = None,
    guidance_scale: Guidance = None,
    flow_shift: Shift = None,
    negative_prompt: Negative = None,
    preset: PresetName = "tiny",
    model_path: ModelPath = None,
    chunk: Chunk = None,
    codec: CodecName = "h264",
    output: Output = None,
    run_dir: RunDir = None,
    prompt_file: PromptFile = None,
    shard: Shard = None,
    as_json: Json = False,
    dry_run: DryRun = False,
    debug: Debug = False,
) -> None:
    """Make a video from a prompt (or many, with --prompt-file): proxy, detail, decode."""
    request = _request(res, seconds, fps, seed, steps, guidance_scale, flow_shift, preset, model_path, chunk, codec)
    console = _console(as_json)
    items = _items(prompt, prompt_file, shard, negative_prompt, seed)
    if prompt_file and run_dir:
        raise UsageError("--run-dir names one run: leave it out with --prompt-file")
    _batch(items, request, output, run_dir, console, bool(prompt_file), dry_run, _render_one, ".mp4")


@app.command()
def proxy(
    prompt: Prompt = None,
    res: Res = "960x540",
    seconds: Seconds = "4",
    fps: Fps = None,
    seed: Seed = 0,
    steps: Steps = None,
    guidance_scale: Guidance = None,
    flow_shift: Shift = None,
    negative_prompt: Negative = None,
    preset: PresetName = "tiny",
    model_path: ModelPath = None,
    output: Output = None,
    prompt_file: PromptFile = None,
    shard: Shard = None,
    as_json: Json = False,
    dry_run: DryRun = False,
    debug: Debug = False,
) -> None:
    """Stage 1 only: the proxy of a video of the given size and length, saved as latents for refine."""
    request = _request(res, seconds, fps, seed, steps, guidance_scale, flow_shift, preset, model_path)
    console = _console(as_json)
    items = _items(prompt, prompt_file, shard, negative_prompt, seed)
    _batch(items, request, output, None, console, bool(prompt_file), dry_run, _proxy_one, ".safetensors")


@app.command()
def refine(
    latents: Annotated[Path, typer.Argument(help="A proxy, or an earlier result (.safetensors).")],
    res: Res = "960x540",
    region: Annotated[
        str | None, typer.Option("--region", help="x,y,w,h in pixels: sample only this part again.")
    ] = None,
    frames: Annotated[
        str | None, typer.Option("--frames", help="first:end in frames: sample only these again.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Seed [default: the proxy's].")] = None,
    steps: Steps = None,
    fps: Fps = None,
    preset: SavedPreset = None,
    model_path: ModelPath = None,
    chunk: Chunk = None,
    codec: CodecName = "h264",
    output: Output = None,
    run_dir: RunDir = None,
    as_json: Json = False,
    dry_run: DryRun = False,
    debug: Debug = False,
) -> None:
    """Stage 2: climb from a saved proxy (or result) to --res; prompt, length and seed come from the file."""
    width, height = parse_resolution(res)
    box = parse_region(region, width, height) if region else None
    span = parse_frames(frames) if frames else None
    console = _console(as_json)
    from . import pipeline
    from .plan import Request, make_plan
    from .store import lock, run_directory
    from .video import check_target

    known = pipeline.request_defaults(latents)
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
    target = _with_suffix(output or latents.with_name(f"{latents.stem}-{width}x{height}{own_seed}{part}"), codec)
    check_target(target, codec, width, height)
    make_plan(request)  # usage errors first
    session = pipeline.Session(request.preset, model_path)
    plan = pipeline.plan_from_proxy(latents, request, session)
    if span and span[1] > plan.frames:
        raise UsageError(f"--frames {frames} ends after the video's {plan.frames} frames; end it there")
    if _show_plan(plan, console, dry_run):
        return
    plan.check_resources(target.parent)
    # a region is redone in the run of its video, whose seed is the proxy's unless --run-dir names another
    run_seed = known["seed"] if plan.is_region else request.seed
    source = pipeline.describe(latents)["key"]
    folder = run_dir or target.parent / "runs" / f"{slug(latents.stem)}-{width}x{height}-{source}-{run_seed}"
    _check_writable(target)
    with lock(run_directory(folder.parent, folder.name)):
        _keep_foreign(target, pipeline.result_key(session, plan, latents, folder))
        result = pipeline.refine(session, plan, latents, folder, console)
        pipeline.decode(session, result, target, codec, console)
    console.emit({"video": str(target), "latents": str(result), "status": "ok"}, str(target))


@app.command()
def decode(
    latents: Annotated[Path, typer.Argument(help="Saved latents: detail.safetensors, or a proxy to look at.")],
    output: Output = None,
    codec: CodecName = "h264",
    preset: SavedPreset = None,
    model_path: ModelPath = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Saved latents to a video again, say with another codec; no sampling."""
    from . import pipeline
    from .video import check_target

    known = pipeline.describe(latents)
    target = _with_suffix(output or latents.with_suffix(""), codec)
    check_target(target, codec, int(known["width"]), int(known["height"]))
    _keep_foreign(target, known["key"])
    session = pipeline.Session(preset or known["preset"], model_path)
    console = _console(as_json)
    pipeline.decode(session, latents, target, codec, console)
    console.emit({"video": str(target), "status": "ok"}, str(target))


@app.command()
def plan(
    res: Res = "960x540",
    seconds: Seconds = "4",
    fps: Fps = None,
    steps: Steps = None,
    guidance_scale: Guidance = None,
    preset: PresetName = "tiny",
    chunk: Chunk = None,
    codec: CodecName = "h264",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """What a render would take: tokens, windows, FLOPs, memory, disk and time. Nothing is loaded."""
    request = _request(res, seconds, fps, 0, steps, guidance_scale, None, preset, None, chunk, codec)
    from .plan import make_plan

    resolved = make_plan(request)
    console = _console(as_json)
    if as_json:
        console.emit({**resolved.to_json(), "rows": resolved.rows()}, "")
    else:
        _show_plan(resolved, console, True)


@app.command()
def presets(as_json: Json = False, debug: Debug = False) -> None:
    """The presets that come with the tool."""
    from .presets import load_preset, preset_names

    console = _console(as_json)
    for name in preset_names():
        preset = load_preset(name)
        console.emit({"name": name, "description": preset.description}, f"{name}\t{preset.description}")


@app.command()
def info(
    file: Annotated[Path, typer.Argument(help="A video, a latents file or a run directory.")],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """What a file was made from."""
    from .info import describe, lines

    facts = describe(file)
    _console(as_json).emit(facts, "\n".join(lines(facts)))


@app.command()
def doctor(as_json: Json = False, debug: Debug = False) -> None:
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
    debug: Debug = False,
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
    except AtlasError as error:
        _fail(str(error), error.exit_code, debug)
    except (KeyboardInterrupt, typer.Abort):
        _fail(
            "interrupted: run the same command again to go on from the last finished step", ExitCode.INTERRUPTED, debug
        )
    except MemoryError:
        _fail("memory ran out: choose a smaller --res, fewer --seconds or a smaller --chunk", ExitCode.RESOURCE, debug)
    except Exception as error:
        # typer brings its own Click, whose usage errors are only known by what they carry
        usage = getattr(error, "exit_code", None) == 2 and hasattr(error, "format_message")
        if usage:
            _fail(f"{error.format_message()} (see atlasvid --help)", ExitCode.USAGE, debug)  # type: ignore[attr-defined]
        _fail(f"{type(error).__name__}: {error} (--debug shows where)", ExitCode.RENDER, debug)


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
    seconds: str,
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
    length = parse_seconds(seconds)
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


def _with_suffix(output: Path, codec: str) -> Path:
    """The absolute output path; the codec's usual suffix where the name has none. Raises UsageError."""
    from .video import suffix_for

    usual = suffix_for(codec)
    return (output if output.suffix else output.with_name(output.name + usual)).absolute()


def _keep_foreign(target: Path, key: str) -> None:
    """Refuses to overwrite a file that was not made from the latents with this key."""
    from .video import probe

    try:
        same = not target.exists() or probe(target)["metadata"].get("key") == key
    except AtlasError:
        same = False
    if not same:
        raise UsageError(f"{target} exists and was made from something else; choose another --output")


def _items(
    prompt: str | None, prompt_file: str | None, shard: str | None, negative: str | None, seed: int
) -> list[Item]:
    if (prompt is None) == (prompt_file is None):
        raise UsageError('give either a prompt, as in atlasvid render "a red ball moving right", or --prompt-file')
    if prompt_file is None:
        return [single(prompt or "", negative, seed)]
    return select(read_prompts(prompt_file, negative, seed), parse_shard(shard) if shard else None)


Maker = Callable[["Session", "Plan", Item, str, Path, Path, "Console"], dict[str, Any]]


def _batch(
    items: list[Item],
    request: "Request",
    output: Path | None,
    run_dir: Path | None,
    console: "Console",
    many: bool,
    dry_run: bool,
    make: Maker,
    suffix: str,
) -> None:
    """One or many items through one session: failures are reported and passed over, finished ones skipped."""
    from .plan import make_plan
    from .video import check_target, suffix_for

    resolved = make_plan(request)
    if _show_plan(resolved, console, dry_run):
        return
    is_video = suffix == ".mp4"
    suffix = suffix_for(request.codec) if is_video else suffix
    base = (output or Path()).absolute()
    folder = base if many else base.parent if output else base
    resolved.check_resources(folder)
    from .pipeline import Session
    from .store import artefact_hash, lock, run_directory

    session = Session(request.preset, request.model_path)
    failed = 0
    for item in items:
        plan = make_plan(dataclasses.replace(request, seed=item.seed))
        negative = item.negative_prompt if item.negative_prompt is not None else session.preset.negative_prompt
        name = item.output or (f"{item.id}{suffix}" if many else f"{slug(item.prompt)}-{item.seed}{suffix}")
        target = base if output and not many else folder / name
        target = target if target.suffix else target.with_name(target.name + suffix)
        key = artefact_hash({**plan.key(), "prompt": item.prompt, "negative": negative, "size": plan.summary["size"]})
        run = run_dir or target.parent / "runs" / f"{slug(target.stem)}-{key}"
        event = {"id": item.id, "prompt": item.prompt, "seed": item.seed}
        try:
            if is_video:
                check_target(target, request.codec, request.width, request.height)
            _check_writable(target)
            with lock(run_directory(run.parent, run.name)):
                event |= {"status": "ok", **make(session, plan, item, negative, run, target, console)}
        except Exception as error:  # whatever one item does, the others get their turn
            if not many:
                raise
            failed += 1
            error_text = str(error) if isinstance(error, AtlasError) else f"{type(error).__name__}: {error}"
            event |= {"status": "failed", "video": None, "error": error_text}
            console.error(f"{item.id}: {error_text}")
            if not console.json_lines:
                continue
        console.emit(event, str(event.get("video") or event.get("proxy")))
    if failed:
        raise _Failed(f"{failed} of {len(items)} prompts failed; the same command tries them again")


class _Failed(AtlasError):
    """Some items of a batch failed; each has been reported."""


def _render_one(
    session: "Session", plan: "Plan", item: Item, negative: str, run: Path, target: Path, console: "Console"
) -> dict[str, Any]:
    from . import pipeline

    if (finished := pipeline.finished_video(session, plan, item.prompt, negative, run, target)) is not None:
        return finished
    proxy = pipeline.make_proxy(session, plan, item.prompt, negative, run, console)
    _keep_foreign(target, pipeline.result_key(session, plan, proxy, run))
    return pipeline.render(session, plan, item.prompt, negative, run, target, console)


def _proxy_one(
    session: "Session", plan: "Plan", item: Item, negative: str, run: Path, target: Path, console: "Console"
) -> dict[str, Any]:
    from . import pipeline

    made = pipeline.make_proxy(session, plan, item.prompt, negative, run, console)
    if not target.exists():
        pipeline.publish(made, target)
    elif pipeline.describe(target) != pipeline.describe(made):
        raise UsageError(f"{target} exists and was made from something else; choose another --output")
    return {"proxy": str(target), "run_dir": str(run)}


def _check_writable(target: Path) -> None:
    """An output that cannot be written is said before hours of work."""
    from .errors import ResourceError

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        probe = target.parent / f".{target.name}.probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ResourceError(f"{target.parent} cannot be written ({error.strerror}); choose another --output") from None


def _show_plan(plan: "Plan", console: "Console", only: bool) -> bool:
    """With `only` (--dry-run) prints the plan as a table and returns True."""
    if not only:
        return False
    rows = plan.rows()
    total = sum(r["seconds"] for r in rows)
    shown = [
        {
            "stage": r["stage"],
            "grid": r["grid"],
            "tokens": f"{r['tokens']:,}",
            "windows": f"{r['windows']:,}",
            "steps": r["steps"],
            "TFLOP": f"{r['flops'] / 1e12:.2f}",
            "RAM GiB": f"{r['ram_bytes'] / 2**30:.2f}",
            "disk GiB": f"{r['disk_bytes'] / 2**30:.2f}",
            "seconds": f"{r['seconds']:.0f}",
        }
        for r in rows
    ]
    summary = plan.summary
    title = f"{summary['size']} x {summary['seconds']:g} s, {summary['frames']} frames, preset {summary['preset']}"
    console.table(f"{title}: about {total / 60:.1f} min", shown)
    console.emit({**plan.to_json(), "rows": rows}, re.sub(r"\s+", " ", title)) if console.json_lines else None
    return True


if __name__ == "__main__":
    main()
