"""One or many items through one session, and the guards that keep what is already on disk."""

import dataclasses
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import AtlasError, UsageError, explain, stop_signals, traced
from .prompts import Item, select, slug
from .show import show_plan
from .targets import check_apart, check_writable, is_folder, is_made, target_of, usable

if TYPE_CHECKING:
    from .console import Console
    from .plan import Plan, Request
    from .presets import Preset
    from .session import Session


@dataclass(frozen=True)
class _Job:
    """An item, the request that the preset takes it for, and where its result goes."""

    item: Item
    request: "Request"
    target: Path


def run_batch(
    items: list[Item],
    shard: tuple[int, int] | None,
    request: "Request",
    output: str | None,
    run_dir: Path | None,
    console: "Console",
    many: bool,
    dry_run: bool,
) -> None:
    """One or many items, or a shard of them, through one session: failures are reported and passed over, finished ones
    skipped."""
    from .cost import check_resources
    from .plan import make_plan
    from .session import Session, check_session
    from .video import warn_of_player

    plan = make_plan(request)
    folder, targets = _targets(items, request, output, many)
    check_apart(targets[0], run_dir)
    if not (mine := select(list(zip(items, targets, strict=True)), shard)):
        return console.note("no prompt falls to this shard: there are fewer than shards")
    if not request.proxy_only:
        warn_of_player(console, request.codec, request.width, request.height)
    missing = {target for _, target in mine if not is_made(target)}
    if dry_run:
        check_session(request, console)
        shown = plan if many else make_plan(_job(*mine[0], plan.preset, request, console).request)
        return show_plan(shown, console, folder, run_dir, max(1, len(missing)))
    if missing:  # what is finished needs no room
        check_resources(plan, folder, run_dir, len(missing))
    if len({target.parent for _, target in mine}) == 1:  # else each item finds out for itself
        check_writable(mine[0][1])
    if run_dir:
        check_writable(run_dir / "run.json", "--run-dir")
    session = Session.of(request, console)
    jobs = [_job(item, target, session.preset, request, console) for item, target in mine]
    wanted = [job.request for job in jobs if job.target in missing]
    guided = any(stage.passes > 1 for _, stage in plan.own_stages())
    session.expect([*(own.prompt for own in wanted), *(own.negative_prompt for own in wanted if guided)])
    failures: list[type[Exception]] = []
    for number, job in enumerate(jobs, start=1):
        if many:
            console.note(f"{number} of {len(jobs)}: {job.request.prompt or job.item.id}")
        event, failure = _attempt(job, session, run_dir, console, many)
        if failure:
            failures.append(failure)
            console.error(f"{job.item.id}: {event['error']}")
            if not console.json_lines:
                continue
        if event["status"] == "skipped":
            console.note(f"{job.target} was finished before")
        console.emit(event, str(job.target))
    if failures:
        to_change = all(issubclass(failure, UsageError) for failure in failures)
        remedy = "each says above what to change" if to_change else "the same command tries them again"
        raise BatchFailed(f"{len(failures)} of {len(jobs)} prompts failed; {remedy}")


def _job(item: Item, target: Path, preset: "Preset", request: "Request", console: "Console") -> _Job:
    """An item with the preset's negative prompt where it has none, and a prompt that says all parts of a scene where
    the preset needs one, with a word where the item's did not."""
    from .extend import extended

    prompt = extended(item.prompt, item.seed) if preset.extend_prompts and not request.clip else item.prompt
    if prompt != item.prompt:
        console.note(f"{item.prompt!r} leaves parts of the scene out and is taken as {prompt!r}")
    negative = preset.negative_prompt if item.negative_prompt is None else item.negative_prompt
    own = dataclasses.replace(request, prompt=prompt, negative_prompt=negative, seed=item.seed)
    return _Job(item, own, target)


def _attempt(
    job: _Job, session: "Session", run_dir: Path | None, console: "Console", many: bool
) -> tuple[dict[str, Any], type[Exception] | None]:
    """The event of a job, and of its failure the class: the exception's traceback would keep its models in memory."""
    from .artefacts import run_hash
    from .plan import make_plan

    item, request, target = job.item, job.request, job.target
    plan = make_plan(request)
    run = run_dir or target.parent / "runs" / f"{slug(target.stem)}-{run_hash(session, plan)}"
    event = {"id": item.id, "prompt": item.prompt, "seed": item.seed}
    event |= {"taken_as": request.prompt} if request.prompt != item.prompt else {}
    kind, make = ("proxy", proxy_one) if request.proxy_only else ("video", render_one)
    try:
        check_writable(target)
        return event | {"status": "ok", **make(session, plan, run, target, console)}, None
    except Exception as error:  # whatever one item does, the others get their turn
        if not many or stop_signals:
            raise
        if traced:
            with suppress(OSError):  # stderr may be a log on a full disk
                traceback.print_exc()
        error_text, _ = explain(error)
        return event | {"status": "failed", kind: None, "error": error_text}, type(error)


def _targets(items: list[Item], request: "Request", output: str | None, many: bool) -> tuple[Path, list[Path]]:
    """The folder that results go to, and the file of each; UsageError where one cannot be, or two would be one."""
    from .video import CODECS, check_target, suffix_for

    suffix = ".safetensors" if request.proxy_only else suffix_for(request.codec)
    base, into = Path(output or "").absolute(), is_folder(output or "")
    with usable(base):
        is_there = base.exists()
    if many and is_there and not into:
        raise UsageError(f"--output {output} is a file, and many results need a folder; name one")
    if many and not into and base.suffix in (suffix, *CODECS[request.codec].suffixes):
        raise UsageError(f"--output {output} is named like a file, and many results need a folder; name one")
    folder = base if many or into else base.parent
    targets = [_target(item, folder, output, many, suffix) for item in items]
    taken: dict[Path, Item] = {}
    for item, target in zip(items, targets, strict=True):
        if (first := taken.setdefault(target, item)) is not item:
            raise UsageError(f"{first.id} and {item.id} would both be {target}; give them other outputs")
        if not request.proxy_only:
            check_target(target, request.codec, request.width, request.height)
        elif target.suffix != suffix:
            raise UsageError(f"{target} would hold latents; let --output end in {suffix}")
    return (folder if many or into else targets[0].parent), targets  # a link leads elsewhere


def _target(item: Item, folder: Path, output: str | None, many: bool, suffix: str) -> Path:
    """Where an item's result goes."""
    own = folder / item.output if item.output else None
    default = folder / (f"{item.id}-{item.seed}" if many else item.output or f"{slug(item.prompt)}-{item.seed}")
    return target_of(own if many or output is None else output, default, suffix)


class BatchFailed(AtlasError):
    """Some items of a batch failed; each has been reported."""


def render_one(session: "Session", plan: "Plan", run: Path, target: Path, console: "Console") -> dict[str, Any]:
    from . import artefacts, outputs, pipeline, store
    from .cost import check_resources

    if (finished := pipeline.finished_video(session, plan, run, target)) is not None:
        return finished
    if target.exists():  # but its run is gone, and all is made again
        check_resources(plan, target.parent, run)
    proxy = artefacts.proxy_metadata(session, plan)
    outputs.check_replaceable(target, artefacts.result_metadata(session, plan, proxy), plan.request.codec)
    with store.lock(store.run_directory(run.parent, run.name)):
        return pipeline.render(session, plan, run, target, console)


def proxy_one(session: "Session", plan: "Plan", run: Path, target: Path, console: "Console") -> dict[str, Any]:
    from . import artefacts, pipeline, store

    wanted = artefacts.proxy_metadata(session, plan)
    skipped = target.exists()
    if skipped and not artefacts.is_current(target, wanted):
        raise UsageError(f"{target} exists and was made from something else; choose another --output")
    kept = run / "proxy.safetensors"
    with store.lock(store.run_directory(run.parent, run.name)):
        if target.exists() and not kept.exists() and artefacts.describe(target)["vae"] == session.vae_hash:
            store.publish(target, kept)  # its run was deleted
        made = pipeline.make_proxy(session, plan, run, console)
        if not target.exists():
            store.publish(made, target)
        elif not artefacts.is_current(target, wanted):  # another process was quicker
            raise UsageError(f"{target} was made meanwhile from something else; choose another --output")
    event = {"proxy": str(target), "preview": str(run / "proxy.mp4"), "run_dir": str(run)}
    return event | ({"status": "skipped"} if skipped else {})
