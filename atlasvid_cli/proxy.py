"""Stage 1: the global proxy, by the base scheduler with guidance, resumable after every step (DESIGN §3)."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import UniPCMultistepScheduler, WanTransformer3DModel

from .model import TextContext, clip_forward, patchify, unpatchify
from .plan import Stage
from .schedule import noise

SaveState = Callable[[int, dict[str, torch.Tensor]], None]
NOISE_STAGE = 0


def sample_proxy(
    model: WanTransformer3DModel,
    scheduler: UniPCMultistepScheduler,
    stage: Stage,
    patch: int,
    seed: int,
    prompt: TextContext,
    negative: TextContext,
    resume: tuple[int, dict[str, torch.Tensor]] | None = None,
    save: SaveState | None = None,
    on_step: Callable[[], None] | None = None,
    latents: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Latents (C, T, H, W) fp32 of the proxy. With time_ratio 1 and given `latents` this is WanPipeline's own loop."""
    grid = stage.grid
    scheduler.set_timesteps(stage.steps)
    scheduler.set_begin_index(0)
    done = 0
    if latents is None:
        box = range(grid.t), range(grid.h * patch), range(grid.w * patch)
        latents = noise(seed, NOISE_STAGE, model.config.in_channels, *box)
    if resume:
        done, tensors = resume
        latents = tensors["latents"]
        _restore(scheduler, done, tensors)
    for i, timestep in enumerate(scheduler.timesteps):
        if i < done:
            continue
        tokens = patchify(latents, patch)[None]
        t = timestep[None]
        with torch.no_grad():
            velocity = clip_forward(model, tokens, grid, t, prompt, stage.time_ratio, backend)
            if stage.guidance_scale > 1:
                base = clip_forward(model, tokens, grid, t, negative, stage.time_ratio, backend)
                velocity = base + stage.guidance_scale * (velocity - base)
        velocity = unpatchify(velocity[0], grid, patch)
        latents = scheduler.step(velocity[None], timestep, latents[None], return_dict=False)[0][0]
        if save:
            save(i + 1, {"latents": latents, **_history(scheduler)})
        if on_step:
            on_step()
    return latents


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
