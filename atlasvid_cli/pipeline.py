"""From a prompt to a video file: text -> proxy -> detail levels -> decode, each stage leaving its result on disk.

Stages are separated by files in the run directory, so resuming, rerunning a stage and bounding memory are one thing.
"""

import shlex
import time
from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from . import store
from .artefacts import (
    check_levels_ours,
    check_ours,
    describe,
    is_current,
    level_metadata,
    level_path,
    proxy_metadata,
    read_latents,
    region_of,
    result_metadata,
    result_path,
    weights_of,
)
from .console import Console
from .cost import placement_of
from .decode import decode_stream, tile_steps
from .decode_cost import start_tile, vae_tile
from .encode import encode_stream
from .enlarge import enlarge
from .errors import ResourceError
from .experts import experts_of
from .footage import Clip, read_clip
from .machine import versions
from .model import text_contexts
from .outputs import check_preview_ours, check_replaceable, is_finished, record_of, video_tags
from .plan import Plan, Request
from .presets import preset_names
from .proxy import sample_proxy
from .refine import Region, Stream, crop_to_stage, sample_detail
from .results import resume_from, save_latents, save_state, state_of
from .session import Session
from .stages import Stage
from .targets import sheet_of
from .video import contact_sheet, write_png, write_video
from .weights import load_scheduler

SHEET_FRAMES = 12


def render(session: Session, plan: Plan, run_dir: Path, output: Path, console: Console) -> dict[str, Any]:
    """The whole path. Returns what a batch event reports."""
    marks = [time.monotonic()]
    proxy = make_proxy(session, plan, run_dir, console)
    marks.append(time.monotonic())
    latents = refine(session, plan, proxy, run_dir, console)
    marks.append(time.monotonic())
    video = finish(session, latents, output, plan.request, console, run_dir)
    marks.append(time.monotonic())
    spent = {name: b - a for name, (a, b) in zip(("proxy", "detail", "decode"), pairwise(marks), strict=True)}
    return keep_record(session, plan, run_dir, latents, video, spent)


def keep_record(
    session: Session, plan: Plan, run_dir: Path, latents: Path, video: Path, spent: dict[str, float]
) -> dict[str, Any]:
    """Writes run.json: how `latents` and `video` were made, in so many seconds a stage. Returns the event that it
    holds."""
    seconds = round(sum(spent.values()), 2)
    event = {
        "video": str(video),
        "preview": str(sheet_of(video)),
        "run_dir": str(run_dir),
        "seconds": seconds,
    }
    weights = weights_of(session, plan)
    if plan.given_proxy:  # which other weights may have made
        del weights["proxy"]
    record = {
        **plan.to_json(),
        **describe(latents),
        "event": event,
        "weights": weights,
        "versions": versions(),
        "stage_seconds": {name: round(each, 2) for name, each in spent.items()},
        "render_seconds": seconds,
    }
    store.write_json(run_dir / "run.json", record)
    return event


def finished_video(session: Session, plan: Plan, run_dir: Path, output: Path) -> dict[str, Any] | None:
    """The event of an identical job of this run whose video is there, one of several perhaps; None otherwise."""
    record, wanted = record_of(run_dir), result_metadata(session, plan, proxy_metadata(session, plan))
    tagged = video_tags(session, wanted, plan.target_latents, plan.request.codec)
    if record.get("key") != wanted["key"] or not is_finished(output, tagged, plan.frames):
        return None
    return {**record["event"], "video": str(output), "preview": str(sheet_of(output)), "status": "skipped"}


def make_proxy(session: Session, plan: Plan, run_dir: Path, console: Console) -> Path:
    """Stage 1 -> run_dir/proxy.safetensors, sampled, or encoded from the request's clip; kept as it is where the same
    plan, prompt, weights and clip made it.

    proxy.mp4 and its contact sheet show what will happen before the detail is paid for.
    """
    path, preview = run_dir / "proxy.safetensors", run_dir / "proxy.mp4"
    metadata = proxy_metadata(session, plan)
    if is_current(path, metadata):
        if not (preview.exists() and sheet_of(preview).exists()):
            decode(session, path, preview, "h264", console, "preview")
        return path
    check_ours(path, metadata)
    check_preview_ours(preview)
    store.run_directory(run_dir.parent, run_dir.name)
    state = state_of(path)
    if clip := plan.request.clip:
        latents = encode_proxy(session, plan, clip, console)
    else:
        latents = _sample_proxy(session, plan, state, metadata["key"], console)
    for shown in (preview, sheet_of(preview)):
        shown.unlink(missing_ok=True)  # a damaged proxy's
    save_latents(path, latents, metadata)
    state.unlink(missing_ok=True)
    decode(session, path, preview, "h264", console, "preview")
    return path


def encode_proxy(session: Session, plan: Plan, clip: Clip, console: Console) -> torch.Tensor:
    """Latents (C, T, H, W) fp32 of `clip` as the proxy of a plan: cropped and scaled to the part that the video shows,
    at the proxy's frame rate."""
    geometry, grid = session.preset.geometry, plan.proxy.grid
    size = grid.w * geometry.token_pixels, grid.h * geometry.token_pixels
    count = (grid.t - 1) * geometry.temporal + 1
    with console.stage("encode", count) as advance:

        def read() -> Iterator[torch.Tensor]:
            for frame in read_clip(clip, plan.proxy_fps, count, plan.proxy_size, size):
                yield frame
                advance()

        return encode_stream(session.vae(), read())


def _sample_proxy(session: Session, plan: Plan, state: Path, key: str, console: Console) -> torch.Tensor:
    stage, prompts = plan.proxy, (plan.request.prompt, plan.request.negative_prompt)
    # before a model is loaded: the two need not fit together
    embeddings = session.embeddings(prompts[: stage.passes], console)
    resume = resume_from(state, key, console)
    with console.stage("proxy", stage.steps) as advance:
        advance(resume[0] if resume else 0, before=True)
        return sample_proxy(
            experts_of(session, plan, embeddings, console),
            load_scheduler(session.folder, stage.flow_shift, stage.sampler),
            stage,
            session.preset.transformer.channels,
            session.preset.geometry.patch,
            plan.request.seed,
            resume,
            lambda step, tensors: save_state(state, step, tensors, key, "proxy"),
            advance,
            kernels=session.kernels,
        )


def refine(session: Session, plan: Plan, proxy_path: Path, run_dir: Path, console: Console) -> Path:
    """Stage 2 -> run_dir/detail.safetensors, through every level of the plan; finished levels are kept.

    A region samples only the last level again, above the levels that its video was made from.
    """
    path = proxy_path
    if not plan.is_region:
        check_levels_ours(session, plan, describe(proxy_path), run_dir)
    for number, stage in enumerate(plan.levels, start=1):
        below_path, last = path, number == len(plan.levels)
        path = level_path(plan, run_dir, number)
        if plan.is_region and not last:
            continue
        below, below_metadata = read_latents(below_path, session)
        metadata = level_metadata(session, plan, stage, below_metadata)
        redo = None
        if plan.is_region:
            redo, metadata = region_of(session, plan, stage, path, below_metadata["key"], metadata)
            path = result_path(plan, run_dir, metadata)
        if not is_current(path, metadata):
            latents = _refine_level(session, plan, number, below, metadata, redo, path, console)
            save_latents(path, latents, metadata)
            state_of(path).unlink(missing_ok=True)
    return path


def finish(session: Session, latents: Path, output: Path, request: Request, console: Console, run_dir: Path) -> Path:
    """`decode` of a run's last latents; where the disk is full, with a word about where they are kept."""
    try:
        return decode(session, latents, output, request.codec, console, spool=run_dir)
    except ResourceError as error:
        told = {"--model-path": request.model_path, "--codec": request.codec if request.codec != "h264" else None}
        told |= {"--preset": request.preset if request.preset not in preset_names() else None}
        options = "".join(f" {name} {shlex.quote(value)}" for name, value in told.items() if value)
        again = f"atlasvid decode {shlex.quote(str(latents))}{options} -o FILE"
        raise ResourceError(f"{str(error).rstrip('.')}; nothing is sampled again by {again}") from error


def decode(
    session: Session,
    latents_path: Path,
    output: Path,
    codec: str,
    console: Console,
    stage: str = "decode",
    spool: Path | None = None,
) -> Path:
    """Saved latents -> video file and a contact sheet beside it, streamed; no sampling.

    Decoded tiles wait in the folder `spool`, by default beside the video.
    """
    latents, metadata = read_latents(latents_path, session, "vae")
    vae, tile = session.vae(), vae_tile(session.preset, *latents.shape[2:])
    width, height, scale = int(metadata["width"]), int(metadata["height"]), int(metadata["scale"])
    frames = int(metadata["frames"])
    wanted = {round(i * (frames - 1) / (SHEET_FRAMES - 1)) for i in range(SHEET_FRAMES)}
    sheet: list[torch.Tensor] = []
    tiles = tile_steps(latents, tile)  # all of them are decoded before the first frame is there
    with console.stage(stage, tiles or frames) as advance:

        def finished() -> Iterator[torch.Tensor]:
            for index, frame in enumerate(decode_stream(vae, latents, tile, spool or output.parent, advance)):
                if scale > 1:
                    frame = F.avg_pool2d(frame[:, : height * scale, : width * scale], scale)
                if index in wanted:
                    small = frame[:, :height, :width]
                    sheet.append(F.interpolate(small[None], size=_thumbnail(width, height), mode="area")[0])
                if index == frames - 1:
                    check_replaceable(output, metadata, codec)  # another process may have been quicker
                yield frame

        write_video(
            output,
            finished(),
            width=width,
            height=height,
            fps=Fraction(metadata["fps"]),
            frame_count=frames,
            codec=codec,
            metadata=video_tags(session, metadata, (latents.shape[2], latents.shape[3]), codec),
            on_frame=lambda _: None if tiles else advance(),
        )
    write_png(sheet_of(output), contact_sheet(sheet, 4))
    return output


def _refine_level(
    session: Session,
    plan: Plan,
    number: int,
    below: torch.Tensor,
    metadata: dict[str, str],
    region: Region | None,
    path: Path,
    console: Console,
) -> torch.Tensor:
    """The latents that `path` in a run directory will hold; the state that an interruption leaves lies beside it."""
    (name, stage), run_dir, state = plan.named_stages()[number], path.parent, state_of(path)
    store.run_directory(run_dir.parent, run_dir.name)
    resume = resume_from(state, metadata["key"], console)
    enlarged = None
    if stage.in_pixels and (region or not resume):  # of a region what surrounds it starts so again
        enlarged = _enlarged(session, plan, stage, name, below, run_dir, console)
    used = (metadata["prompt"], metadata["negative_prompt"])[: stage.passes]
    embeddings = session.embeddings(used, console)
    placement, length = placement_of(plan), session.preset.transformer.text_length
    model, proxy_model = session.detail_models(placement.offload, console)
    groups = [embeddings[i : i + stage.together] for i in range(0, len(embeddings), stage.together)]
    stream = Stream(model, text_contexts(model, groups, length))
    proxy_stream = stream
    if proxy_model is not model:
        proxy_stream = Stream(proxy_model, text_contexts(proxy_model, groups, length))
    blocks = len(model.blocks)
    with console.stage(name, stage.forwards() * blocks) as advance:
        advance(stage.forwards(resume[0]) * blocks if resume else 0, before=True)
        return sample_detail(
            stream,
            proxy_stream,
            stage,
            plan.preset.detail,
            session.preset.geometry.patch,
            plan.request.seed,
            number,
            below,
            chunk=plan.chunk,
            region=region,
            resume=resume,
            save=lambda step, tensors: save_state(state, step, tensors, metadata["key"], "detail"),
            on_block=advance,
            kernels=session.kernels,
            states=torch.device("cpu") if placement.offload == "host" else None,
            keeps=placement.keeps,
            enlarged=enlarged,
        )


def _enlarged(
    session: Session, plan: Plan, stage: Stage, name: str, below: torch.Tensor, spool: Path, console: Console
) -> torch.Tensor:
    """The latents below as large as a stage's, by way of their pixels."""
    geometry, grid = session.preset.geometry, stage.grid
    below = crop_to_stage(below, stage, geometry.patch)
    size = grid.h * geometry.token_pixels, grid.w * geometry.token_pixels
    frames = (grid.t - 1) * geometry.temporal + 1
    tile = start_tile(plan, stage)
    encoder = session.half_encoder(stage.entry) if stage.entry else None
    with console.stage(f"{name} start", frames) as advance:
        return enlarge(
            session.vae(),
            below,
            stage.ratio,
            stage.time_ratio,
            size,
            frames,
            tile=tile,
            spool=spool,
            on_frame=advance,
            encoder=encoder,
        )


def _thumbnail(width: int, height: int) -> tuple[int, int]:
    factor = min(1.0, 480 / max(width, height))
    return max(1, round(height * factor)), max(1, round(width * factor))
