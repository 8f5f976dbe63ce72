"""Trains the adapter of a stage on captioned clips, or on the procedural world: `atlasvid train proxy|detail`.

The same command continues an interrupted training from its checkpoint; other data, weights or settings start anew.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel

from . import corpus, dataset, store, train, wear
from .console import Console
from .embeddings import EmbeddingCache
from .errors import UsageError
from .loop import all_processes
from .presets import Preset
from .session import Session
from .train_job import Job, Learner, check, check_output
from .train_samples import Sampler
from .wear import add_enlarged, add_worn
from .weights import check_adapter, load_transformer, load_vae, model_hash

WORLD = "world"
WORLD_SAMPLES = {"proxy": {"proxy": 1200}, "detail": {"first": 150, "upper": 150}}
LEARNING_RATES = {"muon": 3e-3, "adamw": 3e-3, "prodigy": 1.0}


def make(session: Session, job: Job, console: Console) -> Path:
    """Trains the adapter and saves it; checkpoints, latents, embeddings and log.jsonl lie in `job.work`.

    Of several processes (`accelerate launch`), which share a disk, the first one encodes, saves and speaks.
    `InputError` where no clip can be used or stage 1's adapter is another's, `UsageError` where the output is another
    file.
    """
    preset, learner = session.preset, check(session.preset, job)
    processes = all_processes()
    base = model_hash(session.folder, learner.part)
    stage1 = model_hash(session.folder, learner.part, learner.lora) if job.stage == "detail" else None
    if job.stage == "detail" and learner.lora:
        figures = {"time_ratio": str(preset.proxy.time_ratio)}  # as a render will ask
        check_adapter(session.folder, learner.lora, "proxy", learner.part, figures)
    if job.stage == "proxy" and preset.proxy.time_ratio == 1:
        console.warn(
            f"preset {preset.name} has time_ratio = 1, so that this adapter makes no longer videos; for those set"
            " time_ratio = 4 in a preset of your own"
        )
    lr = LEARNING_RATES[preset.training.optimizer] if job.lr is None else job.lr
    with processes.main_process_first():  # the others find what it encoded
        groups = _samples(session, job, console)
    data = [[group[0].get("clip"), group[0]["caption"]] for group in groups]
    key = store.artefact_hash(
        {
            "weights": [model_hash(session.folder, learner.part, "text_encoder", "vae"), stage1],
            "preset": [
                preset.proxy.time_ratio,
                preset.proxy.flow_shift,
                learner.guidance_scale,
                preset.negative_prompt,
                preset.detail.flow_shift,
                preset.detail.streams,
                preset.detail.first.strength,
                preset.detail.upper.strength,
                preset.detail.first.upsample,
                preset.detail.upper.upsample,
            ],
            "windows": [preset.detail.layouts, preset.detail.margin, preset.detail.proxy_window],
            "centre": preset.detail.proxy_centre,
            "job": [job.stage, job.steps, lr, job.rank, job.seed],
            "training": [dataclasses.astuple(preset.training), train.OBJECT_WEIGHT],
            "samples": corpus.figures(session, job.stage),
            "data": data,
            **({"sigmas": learner.sigmas} if preset.experts else {}),
        }
    )
    check_output(job.output, key)
    trained, held_out = corpus.split_groups(groups)
    _check_ratios(preset, job, trained)
    if not held_out:
        console.warn(f"with fewer than {corpus.HELD_OUT} clips none is held out, so there is no validation loss")
    with processes.main_process_first():
        embed = embedder(
            session, [preset.negative_prompt, *(s["caption"] for s in (*trained, *held_out))], job.work, console
        )
    ratios: Sequence[object] = [s["ratio"] for s in trained] if job.stage == "detail" else ()
    metadata = train.adapter_metadata(
        job.stage, base, preset.proxy.time_ratio, ratios, preset.detail.windows, preset.detail.streams
    )
    folder = store.run_directory(job.work, f"{job.stage}-{key}")
    with store.lock(folder) if processes.is_main_process else contextlib.nullcontext():
        if job.stage == "detail":
            with processes.main_process_first():
                samples = [*trained, *held_out]
                for time_ratio, adapter in {1: None, preset.proxy.time_ratio: learner.lora}.items():
                    _add_proxies(session, learner, time_ratio, adapter, samples, data, embed, job.work, console)
        metadata |= {"run": key}
        model = _trained(session, job, learner, folder, trained, held_out, embed, lr, metadata, console)
        if processes.is_main_process:
            train.save_adapter(model, job.output, metadata)
    processes.wait_for_everyone()
    return job.output


def _trained(
    session: Session,
    job: Job,
    learner: Learner,
    folder: Path,
    trained: list[dict],
    held_out: list[dict],
    embed: train.Embed,
    lr: float,
    metadata: dict[str, str],
    console: Console,
) -> WanTransformer3DModel:
    """The base with the adapter, trained on samples; checkpoint, log and the adapters of some steps are in `folder`."""
    preset = session.preset
    model = _trainable(session, learner.part)
    bare = _trainable(session, learner.part) if job.stage == "detail" and preset.detail.streams == "proxy" else model
    torch.manual_seed(job.seed)
    model.add_adapter(train.lora_config(job.rank))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # bfloat16 would lose updates as small as theirs
    shown = learner.guidance_scale, learner.sigmas
    sampler = Sampler(session, job.stage, bare, model, held_out, embed, folder / "samples", *shown)

    def show(step: int) -> None:
        train.save_adapter(model, folder / f"step-{step:06d}.safetensors", metadata)
        try:
            sampler.show(step)
        except torch.OutOfMemoryError:  # sampling may take more than training: no reason to end that
            console.warn(f"memory ran out for the pictures of step {step}: training goes on without them")

    with console.stage(f"train {job.stage}", job.steps) as advance:
        if job.stage == "proxy":
            train.train_clips(
                model,
                folder,
                [],
                trained,
                embed,
                job.steps,
                lr,
                time_ratio=preset.proxy.time_ratio,
                tokens=preset.training.batch * preset.proxy.base_tokens * corpus.proxy_latents(preset),
                shift_of=lambda latents: preset.proxy.flow_shift,
                within=learner.sigmas,
                accumulate=preset.training.accumulate,
                seed=job.seed,
                held_out=held_out,
                on_step=advance,
                training=preset.training,
                show=show,
            )
        else:
            train.train_detail(
                bare,
                model,
                folder,
                trained,
                embed,
                job.steps,
                lr,
                preset.detail,
                time_ratio=preset.proxy.time_ratio,
                highest=learner.sigmas[1],
                accumulate=preset.training.detail_accumulate,
                seed=job.seed,
                held_out=held_out,
                on_step=advance,
                training=preset.training,
                show=show,
            )
    return model


def _add_proxies(
    session: Session,
    learner: Learner,
    time_ratio: int,
    adapter: str | None,
    samples: list[dict],
    data: list[list[str]],
    embed: train.Embed,
    work: Path,
    console: Console,
) -> None:
    """Gives the samples, which `data` names, their worn proxies of a time ratio, by the base with an `adapter` or
    without, and what a level starts from in pixels. They are kept in `work` by what they depend on alone, so that
    trainings at other rates, ranks or seeds share them."""
    preset, proxy, detail = session.preset, session.preset.proxy, session.preset.detail
    guidance = 1.0 if adapter is None else learner.guidance_scale, preset.negative_prompt
    largest = learner.sigmas[1]
    key = {
        "weights": model_hash(session.folder, learner.part, "text_encoder", "vae", adapter),
        "stage 1": [time_ratio, guidance, proxy.flow_shift, largest],
        "wear": [wear.STEPS, wear.UNSHIFTED, wear.BATCH_TOKENS, train.WORN],
        "samples": corpus.figures(session, "detail"),
        "data": [corpus.HELD_OUT, corpus.VALIDATED, data],
    }
    folder = store.run_directory(work, f"proxies-{store.artefact_hash(key)}")

    def wear_them(on_done: Callable[[int], None]) -> None:
        model = load_transformer(session.folder, adapter, "proxy", session.dtype, learner.part).to(session.device)
        figures = time_ratio, (lambda latents: proxy.flow_shift), on_done, *guidance
        add_worn(model, samples, embed, *figures, largest=largest)

    def enlarge_them(on_done: Callable[[int], None]) -> None:
        add_enlarged(load_vae(session.folder).to(session.device), samples, time_ratio, on_done)

    wear.complete(folder / "worn.safetensors", samples, "worn", time_ratio, wear_them, console)
    levels = ((detail.upper, 1), (detail.first, proxy.time_ratio))
    if any(level.upsample == "pixels" and r == time_ratio for level, r in levels):
        wear.settle_worn(samples, time_ratio)
        wear.complete(folder / "enlarged.safetensors", samples, "enlarged", time_ratio, enlarge_them, console)


def _trainable(session: Session, part: str) -> WanTransformer3DModel:
    """The base on the compute device in its dtype; on a GPU blocks are computed again backwards, to save its memory."""
    model = load_transformer(session.folder, dtype=session.dtype, part=part).to(session.device)
    if session.device.type == "cuda":
        model.enable_gradient_checkpointing()
    return model


def _check_ratios(preset: Preset, job: Job, trained: list[dict]) -> None:
    """UsageError where an adapter of stage 2 would not know the largest ratio that its own preset climbs by."""
    largest = preset.training_ratios[-1]
    if job.stage == "detail" and str(job.data) != WORLD and all(Fraction(s["ratio"]) < largest for s in trained):
        known = float(max(Fraction(s["ratio"]) for s in trained))
        raise UsageError(
            f"these clips have too few pieces for all ratios of preset {preset.name}: give more or longer ones, or set"
            f" max_ratio = {known:g} in a preset of your own"
        )


def _samples(session: Session, job: Job, console: Console) -> list[list[dict]]:
    if str(job.data) != WORLD:
        return corpus.load_samples(session, job.stage, job.data, job.work, console)
    preset, geometry = session.preset, session.preset.geometry
    if (geometry.token_pixels, preset.fps, preset.proxy.time_ratio) != (dataset.TOKEN, dataset.FPS, 4):
        raise UsageError(f"--data world is drawn for preset tiny and not for {preset.name}; give a folder of clips")
    folder = dataset.folder_of(job.work, model_hash(session.folder, "vae"))
    vae = load_vae(session.folder).to(session.device)
    kinds = WORLD_SAMPLES[job.stage].items()
    return [[sample] for kind, count in kinds for sample in dataset.build(kind, count, folder, vae)]


def embedder(session: Session, prompts: list[str], work: Path, console: Console) -> train.Embed:
    """Prompt -> embedding (tokens, text_dim) fp32, of `prompts` and the empty one, encoded once and kept in `work`."""
    cache = EmbeddingCache(work / f"text-{model_hash(session.folder, 'text_encoder')}")
    missing = [p for p in dict.fromkeys(("", *prompts)) if cache.read(p) is None]
    made = session.encode(missing, console) if missing else []
    session.tell_ignored(made, console)
    for prompt, embedding in zip(missing, made, strict=True):
        cache.write(prompt, embedding)

    def embed(prompt: str) -> torch.Tensor:
        embedding = cache.read(prompt)
        assert embedding is not None
        return embedding.states

    return lru_cache(maxsize=1024)(embed)
