"""Trains the embedded model's transformer from nothing, and LoRA adapters of both stages, by flow matching.

Samples come precomputed from `dataset`.
"""

import json
import math
import random
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig, get_peft_model_state_dict

from .loop import Run, run
from .model import clip_forward, patchify, text_context
from .presets import Detail, Proxy
from .schedule import shift_sigma, unshift_sigma, upsample
from .shapes import NATIVE, Grid, Spacing
from .streams import Alignment, detail_forward, proxy_context
from .tensor_file import save_tensors

TEXT_LENGTH = 512
PATCH = 2
PROXY_DROP, TEXT_DROP = 0.05, 0.1  # DESIGN §4, so that guidance can act on either
PROXY_NOISE = 0.25  # the largest sigma that the proxy is noised with, so that an imperfect one still guides
OBJECT_WEIGHT = 2.0  # added to the weight of tokens near the object, where a sample tells which those are
WORN = 0.5  # how often the proxy is a worn one, where the sample has one (`wear`)
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]

Embed = Callable[[str], torch.Tensor]


def recipe() -> list[Any]:
    """What decides a training beside its settings: a checkpoint of another one is not gone on with."""
    return [TEXT_LENGTH, PROXY_DROP, TEXT_DROP, PROXY_NOISE, OBJECT_WEIGHT, WORN, LORA_TARGETS]


def lora_config(rank: int) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=rank, target_modules=LORA_TARGETS, init_lora_weights=True)


def draw_sigma(
    generator: torch.Generator, shift: float, largest: float = 1.0, within: tuple[float, float] = (0.0, 1.0)
) -> float:
    """A logit-normal sigma under the flow-matching time shift, scaled to 0..`largest` and rounded as schedulers do to a
    whole timestep; of the same distribution the part `within` two sigmas."""
    normal = torch.randn((), generator=generator)
    if within != (0.0, 1.0):
        low, high = (torch.special.ndtr(torch.logit(torch.tensor(unshift_sigma(s, shift)))) for s in within)
        normal = torch.special.ndtri(low + (high - low) * torch.special.ndtr(normal))
    timestep = int(1000 * largest * shift_sigma(torch.sigmoid(normal).item(), shift))
    return max(1, math.ceil(1000 * within[0]), timestep) / 1000


def grid_of(latents: torch.Tensor) -> Grid:
    _, t, h, w = latents.shape
    return Grid(t, h // PATCH, w // PATCH)


def clip_loss(
    model: WanTransformer3DModel,
    samples: list[torch.Tensor],
    prompts: list[torch.Tensor],
    generator: torch.Generator,
    spacing: Spacing,
    shift: float,
    near: torch.Tensor | None = None,
    within: tuple[float, float] = (0.0, 1.0),
) -> torch.Tensor:
    """Flow-matching loss of stage 1 on latents of one shape, at sigmas `within` two: predict noise - latents. `near`:
    see `_weighted`."""
    clean = patchified(torch.stack(samples))
    noise = torch.randn(clean.shape, generator=generator)
    sigma = torch.tensor([draw_sigma(generator, shift, within=within) for _ in samples])
    noisy = torch.lerp(clean, noise, sigma.view(-1, 1, 1))
    text = text_context(model, prompts, TEXT_LENGTH)
    out = clip_forward(model, noisy, grid_of(samples[0]), (sigma * 1000).round(), text, spacing)
    return _weighted((out - (noise - clean)).square(), near)


def _weighted(errors: torch.Tensor, near: torch.Tensor | None) -> torch.Tensor:
    """The mean of errors (n, L, P), those of tokens `near` (n, 1, T, h, w) the object counting more: in what is logged
    and validated too."""
    weights = torch.ones(errors.shape[:2]) if near is None else 1 + OBJECT_WEIGHT * near.flatten(1)
    return (errors.mean(-1) * weights).sum() / weights.sum()


def _near(samples: Sequence[dict], length: int) -> torch.Tensor | None:
    """Of the first latent frames of samples, what their data tells (`dataset.near`), or None."""
    if any("near" not in s for s in samples):
        return None
    return torch.stack([s["near"][:, :length].float() for s in samples])


def detail_loss(
    model: WanTransformer3DModel,
    proxy_model: WanTransformer3DModel,
    samples: Sequence[dict],
    prompts: list[torch.Tensor],
    rng: random.Random,
    generator: torch.Generator,
    detail: Detail,
    proxy_time_ratio: int,
    highest: float = 1.0,
) -> torch.Tensor:
    """Loss of stage 2 on crops of one kind (`by_kind`) with their aligned proxies, as the first detail level meets them
    or as an upper one does: either where they have both proxies.

    The level's path is straight from where its sampling starts, the proxy made as large and noised to the level's
    strength, to the truth (as from degraded videos in FlashVideo, arXiv 2502.05179): what upsampling adds, such as an
    object that is in two places at once, is there to be taken away. At strength 1, and without a proxy, that is plain
    flow matching, at sigmas of `highest` at most.
    """
    levels = ((detail.first, proxy_time_ratio), (detail.upper, 1))
    level, time_ratio = rng.choice([(level, r) for level, r in levels if f"proxy_{r}" in samples[0]])
    true, worn, enlarged = (f"{name}_{time_ratio}" for name in ("proxy", "worn", "enlarged"))
    latents, ratio = torch.stack([s["latents"].float() for s in samples]), Fraction(samples[0]["ratio"])
    proxies = torch.stack([s[worn if worn in s and rng.random() < WORN else true].float() for s in samples])
    noise = torch.randn(latents.shape, generator=generator)
    strengths = torch.tensor([rng.random() * PROXY_NOISE for _ in samples]).view(-1, 1, 1, 1, 1)
    proxies = torch.lerp(proxies, torch.randn(proxies.shape, generator=generator), strengths)
    keep_proxy = rng.random() >= PROXY_DROP
    strength, context, start = 1.0, None, noise
    if keep_proxy or proxy_model is not model:  # an adapter of the proxy stream alone has nothing to learn without
        strength = level.strength
        if level.upsample == "pixels" and enlarged in samples[0]:
            low = torch.stack([s[enlarged].float() for s in samples])
        else:
            low = torch.stack([upsample(p, ratio, time_ratio, _box(latents[0])) for p in proxies])
        start = torch.lerp(low, noise, strength)
        context = proxy_context(
            proxy_model,
            patchified(proxies),
            grid_of(proxies[0]),
            text_context(proxy_model, prompts, TEXT_LENGTH),
            Alignment.of(detail, ratio, time_ratio),
        )
    within = 0.0, min(1.0, highest / strength)
    sigma = torch.tensor([draw_sigma(generator, detail.flow_shift, strength, within) for _ in samples])
    clean, begun = patchified(latents), patchified(start)
    out = detail_forward(
        model,
        torch.lerp(clean, begun, (sigma / strength).view(-1, 1, 1)),
        grid_of(latents[0]),
        (sigma * 1000).round(),
        text_context(model, prompts, TEXT_LENGTH),
        context,
        detail.layouts,
        chunk=64 * len(samples),
        phase=rng.randrange(len(detail.layouts)),
    )
    return _weighted((out - (begun - clean) / strength).square(), _near(samples, latents.shape[2]))


def patchified(latents: torch.Tensor) -> torch.Tensor:
    """Latents (n, C, T, H, W) -> tokens (n, L, P)."""
    return torch.stack([patchify(each, PATCH) for each in latents])


def _box(latents: torch.Tensor) -> tuple[range, range, range]:
    t, h, w = latents.shape[1:]
    return range(t), range(h), range(w)


def by_shape(data: list[dict]) -> list[list[dict]]:
    """Samples in groups whose latents have one shape, so that they can share a batch."""
    groups: dict[tuple, list[dict]] = {}
    for sample in data:
        groups.setdefault(tuple(sample["latents"].shape), []).append(sample)
    return [groups[shape] for shape in sorted(groups)]


def draw_batch(groups: list[list[dict]], rng: random.Random, tokens: int) -> tuple[list[dict], list[torch.Tensor]]:
    """Samples of one shape, drawn by how many have it, and their latents, which hold about `tokens` tokens in all.

    Half of the batches of clips are cut to a shorter length: a causal VAE's prefix is a shorter clip.
    """
    group = rng.choices(groups, [len(g) for g in groups])[0]
    grid = grid_of(group[0]["latents"])
    length = rng.randint(2, grid.t) if grid.t > 1 and rng.random() < 0.5 else grid.t
    picked = rng.choices(group, k=max(1, tokens // (length * grid.h * grid.w)))
    return picked, [s["latents"][:, :length].float() for s in picked]


def by_kind(data: list[dict]) -> list[list[dict]]:
    """Crops of stage 2 in groups of one shape and ratio that have the same proxies, so that they can share a batch."""
    groups: dict[str, list[dict]] = {}
    for sample in data:
        used = sorted(name for name in sample if name.split("_")[0] in ("latents", "proxy", "worn", "enlarged"))
        groups.setdefault(f"{sample['ratio']} {[(name, *sample[name].shape) for name in used]}", []).append(sample)
    return [groups[kind] for kind in sorted(groups)]


def draw_crops(groups: list[list[dict]], rng: random.Random, time_ratio: int) -> list[dict]:
    """Crops of one kind, drawn by how many are of it, and of one length, with proxies as long: as many as hold half the
    tokens of the largest one, and at least one.

    Every length that the proxy can have is as likely, a still too: several stills show more than a clip of their cost.
    """
    grids = [grid_of(group[0]["latents"]) for group in groups]
    length = rng.choice(range(1, max(grid.t for grid in grids) + 1, time_ratio))
    long_enough = [(group, grid) for group, grid in zip(groups, grids, strict=True) if grid.t >= length]
    group, grid = rng.choices(long_enough, [len(group) for group, _ in long_enough])[0]
    sparse = (length - 1) // time_ratio + 1
    lengths = {"latents": length, "enlarged_1": length, f"enlarged_{time_ratio}": length} | {
        f"{kind}_{r}": n for kind in ("proxy", "worn") for r, n in ((1, length), (time_ratio, sparse))
    }
    together = max(1, max(grid.tokens for grid in grids) // (2 * length * grid.h * grid.w))
    return [
        picked | {name: picked[name][:, :n] for name, n in lengths.items() if name in picked}
        for picked in rng.sample(group, min(len(group), together))
    ]


def pick_prompt(sample: dict, embed: Embed, rng: random.Random) -> torch.Tensor:
    return embed("" if rng.random() < TEXT_DROP else sample["caption"])


def train_clips(
    model: WanTransformer3DModel,
    told: Run,
    images: list[dict],
    clips: list[dict],
    embed: Embed,
    *,
    tokens: int,
    spacing: Spacing = NATIVE,
    stills: tuple[float, float] = (0.0, 0.0),
    shift_of: Callable[[int], float] = lambda latents: 3.0,
    within: tuple[float, float] = (0.0, 1.0),
) -> None:
    """Stage 1 training on clips, and on single `images` at a share of draws going from `stills[0]` to `stills[1]`.

    A draw is a batch of about `tokens` tokens; `shift_of` gives a clip's shift by its latent frames, and sigmas lie
    `within` two.
    """
    stills_by_shape, clips_by_shape = by_shape(images), by_shape(clips)

    def loss_at(step: int, rng: random.Random, generator: torch.Generator) -> torch.Tensor:
        still = rng.random() < stills[0] + (stills[1] - stills[0]) * step / told.steps
        picked, latents = draw_batch(stills_by_shape if still else clips_by_shape, rng, tokens)
        prompts = [pick_prompt(s, embed, rng) for s in picked]
        length = latents[0].shape[1]
        return clip_loss(model, latents, prompts, generator, spacing, shift_of(length), _near(picked, length), within)

    def held_out_loss(sample: dict, rng: random.Random, generator: torch.Generator) -> torch.Tensor:
        latents, prompts = sample["latents"].float(), [embed(sample["caption"])]
        length = latents.shape[1]
        figures = spacing, shift_of(length), _near([sample], length), within
        return clip_loss(model, [latents], prompts, generator, *figures)

    run(model, told, loss_at, held_out_loss)


def train_detail(
    model: WanTransformer3DModel,
    proxy_model: WanTransformer3DModel,
    told: Run,
    data: list[dict],
    embed: Embed,
    detail: Detail,
    *,
    time_ratio: int = 4,
    highest: float = 1.0,
) -> None:
    """Stage 2 training of `proxy_model`, which is `model` itself where the adapter acts on both streams, at sigmas of
    `highest` at most."""
    groups = by_kind(data)

    def loss_at(step: int, rng: random.Random, generator: torch.Generator) -> torch.Tensor:
        crops = draw_crops(groups, rng, time_ratio)
        prompts = [pick_prompt(s, embed, rng) for s in crops]
        return detail_loss(model, proxy_model, crops, prompts, rng, generator, detail, time_ratio, highest)

    def held_out_loss(sample: dict, rng: random.Random, generator: torch.Generator) -> torch.Tensor:
        prompts = [embed(sample["caption"])]
        return detail_loss(model, proxy_model, [sample], prompts, rng, generator, detail, time_ratio, highest)

    run(proxy_model, told, loss_at, held_out_loss)


def adapter_metadata(
    stage: str,
    base: str,
    proxy: Proxy,
    ratios: Iterable[Any] = (),
    windows: Sequence[Sequence[int]] = (),
    streams: str = "both",
) -> dict[str, str]:
    """What an adapter says of itself: its stage, the hash of the base that it fits, and what it was trained for."""
    metadata = {"stage": stage, "base": base}
    if stage == "proxy":
        return metadata | proxy.trained_for
    return metadata | {
        "time_ratio": f"{proxy.time_ratio},1",
        "ratio": ",".join(map(str, sorted(set(ratios)))),
        "windows": json.dumps(windows),
        "streams": streams,
    }


def save_adapter(model: WanTransformer3DModel, path: Path, metadata: dict[str, str]) -> None:
    """The active LoRA in the layout that `WanPipeline.load_lora_weights` reads, fp16."""
    state = get_peft_model_state_dict(model, adapter_name="default")
    rank = next(v.shape[0] for k, v in state.items() if "lora_A" in k)
    assert math.isclose(model.peft_config["default"].lora_alpha, rank)  # so that no scale needs to be stored
    save_tensors(path, {f"transformer.{k}": v.half() for k, v in state.items()}, metadata)
