"""What adapter to train, and whether it can be: said before weights are looked for."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from . import dataset, tensor_file, train
from .console import Console
from .corpus import read_index
from .errors import InputError, UsageError
from .hub import folder_here
from .optim import check_optimizer
from .presets import Preset

WORLD = "world"


@dataclass(frozen=True)
class Job:
    """What to train: stage `proxy` or `detail`, on `data` (folder, index, or `world`), into the file `output`; of two
    experts the `expert` for high or low noise, in stage 2 always the latter."""

    stage: str
    data: Path
    output: Path
    work: Path
    steps: int = 1000
    lr: float | None = None  # LEARNING_RATES of the preset's optimizer
    rank: int = 64
    seed: int = 0
    expert: Literal["high", "low"] | None = None


@dataclass(frozen=True)
class Learner:
    """Whom an adapter is for: the folder of its weights, what it samples stage 1 with, and the sigmas between which it
    works."""

    part: str
    lora: str | None
    guidance_scale: float
    sigmas: tuple[float, float] = (0.0, 1.0)


def learner_of(preset: Preset, job: Job) -> Learner:
    """The preset's transformer, or one of its two experts. Raises UsageError."""
    experts, proxy = preset.experts, preset.proxy
    if not experts:
        if job.expert:
            raise UsageError(f"preset {preset.name} has one transformer; leave --expert out")
        return Learner("transformer", proxy.lora, proxy.guidance_scale)
    if job.stage == "detail" and job.expert == "high":
        raise UsageError("detail levels take the expert for low noise alone; leave --expert out")
    if job.stage == "proxy" and not job.expert:
        raise UsageError(f"preset {preset.name} has two experts, with an adapter each; give --expert high or low")
    if job.expert == "high":
        return Learner("transformer", proxy.lora, proxy.guidance_scale, experts.sigmas(second=False))
    return Learner("transformer_2", experts.lora, experts.guidance_scale, experts.sigmas(second=True))


def check(preset: Preset, job: Job) -> Learner:
    """Whom a job trains. Raises UsageError for what cannot be trained, before weights are looked for."""
    learner = learner_of(preset, job)
    if not (preset.proxy.scaled_time and preset.detail.scaled_positions and preset.detail.clean_proxy):
        raise UsageError(
            f"preset {preset.name} leaves out scaled_time, scaled_positions or clean_proxy, and training does not know"
            " how; remove that key from the preset"
        )
    if job.stage == "detail" and not preset.detail.proxy_attention:
        raise UsageError(
            f"preset {preset.name} has proxy_attention = false, so that no detail adapter would be used as trained; set"
            " it true in a preset of your own, with windows and time_ratio as you want them"
        )
    if job.stage == "detail" and preset.proxy.time_ratio > 1 and not learner.lora:
        table, option = ("experts", " --expert low") if preset.experts else ("proxy", "")
        raise UsageError(
            f"preset {preset.name} has time_ratio = {preset.proxy.time_ratio} and no lora below [{table}], so that the"
            f" detail would learn from proxies of a base that never saw such times; run atlasvid train proxy{option}"
            " first, and name what it makes there"
        )
    if (preset.geometry.patch, preset.transformer.text_length) != (train.PATCH, train.TEXT_LENGTH):
        raise UsageError(
            f"preset {preset.name} has another patch or text_length than Wan's {train.PATCH} and {train.TEXT_LENGTH},"
            " which training takes for granted; train with a preset that has these"
        )
    drawn_for = preset.geometry.token_pixels, preset.fps, preset.proxy.time_ratio
    if str(job.data) == WORLD and drawn_for != (dataset.TOKEN, dataset.FPS, 4):
        raise UsageError(f"--data world is drawn for preset tiny and not for {preset.name}; give a folder of clips")
    check_optimizer(preset.training.optimizer)
    check_output(job.output)
    return learner


def check_files(preset: Preset, job: Job, model_path: str | None) -> None:
    """Raises InputError for clips, and for an adapter that makes a detail's proxies, which are not there, before
    weights are fetched: of a repository that is not here, nothing is known of its adapters."""
    if str(job.data) != WORLD and not job.data.is_fifo():  # a pipe is read once
        read_index(job.data, Console(quiet=True))  # what it warns of is said where clips are taken
    lora, folder = learner_of(preset, job).lora, folder_here(preset, model_path)
    if job.stage == "detail" and folder and lora and not (folder / lora).is_file():
        raise InputError(
            f"the adapter {lora} of preset {preset.name} is neither beside it nor in {folder}; mend its name there"
        )


def check_output(output: Path, made_by: Mapping[str, str] | None = None) -> None:
    """UsageError where the adapter would take the place of a file that no training made, or one that another made: as
    far as this one is known by what `made_by` says of it."""
    if output.suffix != ".safetensors":
        raise UsageError(f"{output} would hold an adapter; let --output end in .safetensors")
    if not output.exists():
        return
    try:
        found = tensor_file.read_header(output)[0]
    except InputError:  # no adapter
        found = {}
    if "run" not in found or any(found.get(name, value) != value for name, value in (made_by or {}).items()):
        raise UsageError(f"{output} exists and was made from something else; choose another --output")
