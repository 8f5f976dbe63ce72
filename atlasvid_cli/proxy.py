"""Stage 1: the global proxy, by the base scheduler with guidance, resumable after every step (DESIGN §3)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UniPCMultistepScheduler, WanTransformer3DModel

from .block import EAGER, Kernels
from .model import TextContext, clip_forward, patchify, unpatchify
from .schedule import noise
from .stages import Stage
from .tensor_file import SaveState


@dataclass(frozen=True)
class Expert:
    """The model that works at a noise level, the prompts as it sees them (without guidance one), and its guidance
    scale; for autoguidance also the model without its adapter, with the prompt as that sees it."""

    model: WanTransformer3DModel
    prompt: TextContext
    negative: TextContext | None
    guidance_scale: float
    weaker: tuple[WanTransformer3DModel, TextContext] | None = None


NOISE_STAGE = 0


def sample_proxy(
    expert_at: Callable[[float], Expert],
    scheduler: UniPCMultistepScheduler,
    stage: Stage,
    channels: int,
    patch: int,
    seed: int,
    resume: tuple[int, dict[str, torch.Tensor]] | None = None,
    save: SaveState | None = None,
    on_step: Callable[[], None] | None = None,
    latents: torch.Tensor | None = None,
    kernels: Kernels = EAGER,
) -> torch.Tensor:
    """Latents (channels, T, H, W) fp32 of the proxy. `expert_at` gives who works at a timestep in 0..1000.

    With time_ratio 1, positions as they are and given `latents` this is WanPipeline's own loop.
    """
    grid = stage.grid
    scheduler.set_timesteps(stage.steps)
    scheduler.set_begin_index(0)
    done = 0
    if latents is None:
        box = range(grid.t), range(grid.h * patch), range(grid.w * patch)
        latents = noise(seed, NOISE_STAGE, channels, *box)
    if resume:
        done, tensors = resume
        latents = tensors["latents"]
        _restore(scheduler, done, tensors)
    for i, timestep in enumerate(scheduler.timesteps):
        if i < done:
            continue
        # no name here holds an expert: the first is let go when the second is loaded
        velocity = _guided(expert_at(float(timestep)), patchify(latents, patch)[None], stage, timestep[None], kernels)
        velocity = unpatchify(velocity[0], grid, patch)
        latents = scheduler.step(velocity[None], timestep, latents[None], return_dict=False)[0][0]
        if save:
            save(i + 1, {"latents": latents, **_history(scheduler)})
        if on_step:
            on_step()
    return latents


@torch.no_grad()
def _guided(
    expert: Expert, tokens: torch.Tensor, stage: Stage, timestep: torch.Tensor, kernels: Kernels
) -> torch.Tensor:

    def forward(model: WanTransformer3DModel, text: TextContext) -> torch.Tensor:
        return clip_forward(model, tokens, stage.grid, timestep, text, stage.spacing, kernels)

    velocity = forward(expert.model, expert.prompt)
    if expert.guidance_scale <= 1 or expert.negative is None:
        return velocity
    base = forward(expert.model, expert.negative)
    guided = base + expert.guidance_scale * (velocity - base)
    if expert.weaker and stage.autoguidance:
        guided += stage.autoguidance * (velocity - forward(*expert.weaker))
    return guided


def _history(scheduler: UniPCMultistepScheduler) -> dict[str, torch.Tensor]:
    """What a multistep scheduler remembers between steps: past predictions, the last sample, counters."""
    tensors = {f"output.{i}": o for i, o in enumerate(scheduler.model_outputs) if o is not None}
    if scheduler.last_sample is not None:
        tensors["last_sample"] = scheduler.last_sample
    orders = [scheduler.lower_order_nums, getattr(scheduler, "this_order", 0)]
    return tensors | {"orders": torch.tensor(orders)}


def _restore(scheduler: Any, done: int, tensors: dict[str, torch.Tensor]) -> None:
    order = scheduler.config.solver_order
    scheduler.model_outputs = [tensors.get(f"output.{i}") for i in range(order)]
    past = scheduler.timesteps[max(0, done - order) : done]
    scheduler.timestep_list = [None] * (order - len(past)) + list(past)
    scheduler.last_sample = tensors.get("last_sample")
    scheduler.lower_order_nums, scheduler.this_order = tensors["orders"].tolist()
    scheduler._step_index = done
