"""Proxies with the mistakes of stage 1, for stage 2 to learn to mend: one trained on true proxies alone keeps them all.

A true proxy is noised and denoised again by stage 1's own model and guidance, less autoguidance (SDEdit, arXiv
2108.01073): what it cannot draw comes out as it draws it, in the place where it was. Where the whole frame is at hand
it is worn whole: an object that a crop cuts is another task. The levels above the first have a level's result for a
proxy; the base, at the video's frame rate, stands in for what that gets wrong.
"""

import random
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import pairwise

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel

from .dataset import own_part
from .enlarge import enlarge
from .machine import cpu_autocast
from .model import clip_forward, text_context, unpatchify
from .schedule import shift_sigma, sigmas
from .train import PATCH, TEXT_LENGTH, WORN, Embed, by_shape, grid_of, patchified
from .vae_cost import space_factor, time_factor

STEPS = 4
# noised to a sigma in between, before the shift: below, little changes; above, objects go elsewhere
UNSHIFTED = (0.25, 0.55)
BATCH_TOKENS = 2000


def add_enlarged(
    vae: AutoencoderKLWan,
    data: list[dict],
    time_ratio: int,
    on_done: Callable[[int], None] = lambda samples: None,
) -> None:
    """Gives every sample of stage 2 that has a proxy of that time ratio what a level starts from in pixels (`enlarge`),
    latents `enlarged_<time_ratio>` fp16, made from its worn proxy or its true one; it keeps that one alone. By the
    VAE's own encoder, which an `entry` imitates."""
    proxy, worn = f"proxy_{time_ratio}", f"worn_{time_ratio}"
    rng = random.Random(f"enlarged/{time_ratio}")
    for sample in data:
        on_done(1)
        if proxy not in sample:
            continue
        if worn in sample and rng.random() < WORN:
            sample[proxy] = sample[worn]
        sample.pop(worn, None)
        _, frames, height, width = sample["latents"].shape
        factor = space_factor(vae.config)
        size, count = (height * factor, width * factor), (frames - 1) * time_factor(vae.config) + 1
        with cpu_autocast():
            made = enlarge(vae, sample[proxy].float(), Fraction(sample["ratio"]), time_ratio, size, count)
        sample[f"enlarged_{time_ratio}"] = made.half()


@torch.no_grad()
def wear(
    model: WanTransformer3DModel,
    latents: torch.Tensor,
    prompts: list[torch.Tensor],
    time_ratio: int,
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
        velocity = clip_forward(model, x, grid, timestep, text, time_ratio).float()
        if away is not None:
            base = clip_forward(model, x, grid, timestep, away, time_ratio).float()
            velocity = base + guidance_scale * (velocity - base)
        x = x + (then - now) * velocity
    return torch.stack([unpatchify(each, grid, PATCH) for each in x])


def add_worn(
    model: WanTransformer3DModel,
    data: list[dict],
    embed: Embed,
    time_ratio: int,
    shift_of: Callable[[int], float],
    on_done: Callable[[int], None] = lambda samples: None,
    guidance_scale: float = 1.0,
    negative: str = "",
    largest: float = 1.0,
) -> None:
    """Gives every sample of stage 2 that has a proxy of that time ratio a worn copy of it, `worn_<time_ratio>` fp16:
    always the same one for the same samples, noised to sigmas of `largest` at most."""
    proxy, whole = f"proxy_{time_ratio}", f"whole_{time_ratio}"
    views = [s | {"latents": s[whole if whole in s else proxy], "sample": s} for s in data if proxy in s]
    for group in by_shape(views):
        c, t, h, w = group[0]["latents"].shape
        together = max(1, BATCH_TOKENS * PATCH**2 // (t * h * w))
        for first in range(0, len(group), together):
            batch: Sequence[dict] = group[first : first + together]
            rng = random.Random(f"worn/{time_ratio}/{c, t, h, w}/{first}")
            generator = torch.Generator().manual_seed(rng.getrandbits(60))
            latents = torch.stack([s["latents"].float() for s in batch])
            prompts = [embed(s["caption"]) for s in batch]
            shift = shift_of(t)
            strengths = [min(largest, shift_sigma(rng.uniform(*UNSHIFTED), shift)) for _ in batch]
            schedules = [sigmas(STEPS, strength, shift) for strength in strengths]
            worn = wear(model, latents, prompts, time_ratio, schedules, generator, guidance_scale, embed(negative))
            for sample, each in zip((view["sample"] for view in batch), worn, strict=True):
                sample[f"worn_{time_ratio}"] = (own_part(sample, each) if whole in sample else each).half()
            on_done(len(batch))
