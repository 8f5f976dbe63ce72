"""Trains the adapter of a stage on captioned clips, or on the procedural world: `atlasvid train proxy|detail`.

The same command continues an interrupted training from its checkpoint; other data, weights or settings start anew.
"""

import contextlib
import dataclasses
import random
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel

from . import corpus, dataset, store, tensor_file, train
from .console import Console
from .embeddings import EmbeddingCache
from .errors import InputError, UsageError
from .loop import all_processes
from .presets import Preset
from .session import Session
from .train_job import Job, Learner, check, check_output
from .train_samples import Sampler
from .wear import add_enlarged, add_worn
from .weights import load_transformer, load_vae, model_hash

WORLD = "world"
WORLD_SAMPLES = {"proxy": {"proxy": 1200}, "detail": {"first": 150, "upper": 150}}
HELD_OUT = 10  # every tenth clip is not trained on
VALIDATED = 16  # samples of held-out clips that a validation takes at most
LEARNING_RATES = {"muon": 3e-3, "adamw": 3e-3, "prodigy": 1.0}


def make(session: Session, job: Job, console: Console) -> Path:
    """Trains the adapter and saves it; checkpoints, latents, embeddings and log.jsonl lie in `job.work`.

    Of several processes (`accelerate launch`), which share a disk, the first one encodes, saves and speaks.
    `InputError` where no clip can be used, `UsageError` where the output is another file.
    """
    preset, learner = session.preset, check(session.preset, job)
    processes = all_processes()
    base = model_hash(session.folder, learner.part)
    stage1 = model_hash(session.folder, learner.part, learner.lora) if job.stage == "detail" else None
    lr = LEARNING_RATES[preset.training.optimizer] if job.lr is None else job.lr
    with processes.main_process_first():  # the others find what it encoded
        groups = _samples(session, job, console)
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
            "data": [[group[0].get("clip"), group[0]["caption"]] for group in groups],
            **({"sigmas": learner.sigmas} if preset.experts else {}),
        }
    )
    check_output(job.output, key)
    trained, held_out = split_groups(groups)
    _check_ratios(preset, job, trained)
    if not held_out:
        console.warn(f"with fewer than {HELD_OUT} clips none is held out, so there is no validation loss")
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
                _wear(session, learner, [*trained, *held_out], embed, folder, console)
                _enlarge(session, [*trained, *held_out], folder, console)
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
        sampler.show(step)

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


def _wear(
    session: Session, learner: Learner, samples: list[dict], embed: train.Embed, folder: Path, console: Console
) -> None:
    """Gives the samples their worn proxies, made once and kept in the training's `folder`."""
    proxy = session.preset.proxy
    with console.stage("worn proxies", len({1, proxy.time_ratio}) * len(samples)) as advance:
        for time_ratio, adapter in {1: None, proxy.time_ratio: learner.lora}.items():
            path, name = folder / f"worn-{time_ratio}.safetensors", f"worn_{time_ratio}"
            try:
                kept = tensor_file.open_tensors(path)[0]
            except InputError:  # missing, or damaged
                model = load_transformer(session.folder, adapter, "proxy", session.dtype, learner.part)
                model = model.to(session.device)
                scale = 1.0 if adapter is None else learner.guidance_scale
                shift_of, guidance = (lambda latents: proxy.flow_shift), (scale, session.preset.negative_prompt)
                add_worn(model, samples, embed, time_ratio, shift_of, advance, *guidance, largest=learner.sigmas[1])
                del model  # before the next one, or the one to train, is loaded
                kept = {str(i): sample[name] for i, sample in enumerate(samples) if name in sample}
                tensor_file.save_tensors(path, kept, {})
            for i, tensor in kept.items():
                samples[int(i)][name] = tensor


def _enlarge(session: Session, samples: list[dict], folder: Path, console: Console) -> None:
    """Gives the samples what levels start from in pixels, made once and kept in the training's `folder`."""
    preset = session.preset
    for level, time_ratio in ((preset.detail.upper, 1), (preset.detail.first, preset.proxy.time_ratio)):
        if level.upsample == "latents":
            continue
        names = f"proxy_{time_ratio}", f"enlarged_{time_ratio}"
        path = folder / f"enlarged-{time_ratio}.safetensors"
        try:
            kept = tensor_file.open_tensors(path)[0]
        except InputError:  # missing, or damaged
            with console.stage("enlarged proxies", len(samples)) as advance:
                vae = load_vae(session.folder).to(session.device)  # of no more use than here
                add_enlarged(vae, samples, time_ratio, advance)
            kept = {f"{i}.{name}": s[name] for i, s in enumerate(samples) for name in names if name in s}
            tensor_file.save_tensors(path, kept, {})
        for key, tensor in kept.items():
            i, name = key.split(".")
            samples[int(i)][name] = tensor
            samples[int(i)].pop(f"worn_{time_ratio}", None)


def _trainable(session: Session, part: str) -> WanTransformer3DModel:
    """The base on the compute device in its dtype; on a GPU blocks are computed again backwards, to save its memory."""
    model = load_transformer(session.folder, dtype=session.dtype, part=part).to(session.device)
    if session.device.type == "cuda":
        model.enable_gradient_checkpointing()
    return model


def split_groups(groups: list[list[dict]]) -> tuple[list[dict], list[dict]]:
    """The samples to train on, and some of every tenth clip's to validate with."""
    trained = [s for i, group in enumerate(groups) if i % HELD_OUT != HELD_OUT - 1 for s in group]
    held_out = [s for group in groups[HELD_OUT - 1 :: HELD_OUT] for s in group]
    random.Random(0).shuffle(held_out)
    return trained, held_out[:VALIDATED]


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
