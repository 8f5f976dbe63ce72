"""From flags to one or many items through one session, and the guards that keep what is already on disk."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import AtlasError, InputError, UsageError, explain, stop_signals
from .parse import MAX_SECONDS, check_finite, parse_lora, parse_offload, parse_resolution, parse_seconds
from .prompts import Item, slug

if TYPE_CHECKING:
    from .console import Console
    from .plan import Plan, Request
    from .session import Session


def target_of(output: Path | None, default: Path, suffix: str) -> Path:
    """The absolute path to write: `output`, with `suffix` where its name has none, or `default`, which needs it.

    In an `output` that is a folder the file has its default name.
    """
    named = default.with_name(default.name + suffix)
    if output is None:
        return named.absolute()
    if output.is_dir():
        return (output / named.name).absolute()
    return (output if output.suffix else output.with_name(output.name + suffix)).absolute()


def make_request(
    res: str, seconds: str | None, preset: str, loras: list[str] | None = None, offload: str = "auto", **fields: Any
) -> "Request":
    """The request that flags make; `fields` are those of its fields that need no parsing. Raises UsageError."""
    width, height = parse_resolution(res)
    length = parse_seconds(seconds or "4")
    check_finite("--guidance-scale", fields.get("guidance_scale"), 1)
    check_finite("--flow-shift", fields.get("flow_shift"), zero=False)
    from .plan import Request
    from .video import suffix_for

    suffix_for(fields.get("codec", "h264"))  # an unknown codec is said before anything else
    given = {"loras": tuple(map(parse_lora, loras or ())), "offload": parse_offload(offload)}
    return Request(preset, width, height, length, **given, **fields)


Maker = Callable[["Session", "Plan", Item, str, Path, Path, "Console"], dict[str, Any]]


def run_batch(
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
    from .cost import check_resources
    from .plan import make_plan
    from .video import CODECS, check_target, suffix_for

    resolved = make_plan(request)
    is_video = suffix == ".mp4"
    suffix = suffix_for(request.codec) if is_video else suffix
    base = (output or Path()).absolute()
    if many and base.exists() and not base.is_dir():
        raise UsageError(f"--output {output} is a file, and many results need a folder; name one")
    if many and not base.exists() and base.suffix in (suffix, *CODECS[request.codec].suffixes):
        raise UsageError(f"--output {output} is named like a file, and many results need a folder; name one")
    folder = base if many or base.is_dir() else base.parent
    targets = [_target(item, folder, output, many, suffix) for item in items]
    taken: dict[Path, Item] = {}
    for item, target in zip(items, targets, strict=True):
        if (first := taken.setdefault(target, item)) is not item:
            raise UsageError(f"{first.id} and {item.id} would both be {target}; give them other outputs")
        if is_video:
            check_target(target, request.codec, request.width, request.height)
        elif target.suffix != suffix:
            raise UsageError(f"{target} would hold latents; let --output end in {suffix}")
    missing = max(1, sum(not target.exists() for target in targets))
    if dry_run:
        return show_plan(resolved, console, folder, run_dir, missing)
    check_resources(resolved, folder, run_dir, missing)
    from .artefacts import run_hash
    from .block import Kernels
    from .session import Session
    from .store import lock, run_directory

    session = Session(
        request.preset,
        request.model_path,
        Kernels(request.attention_backend, request.compiled),
        request.loras,
        request.strict,
        request.weight_dtype,
    )
    session.check_adapters()
    if session.preset.extend_prompts and not request.clip:
        items = [_extended(item, console) for item in items]
    standard = session.preset.negative_prompt
    negatives = [standard if item.negative_prompt is None else item.negative_prompt for item in items]
    session.expect([*(item.prompt for item in items), *negatives])
    failed = 0
    for number, (item, negative, target) in enumerate(zip(items, negatives, targets, strict=True), start=1):
        if many:
            console.note(f"{number} of {len(items)}: {item.prompt or item.id}")
        plan = make_plan(dataclasses.replace(request, seed=item.seed))
        own_run = f"{slug(target.stem)}-{run_hash(session, plan, item.prompt, negative)}"
        run = run_dir or target.parent / "runs" / own_run
        event = {"id": item.id, "prompt": item.prompt, "seed": item.seed}
        try:
            check_writable(target)
            with lock(run_directory(run.parent, run.name)):
                event |= {"status": "ok", **make(session, plan, item, negative, run, target, console)}
        except Exception as error:  # whatever one item does, the others get their turn
            if not many or stop_signals:
                raise
            failed += 1
            error_text, _ = explain(error)
            event |= {"status": "failed", "video": None, "error": error_text}
            console.error(f"{item.id}: {error_text}")
            if not console.json_lines:
                continue
        made = str(event.get("video") or event.get("proxy"))
        if event.get("skipped"):
            console.note(f"{made} was finished before")
        console.emit(event, made)
    if failed:
        raise BatchFailed(f"{failed} of {len(items)} prompts failed; the same command tries them again")


def _extended(item: Item, console: "Console") -> Item:
    """An item whose prompt says all parts of a scene, with a word where it did not."""
    from .extend import extended

    prompt = extended(item.prompt, item.seed)
    if prompt != item.prompt:
        console.note(f"{item.prompt!r} leaves parts of the scene out and is taken as {prompt!r}")
    return dataclasses.replace(item, prompt=prompt)


def _target(item: Item, folder: Path, output: Path | None, many: bool, suffix: str) -> Path:
    """Where an item's result goes."""
    own = folder / item.output if item.output else None
    default = folder / (item.id if many else item.output or f"{slug(item.prompt)}-{item.seed}")
    return target_of(own if many or output is None else output, default, suffix)


class BatchFailed(AtlasError):
    """Some items of a batch failed; each has been reported."""


def render_one(
    session: "Session", plan: "Plan", item: Item, negative: str, run: Path, target: Path, console: "Console"
) -> dict[str, Any]:
    from . import artefacts, pipeline

    if (finished := pipeline.finished_video(session, plan, item.prompt, negative, run, target)) is not None:
        return finished
    proxy = artefacts.proxy_metadata(session, plan, item.prompt, negative)
    artefacts.keep_foreign(target, artefacts.result_key(session, plan, proxy))
    return pipeline.render(session, plan, item.prompt, negative, run, target, console)


def proxy_one(
    session: "Session", plan: "Plan", item: Item, negative: str, run: Path, target: Path, console: "Console"
) -> dict[str, Any]:
    from . import artefacts, pipeline

    wanted = artefacts.proxy_metadata(session, plan, item.prompt, negative)
    skipped = target.exists()
    if skipped and not artefacts.is_current(target, wanted):
        raise UsageError(f"{target} exists and was made from something else; choose another --output")
    kept = run / "proxy.safetensors"
    if target.exists() and not kept.exists() and artefacts.describe(target)["vae"] == session.vae_hash:
        pipeline.publish(target, kept)  # its run was deleted
    made = pipeline.make_proxy(session, plan, item.prompt, negative, run, console)
    if not target.exists():
        pipeline.publish(made, target)
    event = {"proxy": str(target), "preview": str(run / "proxy.mp4"), "run_dir": str(run)}
    return event | ({"status": "skipped", "skipped": True} if skipped else {})


def with_clip(
    request: "Request", path: Path | None, seconds: str | None, prompt_file: str | None, console: "Console"
) -> "Request":
    """The request with the clip of --from-video, which decides the length where `seconds` was not given."""
    if path is None:
        return request
    sampling = {"steps": request.steps, "guidance-scale": request.guidance_scale, "flow-shift": request.flow_shift}
    for option, value in {"prompt-file": prompt_file, **sampling}.items():
        if value is not None:
            raise UsageError(f"--{option} cannot be used with --from-video; leave one of the two out")
    from .footage import open_clip

    clip = open_clip(path)
    length = request.seconds if seconds else clip.seconds
    if length > MAX_SECONDS:
        raise UsageError(f"{path} lasts {float(length):.0f} s; give --seconds, at most {MAX_SECONDS}")
    if length > clip.seconds:
        lasts = f"{path} lasts {float(clip.seconds):g} s and not {float(length):g} s"
        raise InputError(f"{lasts}; give fewer --seconds, or leave it out to take the whole clip")
    if clip.is_hdr:
        console.warn(f"{path} is HDR and is taken as it is, so its colours come out pale; convert it to SDR first")
    return dataclasses.replace(request, clip=clip, seconds=length)


def check_writable(target: Path, option: str = "--output") -> None:
    """Raises ResourceError for a file that cannot be written, before hours of work; `option` says where it goes."""
    from .errors import ResourceError
    from .store import temporary

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        probe = temporary(target, ".probe")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ResourceError(f"{target.parent} cannot be written ({error.strerror}); choose another {option}") from None


def short(flops: float) -> str:
    """FLOPs with a metric prefix, in three digits: 15.2 T."""
    for prefix in ("G", "T", "P"):
        flops, unit = flops / (1e9 if prefix == "G" else 1e3), prefix
        if flops < 1000:
            break
    return f"{flops:.3g} {unit}" if flops < 1000 else f"{flops:,.0f} {unit}"


def show_plan(plan: "Plan", console: "Console", folder: Path, run_dir: Path | None = None, videos: int = 1) -> None:
    """Prints the plan of so many `videos` in `folder`, a table or with --json an object, and warns where they do not
    fit here."""
    from .console import duration
    from .cost import check_resources
    from .cost import rows as costs_of
    from .errors import ResourceError

    rows, misfit = costs_of(plan), None
    try:
        check_resources(plan, folder, run_dir, videos)
    except ResourceError as error:
        misfit = str(error)
        console.warn(misfit)
    total = sum(r["seconds"] for r in rows)
    on_gpu = any(r["vram_bytes"] for r in rows)
    shown = [
        {
            "stage": r["stage"],
            "grid": r["grid"],
            "tokens": f"{r['tokens']:,}",
            "windows": f"{r['windows']:,}" if r["windows"] else "",
            "steps": r["steps"],
            "FLOP": short(r["flops"]),
            **({"VRAM\nGiB": f"{r['vram_bytes'] / 2**30:.2f}"} if on_gpu else {}),
            "RAM\nGiB": f"{r['ram_bytes'] / 2**30:.2f}",
            "disk\nGiB": f"{r['disk_bytes'] / 2**30:.2f}",
            "time": duration(r["seconds"]),
        }
        for r in rows
    ]
    summary = plan.summary
    frames = f"{summary['frames']} frame{'s' * (summary['frames'] != 1)}"
    title = f"{summary['size']} x {summary['seconds']:g} s, {frames}, preset {summary['preset']}"
    title += f": about {duration(total)}"
    title += f" each, {duration(total * videos)} for {videos} videos" if videos > 1 else ""
    if console.json_lines:
        console.emit({**plan.to_json(), "rows": rows, "videos": videos, "fits": misfit is None}, title)
    else:
        console.table(title, shown, asked_for=True)
