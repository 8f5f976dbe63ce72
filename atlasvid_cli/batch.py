"""One or many items through one session, and the guards that keep what is already on disk."""

import dataclasses
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .errors import AtlasError, UsageError, explain, stop_signals, traced
from .prompts import Item, slug
from .show import show_plan
from .targets import check_writable, is_folder, is_made, target_of, usable

if TYPE_CHECKING:
    from .console import Console
    from .plan import Plan, Request
    from .session import Session


def run_batch(
    items: list[Item],
    request: "Request",
    output: str | None,
    run_dir: Path | None,
    console: "Console",
    many: bool,
    dry_run: bool,
    kind: Literal["video", "proxy"],
) -> None:
    """One or many items through one session: failures are reported and passed over, finished ones skipped."""
    from .cost import check_resources
    from .plan import make_plan
    from .session import Session, session_of
    from .video import warn_of_player

    resolved = make_plan(request)
    if not items:
        return console.note("no prompt falls to this shard: there are fewer than shards")
    folder, targets = _targets(items, request, output, many, kind)
    if kind == "video":
        warn_of_player(console, request.codec, request.width, request.height)
    missing = sum(not is_made(target) for target in targets)
    if dry_run:
        session_of(request)
        return show_plan(resolved, console, folder, run_dir, max(1, missing))
    if missing:  # what is finished needs no room
        check_resources(resolved, folder, run_dir, missing)
    if len({target.parent for target in targets}) == 1:  # else each item finds out for itself
        check_writable(targets[0])
    from .artefacts import run_hash

    make = render_one if kind == "video" else proxy_one
    session = Session.of(request)
    session.check_adapters()
    asked = [item.prompt for item in items]
    if session.preset.extend_prompts and not request.clip:
        items = [_extended(item, console) for item in items]
    standard = session.preset.negative_prompt
    negatives = [standard if item.negative_prompt is None else item.negative_prompt for item in items]
    guided = any(stage.passes > 1 for _, stage in resolved.own_stages())
    session.expect([*(item.prompt for item in items), *(negatives if guided else ())])
    to_change: list[bool] = []  # of each failure, whether it asks for other options: an error would keep its models
    for number, (item, prompt, negative, target) in enumerate(
        zip(items, asked, negatives, targets, strict=True), start=1
    ):
        if many:
            console.note(f"{number} of {len(items)}: {item.prompt or item.id}")
        own = dataclasses.replace(request, prompt=item.prompt, negative_prompt=negative, seed=item.seed)
        plan = make_plan(own)
        own_run = f"{slug(target.stem)}-{run_hash(session, plan)}"
        run = run_dir or target.parent / "runs" / own_run
        event = {"id": item.id, "prompt": prompt, "seed": item.seed}
        event |= {"taken_as": item.prompt} if item.prompt != prompt else {}
        try:
            check_writable(target)
            event |= {"status": "ok", **make(session, plan, run, target, console)}
        except Exception as error:  # whatever one item does, the others get their turn
            if not many or stop_signals:
                raise
            to_change.append(isinstance(error, UsageError))
            error_text, _ = explain(error)
            if traced:
                traceback.print_exc()
            event |= {"status": "failed", kind: None, "error": error_text}
            console.error(f"{item.id}: {error_text}")
            if not console.json_lines:
                continue
        made = str(event[kind])
        if event.get("skipped"):
            console.note(f"{made} was finished before")
        console.emit(event, made)
    if to_change:
        remedy = "each says above what to change" if all(to_change) else "the same command tries them again"
        raise BatchFailed(f"{len(to_change)} of {len(items)} prompts failed; {remedy}")


def _targets(
    items: list[Item], request: "Request", output: str | None, many: bool, kind: Literal["video", "proxy"]
) -> tuple[Path, list[Path]]:
    """The folder that results go to, and the file of each; UsageError where one cannot be, or two would be one."""
    from .video import CODECS, check_target, suffix_for

    suffix = suffix_for(request.codec) if kind == "video" else ".safetensors"
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
        if kind == "video":
            check_target(target, request.codec, request.width, request.height)
        elif target.suffix != suffix:
            raise UsageError(f"{target} would hold latents; let --output end in {suffix}")
    return (folder if many or into else targets[0].parent), targets  # a link leads elsewhere


def _extended(item: Item, console: "Console") -> Item:
    """An item whose prompt says all parts of a scene, with a word where it did not."""
    from .extend import extended

    prompt = extended(item.prompt, item.seed)
    if prompt != item.prompt:
        console.note(f"{item.prompt!r} leaves parts of the scene out and is taken as {prompt!r}")
    return dataclasses.replace(item, prompt=prompt)


def _target(item: Item, folder: Path, output: str | None, many: bool, suffix: str) -> Path:
    """Where an item's result goes."""
    own = folder / item.output if item.output else None
    default = folder / (f"{item.id}-{item.seed}" if many else item.output or f"{slug(item.prompt)}-{item.seed}")
    return target_of(own if many or output is None else output, default, suffix)


class BatchFailed(AtlasError):
    """Some items of a batch failed; each has been reported."""


def render_one(session: "Session", plan: "Plan", run: Path, target: Path, console: "Console") -> dict[str, Any]:
    from . import artefacts, pipeline, store
    from .cost import check_resources

    if (finished := pipeline.finished_video(session, plan, run, target)) is not None:
        return finished
    if target.exists():  # but its run is gone, and all is made again
        check_resources(plan, target.parent, run)
    proxy = artefacts.proxy_metadata(session, plan)
    artefacts.keep_foreign(target, artefacts.result_metadata(session, plan, proxy))
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
    return event | ({"status": "skipped", "skipped": True} if skipped else {})
