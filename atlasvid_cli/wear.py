"""Proxies with the mistakes of stage 1, for stage 2 to learn to mend: one trained on true proxies alone keeps them all.

A true proxy is noised and denoised again by stage 1's own model, without guidance (SDEdit, arXiv 2108.01073): what it
cannot draw comes out as it draws it, in the place where it was. The levels above the first have a level's result
for a proxy; the base, at the video's frame rate, stands in for what that gets wrong.
"""

import random
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from diffusers import WanTransformer3DModel

from .model import clip_forward, patchify, text_context, unpatchify
from .schedule import shift_sigma, sigmas
from .train import PATCH, TEXT_LENGTH, Embed, by_shape, grid_of

STEPS = 4
# noised to a sigma in between, before the shift: below, little changes; above, objects go elsewhere
UNSHIFTED = (0.25, 0.55)
BATCH_TOKENS = 2000


@torch.no_grad()
def wear(
    model: WanTransformer3DModel,
    latents: torch.Tensor,
    prompts: list[torch.Tensor],
    time_ratio: int,
    shift: float,
    strengths: list[float],
    generator: torch.Generator,
) -> torch.Tensor:
    """Latents (n, C, T, H, W), each noised to its own sigma of `strengths` (0..1] and denoised by Euler steps under the
    flow `shift`."""
    grid = grid_of(latents[0])
    clean, noise = (
        torch.stack([patchify(each, PATCH) for each in x])
        for x in (latents, torch.randn(latents.shape, generator=generator))
    )
    schedule = torch.tensor([sigmas(STEPS, strength, shift) for strength in strengths])[..., None, None]
    text = text_context(model, prompts, TEXT_LENGTH)
    x = torch.lerp(clean, noise, schedule[:, 0])
    for now, then in pairwise(schedule.unbind(1)):
        velocity = clip_forward(model, x, grid, (now.flatten() * 1000).floor(), text, time_ratio)
        x = x + (then - now) * velocity.float()
    return torch.stack([unpatchify(each, grid, PATCH) for each in x])


def add_worn(
    model: WanTransformer3DModel,
    data: list[dict],
    embed: Embed,
    time_ratio: int,
    shift_of: Callable[[int], float],
    on_done: Callable[[int], None] = lambda samples: None,
) -> None:
    """Gives every sample of stage 2 a worn copy, `worn_<time_ratio>` fp16, of its proxy of that time ratio: always the
    same one for the same samples."""
    source = f"proxy_{time_ratio}"
    views = [s | {"latents": s[source], "sample": s} for s in data]
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
            strengths = [shift_sigma(rng.uniform(*UNSHIFTED), shift) for _ in batch]
            worn = wear(model, latents, prompts, time_ratio, shift, strengths, generator)
            for view, each in zip(batch, worn, strict=True):
                view["sample"][f"worn_{time_ratio}"] = each.half()
            on_done(len(batch))
