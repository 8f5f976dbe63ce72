"""What adapter to train, and whether it can be: said before weights are looked for."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from . import tensor_file, train
from .errors import InputError, UsageError
from .optim import check_optimizer
from .presets import Preset


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
    check_optimizer(preset.training.optimizer)
    check_output(job.output)
    return learner


def check_output(output: Path, key: str | None = None) -> None:
    """UsageError where the adapter would take the place of a file that this training, known by its key, or before that
    is known any training, did not make."""
    if output.suffix != ".safetensors":
        raise UsageError(f"{output} would hold an adapter; let --output end in .safetensors")
    if not output.exists():
        return
    try:
        made_by = tensor_file.read_header(output)[0].get("run")
    except InputError:  # no adapter
        made_by = None
    if made_by is None or key not in (None, made_by):
        raise UsageError(f"{output} exists and was made from something else; choose another --output")
