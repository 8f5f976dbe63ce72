"""Trains the adapter of a stage on captioned clips, or on the procedural world: `atlasvid train proxy|detail`.

The same command continues an interrupted training from its checkpoint; other data, weights or settings start anew.
"""

import contextlib
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import astuple, replace
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel

from . import corpus, dataset, store, train, wear
from .console import Console
from .embeddings import EmbeddingCache
from .loop import Run, all_processes
from .presets import Preset
from .session import Session
from .shapes import NATIVE
from .train_job import WORLD, Job, Learner, check, check_output
from .train_samples import Sampler
from .wear import Stage1
from .weights import check_adapter, load_transformer, load_vae, model_hash

WORLD_SAMPLES = {"proxy": {"proxy": 1200}, "detail": {"first": 150, "upper": 150}}
LEARNING_RATES = {"muon": 3e-3, "adamw": 3e-3, "prodigy": 1.0}


def make(session: Session, job: Job, console: Console) -> Path:
    """Trains the adapter and saves it; checkpoints, latents, embeddings and log.jsonl lie in `job.work`.

    Of several processes (`accelerate launch`), which share a disk, the first one encodes, saves and speaks.
    `InputError` where no clip can be used or stage 1's adapter is another's, `UsageError` where the output is another
    file.
    """
    preset, learner = session.preset, check(session.preset, job)
    read = learner.lora if job.stage == "detail" else None
    session.identify(console, learner.part, "text_encoder", "vae", read)
    processes = all_processes()
    base = model_hash(session.folder, learner.part)
    if job.stage == "detail" and learner.lora:
        check_adapter(session.folder, learner.lora, "proxy", learner.part, preset.proxy.trained_for)  # as a render will
    if job.stage == "proxy" and preset.proxy.time_ratio == 1:
        console.warn(
            f"preset {preset.name} has time_ratio = 1, so that this adapter makes no longer videos; for those set"
            " time_ratio = 4 in a preset of your own"
        )
    lr = LEARNING_RATES[preset.training.optimizer] if job.lr is None else job.lr
    settings = _settings(session, job, learner, lr)
    made_by = {"settings": store.artefact_hash(settings)}
    check_output(job.output, made_by)  # before hours of encoding
    with processes.main_process_first():  # the others find what it encoded
        groups = _samples(session, job, console)
    data = [[group[0].get("clip"), group[0]["caption"]] for group in groups]
    key = store.artefact_hash(settings | {"data": data})
    made_by["run"] = key
    check_output(job.output, made_by)
    trained, held_out = corpus.split_groups(groups)
    if not held_out:
        console.warn(f"with fewer than {corpus.HELD_OUT} clips none is held out, so there is no validation loss")
    with processes.main_process_first():
        embed = embedder(
            session, [preset.negative_prompt, *(s["caption"] for s in (*trained, *held_out))], job.work, console
        )
    ratios: Sequence[object] = [s["ratio"] for s in trained] if job.stage == "detail" else ()
    metadata = train.adapter_metadata(
        job.stage, base, preset.proxy, ratios, preset.detail.windows, preset.detail.streams
    )
    folder = store.run_directory(job.work, f"{job.stage}-{key}")
    with store.lock(folder) if processes.is_main_process else contextlib.nullcontext():
        if job.stage == "detail":
            with processes.main_process_first():
                samples = [*trained, *held_out]
                for stage1 in _makers(preset, learner):
                    proxies = _proxies_folder(session, learner.part, stage1, data, job.work)
                    _add_proxies(session, learner.part, stage1, samples, embed, proxies, console)
        metadata |= made_by
        told = Run(folder, job.steps, lr, job.seed, training=preset.training, held_out=held_out)
        model = _trained(session, job, learner, told, trained, embed, metadata, console)
        if processes.is_main_process:
            train.save_adapter(model, job.output, metadata)
    processes.wait_for_everyone()
    return job.output


def _settings(session: Session, job: Job, learner: Learner, lr: float) -> dict[str, Any]:
    """All that decides an adapter beside the clips and their captions."""
    preset, proxy, detail = session.preset, session.preset.proxy, session.preset.detail
    below = model_hash(session.folder, learner.part, learner.lora) if job.stage == "detail" else None
    return {
        "weights": [model_hash(session.folder, learner.part, "text_encoder", "vae"), below],
        "preset": [
            proxy.time_ratio,
            proxy.position_scale,
            proxy.flow_shift,
            learner.guidance_scale,
            preset.negative_prompt,
            detail.flow_shift,
            detail.streams,
            detail.first.strength,
            detail.upper.strength,
            detail.first.upsample,
            detail.upper.upsample,
        ],
        "windows": [detail.layouts, detail.margin, detail.proxy_window],
        "centre": detail.proxy_centre,
        "job": [job.stage, job.steps, lr, job.rank, job.seed],
        "training": [astuple(preset.training), train.recipe()],
        "samples": corpus.figures(session, job.stage),
        **({"sigmas": learner.sigmas} if preset.experts else {}),
    }


def _trained(
    session: Session,
    job: Job,
    learner: Learner,
    told: Run,
    samples: list[dict],
    embed: train.Embed,
    metadata: dict[str, str],
    console: Console,
) -> WanTransformer3DModel:
    """The base with the adapter, trained on samples; the adapters of some steps, which say `metadata`, and pictures of
    what they make lie beside the checkpoint."""
    preset = session.preset
    model = _trainable(session, learner.part)
    bare = _sharing(model) if job.stage == "detail" and preset.detail.streams == "proxy" else model
    torch.manual_seed(job.seed)
    model.add_adapter(train.lora_config(job.rank))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # bfloat16 would lose updates as small as theirs
    shown = learner.guidance_scale, learner.sigmas
    sampler = Sampler(session, job.stage, bare, model, told.held_out, embed, told.folder / "samples", *shown)

    def show(step: int) -> None:
        train.save_adapter(model, told.folder / f"step-{step:06d}.safetensors", metadata)
        try:
            sampler.show(step)
        except torch.OutOfMemoryError:  # sampling may take more than training: no reason to end that
            console.warn(f"memory ran out for the pictures of step {step}: training goes on without them")

    with console.stage(f"train {job.stage}", job.steps) as advance:
        told = replace(told, on_step=advance, show=show)
        if job.stage == "proxy":
            train.train_clips(
                model,
                replace(told, accumulate=preset.training.accumulate),
                [],
                samples,
                embed,
                spacing=preset.proxy.spacing,
                tokens=preset.training.batch * preset.proxy.base_tokens * corpus.proxy_latents(preset),
                shift_of=lambda latents: preset.proxy.flow_shift,
                within=learner.sigmas,
            )
        else:
            train.train_detail(
                bare,
                model,
                replace(told, accumulate=preset.training.detail_accumulate),
                samples,
                embed,
                preset.detail,
                time_ratio=preset.proxy.time_ratio,
                highest=learner.sigmas[1],
            )
    return model


def _makers(preset: Preset, learner: Learner) -> list[Stage1]:
    """How the proxies that stage 2 meets are made: those of upper levels stand for what the bare base makes."""
    proxies = {1: (NATIVE, None), preset.proxy.time_ratio: (preset.proxy.spacing, learner.lora)}
    return [
        Stage1(
            spacing,
            lambda latents: preset.proxy.flow_shift,
            adapter,
            1.0 if adapter is None else learner.guidance_scale,
            preset.negative_prompt,
            learner.sigmas[1],
        )
        for spacing, adapter in proxies.values()
    ]


def _proxies_folder(session: Session, part: str, stage1: Stage1, data: list[list[str]], work: Path) -> Path:
    """Where the proxies of the samples that `data` names are kept: by what they depend on alone, so that trainings at
    other rates, ranks or seeds share them."""
    guidance = stage1.guidance_scale, stage1.negative
    key = {
        "weights": model_hash(session.folder, part, "text_encoder", "vae", stage1.adapter),
        "stage 1": [list(stage1.spacing), guidance, session.preset.proxy.flow_shift, stage1.largest],
        "wear": wear.recipe(),
        "samples": corpus.figures(session, "detail"),
        "data": [corpus.HELD_OUT, corpus.VALIDATED, data],
    }
    return work / f"proxies-{store.artefact_hash(key)}"


def _add_proxies(
    session: Session,
    part: str,
    stage1: Stage1,
    samples: list[dict],
    embed: train.Embed,
    folder: Path,
    console: Console,
) -> None:
    """Gives the samples their worn proxies of a time ratio, and what a level starts from in pixels where one does so;
    kept in `folder`."""

    def model() -> WanTransformer3DModel:
        loaded = load_transformer(session.folder, stage1.adapter, "proxy", session.dtype, part)
        return loaded.to(session.device)

    def vae() -> AutoencoderKLWan:
        return load_vae(session.folder).to(session.device)

    detail = session.preset.detail
    levels = ((detail.upper, 1), (detail.first, session.preset.proxy.time_ratio))
    pixels = any(level.upsample == "pixels" and r == stage1.spacing.time for level, r in levels)
    wear.complete_proxies(folder, samples, embed, stage1, model, vae if pixels else None, console)


def _trainable(session: Session, part: str) -> WanTransformer3DModel:
    """The base on the compute device in its dtype. On a GPU blocks are computed again backwards, to save its memory,
    and fp32 is multiplied as TF32."""
    model = load_transformer(session.folder, dtype=session.dtype, part=part).to(session.device)
    if session.device.type == "cuda":
        model.enable_gradient_checkpointing()
        # peft casts what comes in to the factors' fp32: their products would bypass the tensor cores, for digits that
        # bfloat16 inputs do not have. The factors themselves stay fp32
        torch.set_float32_matmul_precision("high")
    return model


def _sharing(model: WanTransformer3DModel) -> WanTransformer3DModel:
    """Another model of the same weights in memory, which an adapter of `model` does not change."""
    weights = chain(model.parameters(), model.buffers())
    return deepcopy(model, {id(tensor): tensor for tensor in weights})


def _samples(session: Session, job: Job, console: Console) -> list[list[dict]]:
    if str(job.data) != WORLD:
        return corpus.load_samples(session, job.stage, job.data, job.work, console)
    folder = dataset.folder_of(job.work, model_hash(session.folder, "vae"))
    vae = load_vae(session.folder).to(session.device)
    kinds = WORLD_SAMPLES[job.stage].items()
    return [[sample] for kind, count in kinds for sample in dataset.build(kind, count, folder, vae)]


def embedder(session: Session, prompts: list[str], work: Path, console: Console) -> train.Embed:
    """Prompt -> embedding (tokens, text_dim) fp32, of `prompts` and the empty one, encoded once and kept in `work`."""
    cache = EmbeddingCache(work / session.text_name)
    missing = [p for p in dict.fromkeys(("", *prompts)) if not cache.has(p)]
    for prompt, embedding in zip(missing, session.encode(missing, console) if missing else (), strict=True):
        cache.write(prompt, embedding)  # as it comes, so that an interruption costs no more
        session.tell_ignored([embedding], console)

    def embed(prompt: str) -> torch.Tensor:
        embedding = cache.read(prompt)
        assert embedding is not None
        return embedding.states

    return lru_cache(maxsize=1024)(embed)
