"""Proxies with the mistakes of stage 1, for stage 2 to learn to mend: one trained on true proxies alone keeps them all.

A true proxy is noised and denoised again by stage 1's own model and guidance, less autoguidance (SDEdit, arXiv
2108.01073): what it cannot draw comes out as it draws it, in the place where it was. Where the whole frame is at hand
it is worn whole: an object that a crop cuts is another task. The levels above the first have a level's result for a
proxy; the base, at the video's frame rate, stands in for what that gets wrong.
"""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel

from .console import Console
from .dataset import own_part
from .enlarge import enlarge
from .errors import InputError
from .loop import CHECKPOINT_SECONDS
from .machine import cpu_autocast
from .model import clip_forward, text_context, unpatchify
from .schedule import shift_sigma, sigmas
from .shapes import Spacing
from .store import run_directory
from .tensor_file import open_tensors, save_tensors
from .train import PATCH, TEXT_LENGTH, WORN, Embed, by_shape, grid_of, patchified
from .vae_cost import space_factor, time_factor

STEPS = 4
# noised to a sigma in between, before the shift: below, little changes; above, objects go elsewhere
UNSHIFTED = (0.25, 0.55)
BATCH_TOKENS = 2000


@dataclass(frozen=True)
class Stage1:
    """How stage 1 makes proxies of a time ratio, that of its `spacing`, and so wears them: by the base with an
    `adapter` or without, at the flow shift that `shift_of` gives a clip by its latent frames, guided away from
    `negative` where `guidance_scale` is above 1, from sigmas of `largest` at most."""

    spacing: Spacing
    shift_of: Callable[[int], float]
    adapter: str | None = None
    guidance_scale: float = 1.0
    negative: str = ""
    largest: float = 1.0


def recipe() -> list[Any]:
    """What decides worn proxies beside weights, samples and how stage 1 makes them."""
    return [STEPS, UNSHIFTED, BATCH_TOKENS, WORN]


def complete_proxies(
    folder: Path,
    data: list[dict],
    embed: Embed,
    stage1: Stage1,
    model: Callable[[], WanTransformer3DModel],
    vae: Callable[[], AutoencoderKLWan] | None,
    console: Console,
) -> None:
    """Gives samples of stage 2 the worn proxies of a time ratio, by stage 1's `model`, and with a `vae` what a level
    starts from in pixels, which leaves them one proxy (`settle_worn`). Both are kept in `folder` as they are made, and
    what makes them is loaded where some are missing."""
    time_ratio = stage1.spacing.time
    run_directory(folder.parent, folder.name)

    def wear_them(on_done: Callable[[int], None]) -> None:
        add_worn(model(), data, embed, stage1, on_done)

    complete(folder / "worn.safetensors", data, "worn", time_ratio, wear_them, console)
    if vae is None:
        return

    def enlarge_them(on_done: Callable[[int], None]) -> None:
        add_enlarged(vae(), data, time_ratio, on_done)

    settle_worn(data, time_ratio)
    complete(folder / "enlarged.safetensors", data, "enlarged", time_ratio, enlarge_them, console)


def complete(
    path: Path,
    data: list[dict],
    kind: str,
    time_ratio: int,
    add: Callable[[Callable[[int], None]], None],
    console: Console,
) -> None:
    """Gives the samples that have a proxy of that time ratio what `path` holds of a `kind`, `worn` or `enlarged`, and
    lets `add(on_done)` make the rest: kept there every few minutes, so that an interruption costs no more."""
    name = f"{kind}_{time_ratio}"
    try:
        kept = open_tensors(path)[0]
    except InputError:  # missing, or damaged
        kept = {}
    for i, tensor in kept.items():
        data[int(i)][name] = tensor
    wanted = [s for s in data if f"proxy_{time_ratio}" in s]
    saved = time.monotonic()

    def save() -> None:
        nonlocal saved
        save_tensors(path, {str(i): s[name] for i, s in enumerate(data) if name in s}, {})
        saved = time.monotonic()

    if len(kept) < len(wanted):
        with console.stage(f"{kind} proxies", len(wanted)) as advance:

            def on_done(samples: int) -> None:
                advance(samples)
                if time.monotonic() - saved > CHECKPOINT_SECONDS:
                    save()

            advance(len(kept), before=True)
            add(on_done)
        save()


def settle_worn(data: list[dict], time_ratio: int) -> None:
    """Leaves every sample one proxy of that time ratio, its worn one or its true one, as what is made of it is made of
    one: always the same choice."""
    proxy, worn = f"proxy_{time_ratio}", f"worn_{time_ratio}"
    rng = random.Random(f"enlarged/{time_ratio}")
    for sample in data:
        if worn in sample:
            taken = sample.pop(worn)
            if rng.random() < WORN:
                sample[proxy] = taken


def add_enlarged(
    vae: AutoencoderKLWan,
    data: list[dict],
    time_ratio: int,
    on_done: Callable[[int], None] = lambda samples: None,
) -> None:
    """Gives every sample of stage 2 that has a proxy of that time ratio what a level starts from in pixels (`enlarge`),
    latents `enlarged_<time_ratio>` fp16, where it lacks that, made from the proxy that it was left with
    (`settle_worn`). By the VAE's own encoder, which an `entry` imitates."""
    proxy, enlarged = f"proxy_{time_ratio}", f"enlarged_{time_ratio}"
    for sample in data:
        if proxy not in sample or enlarged in sample:
            continue
        _, frames, height, width = sample["latents"].shape
        factor = space_factor(vae.config)
        size, count = (height * factor, width * factor), (frames - 1) * time_factor(vae.config) + 1
        with cpu_autocast():
            made = enlarge(vae, sample[proxy].float(), Fraction(sample["ratio"]), time_ratio, size, count)
        sample[enlarged] = made.half()
        on_done(1)


@torch.no_grad()
def wear(
    model: WanTransformer3DModel,
    latents: torch.Tensor,
    prompts: list[torch.Tensor],
    spacing: Spacing,
    schedules: list[list[float]],
    generator: torch.Generator,
    guidance_scale: float = 1.0,
    negative: torch.Tensor | None = None,
) -> torch.Tensor:
    """Latents (n, C, T, H, W), each noised to the first of its own falling sigmas (0..1] and denoised by Euler steps
    along them; a `guidance_scale` above 1 guides away from `negative`."""
    grid = grid_of(latents[0])
    clean, noise = (patchified(x) for x in (latents, torch.randn(latents.shape, generator=generator)))
    schedule = torch.tensor(schedules)[..., None, None]
    x = torch.lerp(clean, noise, schedule[:, 0])
    text = text_context(model, prompts, TEXT_LENGTH)
    away = None if guidance_scale == 1 or negative is None else text_context(model, [negative] * len(x), TEXT_LENGTH)
    for now, then in pairwise(schedule.unbind(1)):
        timestep = (now.flatten() * 1000).floor()
        velocity = clip_forward(model, x, grid, timestep, text, spacing).float()
        if away is not None:
            base = clip_forward(model, x, grid, timestep, away, spacing).float()
            velocity = base + guidance_scale * (velocity - base)
        x = x + (then - now) * velocity
    return torch.stack([unpatchify(each, grid, PATCH) for each in x])


def add_worn(
    model: WanTransformer3DModel,
    data: list[dict],
    embed: Embed,
    stage1: Stage1,
    on_done: Callable[[int], None] = lambda samples: None,
) -> None:
    """Gives every sample of stage 2 that has a proxy of that time ratio a worn copy of it, `worn_<time_ratio>` fp16,
    where it lacks one: always the same one for the same samples. `on_done` gets how many are newly made."""
    time_ratio = stage1.spacing.time
    proxy, worn, whole = (f"{name}_{time_ratio}" for name in ("proxy", "worn", "whole"))
    views = [s | {"latents": s[whole if whole in s else proxy], "sample": s} for s in data if proxy in s]
    for group in by_shape(views):
        c, t, h, w = group[0]["latents"].shape
        together = max(1, BATCH_TOKENS * PATCH**2 // (t * h * w))
        for first in range(0, len(group), together):
            batch: Sequence[dict] = group[first : first + together]
            if all(worn in view for view in batch):
                continue
            rng = random.Random(f"worn/{time_ratio}/{c, t, h, w}/{first}")
            generator = torch.Generator().manual_seed(rng.getrandbits(60))
            latents = torch.stack([s["latents"].float() for s in batch])
            prompts = [embed(s["caption"]) for s in batch]
            shift = stage1.shift_of(t)
            strengths = [min(stage1.largest, shift_sigma(rng.uniform(*UNSHIFTED), shift)) for _ in batch]
            schedules = [sigmas(STEPS, strength, shift) for strength in strengths]
            guidance = stage1.guidance_scale, embed(stage1.negative)
            made = wear(model, latents, prompts, stage1.spacing, schedules, generator, *guidance)
            for sample, each in zip((view["sample"] for view in batch), made, strict=True):
                sample[worn] = (own_part(sample, each) if whole in sample else each).half()
            on_done(len(batch))
