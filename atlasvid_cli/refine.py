"""Stage 2: a detail level, all windows of the video jointly, guided by the level below (DESIGN §4)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from diffusers import WanTransformer3DModel

from .block import EAGER, Kernels
from .model import Alignment, ProxyContext, TextContext, detail_forward, patchify, proxy_context, unpatchify
from .presets import Detail
from .schedule import noise, sigmas, upsample
from .shapes import Grid, Shape, proxy_grid, with_halo
from .stages import Stage
from .tensor_file import SaveState


@dataclass(frozen=True)
class Region:
    """The part that is sampled again: tokens `start`..`end` (t, h, w) of a finished video's latents (C, T, H, W)."""

    start: Shape
    end: Shape
    latents: torch.Tensor


def crop_to_stage(latents: torch.Tensor, stage: Stage, patch: int) -> torch.Tensor:
    """The part of the level below that this stage's grid is aligned with."""
    below = proxy_grid(stage.grid, stage.ratio, stage.time_ratio)
    return latents[:, : below.t, : below.h * patch, : below.w * patch].contiguous()


def sample_detail(
    model: WanTransformer3DModel,
    proxy_model: WanTransformer3DModel,
    stage: Stage,
    detail: Detail,
    patch: int,
    seed: int,
    level: int,
    below: torch.Tensor,
    texts: list[tuple[TextContext, TextContext]],
    *,
    chunk: int,
    region: Region | None = None,
    resume: tuple[int, dict[str, torch.Tensor]] | None = None,
    save: SaveState | None = None,
    on_block: Callable[[], None] = lambda: None,
    kernels: Kernels = EAGER,
    states: torch.device | None = None,
    enlarged: torch.Tensor | None = None,
) -> torch.Tensor:
    """Latents (C, T, H, W) fp32 of a detail level above the latents `below`.

    A level of a strength below 1 starts from `enlarged`, the level below made as large in pixels (`enlarge`), or
    without it from `below` interpolated.

    `texts` holds the prompt, and with guidance the negative prompt, for (detail model, proxy model); where the two take
    one forward, both in one context. Euler steps in place on the tokens: beside them live a hidden state for each
    prompt of a forward, a velocity (two with guidance) and the proxy's keys and values, on `states` (by default where
    the model computes). With `region`, its surroundings go straight from where they start to the finished video.
    `on_block` is called as often for each prompt as a forward has blocks.
    """
    grid = stage.grid
    below = crop_to_stage(below, stage, patch)

    def guides(timestep: float, texts: Sequence[tuple[TextContext, TextContext]]) -> list[ProxyContext | None]:
        if not detail.proxy_attention:
            return [None] * len(texts)
        _, t, h, w = below.shape
        tokens, below_grid = patchify(below, patch), Grid(t, h // patch, w // patch)
        figures = Alignment.of(detail, stage.ratio, stage.time_ratio), timestep, kernels, states
        each = ((text, tokens.expand(len(text.bias), -1, -1)) for _, text in texts)
        return [proxy_context(proxy_model, many, below_grid, text, *figures) for text, many in each]

    def told(prompts: int) -> None:
        for _ in range(prompts):
            on_block()

    with torch.no_grad():
        proxies = guides(0.0, texts) if detail.clean_proxy else []
    alone = [(texts[0][0].first(), texts[0][1].first())]

    origin, end = (0, 0, 0), (grid.t, grid.h, grid.w)
    if region:
        origin, end = with_halo(region.start, region.end, grid, detail.halo)
    part = Grid(*(b - a for a, b in zip(origin, end, strict=True)))
    steps = (1, patch, patch)
    ranges = [range(a * p, b * p) for a, b, p in zip(origin, end, steps, strict=True)]
    schedule = sigmas(stage.steps, stage.strength, stage.flow_shift)

    x = _start(stage, below, enlarged, ranges, patch, seed, level)
    frozen = known = start = torch.empty(0)
    if region:
        known = patchify(_box(region.latents, ranges), patch)
        frozen = ~_inside(region, origin, part)
        start = x.clone()

    done = 0
    if resume:
        done, tensors = resume
        x = tensors["tokens"]
    for i in range(done, stage.steps):
        now, following = schedule[i], schedule[i + 1]
        if region:
            x[frozen] = torch.lerp(known, start, now / schedule[0])[frozen]
        guided = stage.is_guided(now)
        prompts = texts if guided else alone
        velocities: list[torch.Tensor] = []  # the prompt's, and with guidance the negative prompt's
        with torch.no_grad():
            if not detail.clean_proxy:
                proxies.clear()  # never twice in memory
                proxies += guides(int(now * 1000), prompts)
            shown = proxies if guided else [p and p.first() for p in proxies[:1]]
            for (text, _), proxy in zip(prompts, shown, strict=True):
                velocities += detail_forward(
                    model,
                    x.expand(len(text.bias), -1, -1),
                    part,
                    int(now * 1000),
                    text,
                    proxy,
                    detail.layouts,
                    chunk,
                    i,
                    origin,
                    kernels,
                    states,
                    partial(told, len(text.bias)),
                )
        velocity = velocities.pop()
        if guided:
            velocity.lerp_(velocities.pop(), stage.guidance_scale)
        x.add_(velocity, alpha=following - now)
        if save:
            save(i + 1, {"tokens": x})
    if region:
        latents = region.latents.clone()
        at = tuple(slice(r.start, r.stop) for r in ranges)
        latents[:, *at] = unpatchify(torch.where(frozen[:, None], known, x), part, patch)
        return latents
    return unpatchify(x, grid, patch)


def _start(
    stage: Stage,
    below: torch.Tensor,
    enlarged: torch.Tensor | None,
    ranges: Sequence[range],
    patch: int,
    seed: int,
    level: int,
) -> torch.Tensor:
    """The tokens (L, P) that a level's `ranges` of latents (t, h, w) start from.

    A latent frame at a time, so that noise and upsampling never exist for the whole video.
    """
    times, rows, columns = ranges
    a_frame = len(rows) * len(columns) // patch**2
    x = torch.empty(len(times) * a_frame, len(below) * patch**2)
    for i, t in enumerate(times):
        box = (range(t, t + 1), rows, columns)
        frame = noise(seed, level, len(below), *box)
        if stage.strength < 1:
            low = upsample(below, stage.ratio, stage.time_ratio, box) if enlarged is None else _box(enlarged, box)
            frame = torch.lerp(low, frame, stage.strength)
        x[i * a_frame : (i + 1) * a_frame] = patchify(frame, patch)
    return x


def _box(latents: torch.Tensor, ranges: Sequence[range]) -> torch.Tensor:
    t, h, w = (slice(r.start, r.stop) for r in ranges)
    return latents[:, t, h, w].contiguous()


def _inside(region: Region, origin: Shape, part: Grid) -> torch.Tensor:
    """Whether each token of the computed part, in raster order, lies in the region."""
    axes = []
    for size, first, low, high in zip((part.t, part.h, part.w), origin, region.start, region.end, strict=True):
        at = torch.arange(size) + first
        axes.append((at >= low) & (at < high))
    return (axes[0][:, None, None] & axes[1][:, None] & axes[2]).flatten()
