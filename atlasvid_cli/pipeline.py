"""From a prompt to a video file: text -> proxy -> detail levels -> decode, each stage leaving its result on disk.

Stages are separated by files in the run directory, so resuming, rerunning a stage and bounding memory are one thing.
"""

import json
import shutil
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from . import __version__, store
from .console import Console
from .decode import decode_stream
from .errors import InputError
from .model import TextContext, text_context
from .plan import Plan, Request, Stage, make_plan, vae_tile
from .presets import load_preset
from .proxy import sample_proxy
from .refine import Region, sample_detail
from .shapes import Grid
from .text import encode_prompts, unknown_words
from .video import contact_sheet, suffix_for, write_png, write_video
from .weights import check_config, load_scheduler, load_text, load_transformer, load_vae, model_folder, model_hash

FORMAT = "atlasvid-latents/1"
SHEET_FRAMES = 12


class Session:
    """The model of a preset, loaded part by part when first needed and kept for the batch."""

    def __init__(self, preset: str, model_path: str | None = None):
        self.preset = load_preset(preset)
        self.folder = model_folder(self.preset, model_path)
        check_config(self.folder, self.preset)
        self._parts: dict[str, Any] = {}

    def hash(self, stage: str) -> str:
        """Identity of the weights that make a stage's latents."""
        lora = self.preset.proxy.lora if stage == "proxy" else self.preset.detail.lora
        key = f"hash {stage}"
        if key not in self._parts:
            self._parts[key] = model_hash(self.folder, "transformer", "text_encoder", lora)
        return self._parts[key]

    def transformer(self, lora: str | None) -> Any:
        key = f"transformer {lora}"
        if key not in self._parts:
            for other in [k for k in self._parts if k.startswith("transformer ")]:
                del self._parts[other]  # one stage's weights at a time
            self._parts[key] = load_transformer(self.folder, lora)
        return self._parts[key]

    def detail_models(self) -> tuple[Any, Any]:
        """(detail stream, proxy stream): one model where the adapter acts on both."""
        detail = self.preset.detail
        proxy_stream = self.transformer(detail.lora)
        if detail.streams == "both":
            return proxy_stream, proxy_stream
        bare = load_transformer(self.folder)
        return bare, proxy_stream

    def vae(self) -> Any:
        if "vae" not in self._parts:
            self._parts["vae"] = load_vae(self.folder)
        return self._parts["vae"]

    def embeddings(self, prompts: tuple[str, ...], console: Console) -> list[torch.Tensor]:
        if "text" not in self._parts:
            self._parts["text"] = load_text(self.folder)
        tokenizer, encoder = self._parts["text"]
        for word in dict.fromkeys(w for p in prompts for w in unknown_words(p, tokenizer)):
            console.warn(f"the model of preset {self.preset.name} does not know the word {word!r} and ignores it")
        return encode_prompts(list(prompts), tokenizer, encoder, self.preset.transformer.text_length)


def render(
    session: Session, plan: Plan, prompt: str, negative_prompt: str, run_dir: Path, output: Path, progress: Console
) -> dict[str, Any]:
    """The whole path. Returns what a batch event reports."""
    started = time.monotonic()
    proxy = make_proxy(session, plan, prompt, negative_prompt, run_dir, progress)
    latents = refine(session, plan, proxy, run_dir, progress)
    video = decode(session, latents, output, plan.request.codec, progress)
    seconds = round(time.monotonic() - started, 2)
    event = {
        "video": str(video),
        "preview": str(_sheet_path(video)),
        "run_dir": str(run_dir),
        "seconds": seconds,
    }
    record = {
        **plan.to_json(),
        **describe(latents),
        "job": job_hash(session, plan, prompt, negative_prompt),
        "video_bytes": video.stat().st_size,
        "event": event,
        "render_seconds": seconds,
    }
    store.write_json(run_dir / "run.json", record)
    return event


def job_hash(session: Session, plan: Plan, prompt: str, negative_prompt: str) -> str:
    """Stands for all that decides a finished video: the plan, the prompts, the weights, the size and the codec."""
    return store.artefact_hash(
        {
            **plan.key(),
            "prompts": [prompt, negative_prompt],
            "models": [session.hash("proxy"), session.hash("detail"), model_hash(session.folder, "vae")],
            "codec": plan.request.codec,
        }
    )


def finished_video(
    session: Session, plan: Plan, prompt: str, negative_prompt: str, run_dir: Path, output: Path
) -> dict[str, Any] | None:
    """The event of an identical job that is done and whose video is still there; None otherwise."""
    try:
        record = json.loads((run_dir / "run.json").read_text(encoding="utf-8"))
        same = record["job"] == job_hash(session, plan, prompt, negative_prompt)
        same = same and record["event"]["video"] == str(output) and output.stat().st_size == record["video_bytes"]
        return {**record["event"], "status": "skipped", "skipped": True} if same else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def publish(made: Path, target: Path) -> None:
    """Copies a result of the run directory to where the user wants it."""
    with store.atomic(target) as file, made.open("rb") as source:
        shutil.copyfileobj(source, file)


def make_proxy(
    session: Session, plan: Plan, prompt: str, negative_prompt: str, run_dir: Path, progress: Console
) -> Path:
    """Stage 1 -> run_dir/proxy.safetensors; kept as it is where the same plan, prompt and weights made it.

    proxy.mp4 and its contact sheet show what will happen before the detail is paid for.
    """
    path, preview = run_dir / "proxy.safetensors", run_dir / "proxy.mp4"
    stage = plan.proxy
    metadata = _metadata(session, plan, stage, "proxy", prompt, negative_prompt)
    if _is_current(path, metadata):
        if not preview.exists():
            decode(session, path, preview, "h264", progress, "preview")
        return path
    model = session.transformer(session.preset.proxy.lora)
    contexts = _contexts(session, (prompt, negative_prompt), model, progress)
    store.run_directory(run_dir.parent, run_dir.name)
    state = run_dir / "proxy.state.safetensors"
    resume = _resume(state, metadata["key"], progress)
    with progress.stage("proxy", stage.steps) as advance:
        advance(resume[0] if resume else 0)
        latents = sample_proxy(
            model,
            load_scheduler(session.folder, stage.flow_shift),
            stage,
            session.preset.geometry.patch,
            plan.request.seed,
            contexts[0],
            contexts[1],
            resume,
            lambda step, tensors: store.save_state(state, step, tensors, metadata["key"]),
            advance,
        )
    store.save_tensors(path, {"latents": latents}, metadata)
    state.unlink(missing_ok=True)
    decode(session, path, preview, "h264", progress, "preview")
    return path


def refine(session: Session, plan: Plan, proxy_path: Path, run_dir: Path, progress: Console) -> Path:
    """Stage 2 -> run_dir/detail.safetensors, through every level of the plan; finished levels are kept.

    A region samples only the last level again, above the levels that its video was made from.
    """
    path = proxy_path
    for number, (name, stage) in enumerate(plan.named_stages()[1:], start=1):
        below_path, last = path, number == len(plan.levels)
        path = _level_path(plan, run_dir, number)
        if plan.is_region and not last:
            continue
        below, below_metadata = read_latents(below_path, session)
        metadata = _level_metadata(session, plan, stage, below_metadata)
        redo = None
        if plan.is_region:
            redo, metadata = _region(session, plan, stage, path, below_metadata["key"], metadata)
            path = run_dir / f"detail-region-{metadata['key']}.safetensors"
        if not _is_current(path, metadata):
            latents = _refine_level(session, plan, stage, name, number, below, metadata, redo, run_dir, progress)
            store.save_tensors(path, {"latents": latents}, metadata)
            _state_path(run_dir, number).unlink(missing_ok=True)
    return path


def result_key(session: Session, plan: Plan, proxy_path: Path, run_dir: Path) -> str:
    """The key that the latents of `refine` will carry, before anything is sampled."""
    metadata = describe(proxy_path)
    if plan.is_region:
        base = _level_path(plan, run_dir, len(plan.levels))
        below = _level_path(plan, run_dir, len(plan.levels) - 1) if len(plan.levels) > 1 else proxy_path
        found = _level_metadata(session, plan, plan.levels[-1], describe(below))
        return _region_metadata(plan, describe(base), found)["key"]
    for stage in plan.levels:
        metadata = _level_metadata(session, plan, stage, metadata)
    return metadata["key"]


def decode(
    session: Session, latents_path: Path, output: Path, codec: str, progress: Console, stage: str = "decode"
) -> Path:
    """Saved latents -> video file and a contact sheet beside it, streamed; no sampling."""
    latents, metadata = read_latents(latents_path, session)
    output = output if output.suffix else output.with_suffix(suffix_for(codec))
    vae = session.vae()
    width, height, scale = int(metadata["width"]), int(metadata["height"]), int(metadata["scale"])
    frames = int(metadata["frames"])
    wanted = {round(i * (frames - 1) / (SHEET_FRAMES - 1)) for i in range(SHEET_FRAMES)}
    sheet: list[torch.Tensor] = []
    with progress.stage(stage, frames) as advance:

        def finished() -> Iterator[torch.Tensor]:
            index = 0
            tile = vae_tile(session.folder, latents.shape[2], latents.shape[3])
            for chunk in decode_stream(vae, latents, tile, spool=latents_path.parent):
                if scale > 1:
                    chunk = F.avg_pool2d(chunk[..., : height * scale, : width * scale], scale)
                for frame in chunk:
                    if index in wanted:
                        small = frame[:, :height, :width]
                        sheet.append(F.interpolate(small[None], size=_thumbnail(width, height), mode="area")[0])
                    index += 1
                yield chunk

        write_video(
            output,
            finished(),
            width=width,
            height=height,
            fps=Fraction(metadata["fps"]),
            frame_count=frames,
            codec=codec,
            metadata={k: metadata[k] for k in ("prompt", "seed", "preset", "version", "model", "key")},
            on_frame=lambda _: advance(),
        )
    write_png(_sheet_path(output), contact_sheet(sheet, 4))
    return output


def read_latents(path: Path, session: Session) -> tuple[torch.Tensor, dict[str, str]]:
    """Latents (C, T, H, W) fp32 of a file of ours and its metadata; refuses those of another model."""
    tensors, metadata = store.open_tensors(
        path, {"latents": ("F32", (session.preset.transformer.channels, None, None, None))}
    )
    store.check_artefact(metadata, {"format": FORMAT, "preset": session.preset.name}, path)
    expected = session.hash(metadata["kind"])
    store.check_artefact(metadata, {"model": expected}, path)
    return tensors["latents"], metadata


def describe(path: Path) -> dict[str, str]:
    """The metadata of a latents file, from its header alone. Raises InputError for any other file."""
    metadata, _ = store.read_header(path)
    store.check_artefact(metadata, {"format": FORMAT}, path)
    return metadata


def plan_from_proxy(path: Path, request: Request, session: Session) -> Plan:
    """A plan whose levels climb from a saved proxy (or an earlier result): length, prompt and seed come from it."""
    latents, metadata = read_latents(path, session)
    patch = session.preset.geometry.patch
    _, t, h, w = latents.shape
    return make_plan(request, Grid(t, h // patch, w // patch), Fraction(metadata["fps"]))


def request_defaults(path: Path) -> dict[str, Any]:
    """What `refine` takes over from a saved proxy: preset, seed, fps and the exact duration."""
    metadata = describe(path)
    return {
        "preset": metadata["preset"],
        "seed": int(metadata["seed"]),
        "fps": int(metadata["target_fps"]),
        "seconds": Fraction(metadata["seconds"]),
    }


def _refine_level(
    session: Session,
    plan: Plan,
    stage: Stage,
    name: str,
    number: int,
    below: torch.Tensor,
    metadata: dict[str, str],
    region: Region | None,
    run_dir: Path,
    progress: Console,
) -> torch.Tensor:
    model, proxy_model = session.detail_models()
    used = (metadata["prompt"], metadata["negative_prompt"])[: stage.passes]
    texts = _contexts(session, used, model, progress)
    proxy_texts = texts if proxy_model is model else _contexts(session, used, proxy_model, progress)
    state = _state_path(run_dir, number)
    store.run_directory(run_dir.parent, run_dir.name)
    resume = _resume(state, metadata["key"], progress)
    blocks = len(model.blocks) * stage.passes
    with progress.stage(name, stage.steps * blocks) as advance:
        advance(resume[0] * blocks if resume else 0)
        return sample_detail(
            model,
            proxy_model,
            stage,
            session.preset.detail,
            session.preset.geometry.patch,
            plan.request.seed,
            number,
            below,
            list(zip(texts, proxy_texts, strict=True)),
            plan.chunk,
            region,
            resume,
            lambda step, tensors: store.save_state(state, step, tensors, metadata["key"]),
            advance,
        )


def _contexts(session: Session, prompts: tuple[str, ...], model: Any, progress: Console) -> list[TextContext]:
    length = session.preset.transformer.text_length
    with torch.no_grad():
        return [text_context(model, [e], length) for e in session.embeddings(prompts, progress)]


def _metadata(
    session: Session, plan: Plan, stage: Stage, kind: str, prompt: str, negative: str, below: str = ""
) -> dict[str, str]:
    """Metadata of a stage's latents. `key` is the hash of all that decides them; size and fps are the latents' own."""
    model = session.hash(kind)
    fields = {**plan.key(stage), "prompt": prompt, "negative": negative, "model": model, "below": below}
    geometry, grid, last = session.preset.geometry, stage.grid, stage is plan.levels[-1]
    pixels = geometry.token_pixels
    return {
        "format": FORMAT,
        "kind": kind,
        "version": __version__,
        "preset": session.preset.name,
        "model": model,
        "prompt": prompt,
        "negative_prompt": negative,
        "seed": str(plan.request.seed),
        "seconds": str(plan.request.seconds),
        "target_fps": str(plan.fps),
        "fps": str(Fraction(plan.fps, stage.time_ratio if kind == "proxy" else 1)),
        "frames": str(plan.frames if last else (grid.t - 1) * geometry.temporal + 1),
        "width": str(plan.request.width if last else grid.w * pixels),
        "height": str(plan.request.height if last else grid.h * pixels),
        "scale": str(plan.scale if last else 1),
        "below": below,
        "key": store.artefact_hash(fields),
    }


def _level_metadata(session: Session, plan: Plan, stage: Stage, below: dict[str, str]) -> dict[str, str]:
    return _metadata(session, plan, stage, "detail", below["prompt"], below["negative_prompt"], below["key"])


def _region_metadata(plan: Plan, base: dict[str, str], metadata: dict[str, str]) -> dict[str, str]:
    region = {"of": metadata["key"], "base": base["key"], "region": plan.request.region, "frames": plan.request.frames}
    return metadata | {"key": store.artefact_hash(region)}


def _resume(path: Path, key: str, progress: Console) -> store.StepState | None:
    """The state that an interrupted run of the same stage left, with a word about one that cannot be used."""
    state, warning = store.load_state(path, key)
    if warning:
        progress.warn(warning)
    return state


def _is_current(path: Path, metadata: dict[str, str]) -> bool:
    if not path.exists():
        return False
    try:
        return describe(path)["key"] == metadata["key"]
    except (InputError, KeyError):
        return False  # damaged or foreign: made anew


def _region(
    session: Session, plan: Plan, stage: Stage, path: Path, below: str, metadata: dict[str, str]
) -> tuple[Region, dict[str, str]]:
    """The region of the finished video at `path`, made above the latents with the key `below`."""
    if not path.exists():
        raise InputError(f"{path} does not exist: run refine at this --res without --region first")
    latents, base = read_latents(path, session)
    geometry, grid = session.preset.geometry, stage.grid
    size = (grid.t, grid.h * geometry.patch, grid.w * geometry.patch)
    if latents.shape[1:] != size or base["below"] != below:
        raise InputError(f"{path} was made from something else: run refine at this --res without --region first")
    pixels = geometry.token_pixels
    x, y, w, h = plan.request.region or (0, 0, plan.request.width, plan.request.height)
    x, y, w, h = (v * plan.scale for v in (x, y, w, h))
    first, end = plan.request.frames or (0, plan.frames)
    # latent t > 0 holds frames temporal*(t-1)+1 .. temporal*t
    start = (-(-first // geometry.temporal), y // pixels, x // pixels)
    stop = (-(-(end - 1) // geometry.temporal) + 1, -(-(y + h) // pixels), -(-(x + w) // pixels))
    stop = (min(stop[0], grid.t), min(stop[1], grid.h), min(stop[2], grid.w))
    return Region(start, stop, latents), _region_metadata(plan, base, metadata)


def _level_path(plan: Plan, run_dir: Path, number: int) -> Path:
    return run_dir / ("detail.safetensors" if number == len(plan.levels) else f"level-{number}.safetensors")


def _sheet_path(video: Path) -> Path:
    """The contact sheet beside a video."""
    return video.with_suffix(".sheet.png")


def _state_path(run_dir: Path, number: int) -> Path:
    return run_dir / f"level-{number}.state.safetensors"


def _thumbnail(width: int, height: int) -> tuple[int, int]:
    factor = min(1.0, 480 / max(width, height))
    return max(1, round(height * factor)), max(1, round(width * factor))
