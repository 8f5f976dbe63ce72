"""Stage 2: a detail level, all windows of the video jointly, guided by the level below (DESIGN §4)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

import torch
from diffusers import WanTransformer3DModel

from .block import EAGER, Kernels
from .model import TextContext, patchify, unpatchify
from .presets import Detail
from .schedule import noise, sigmas, upsample
from .shapes import Grid, Shape, proxy_grid, with_halo
from .stages import Stage
from .streams import Alignment, Guide, ProxyStream, detail_forward, proxy_context
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


class Stream(NamedTuple):
    """Who computes one of the two streams: a model, and as it sees them the prompt and with guidance the negative
    prompt; where the two take one forward, both in one context."""

    model: WanTransformer3DModel
    texts: Sequence[TextContext]

    def unguided(self) -> "Stream":
        """The prompt alone."""
        return Stream(self.model, [self.texts[0].first()])


@dataclass(frozen=True)
class _Field:
    """The velocity of a level at any state: of its tokens `part`, from `origin` on, above the latents `below`."""

    stream: Stream
    proxy_stream: Stream
    stage: Stage
    detail: Detail
    patch: int
    below: torch.Tensor
    part: Grid
    origin: Shape
    chunk: int
    on_block: Callable[[int], None]
    kernels: Kernels
    states: torch.device | None
    keeps: bool

    def guides(self, timestep: float, shown: Stream) -> list[Guide | None]:
        """What each forward of `shown` sees of the level below."""
        if not self.detail.proxy_attention:
            return [None] * len(shown.texts)
        _, t, h, w = self.below.shape
        tokens, grid = patchify(self.below, self.patch), Grid(t, h // self.patch, w // self.patch)
        alignment = Alignment.of(self.detail, self.stage.ratio, self.stage.time_ratio)
        figures = alignment, timestep, self.kernels, self.states
        each = ((text, tokens.expand(len(text.bias), -1, -1)) for text in shown.texts)
        make = proxy_context if self.keeps else ProxyStream
        return [make(shown.model, many, grid, text, *figures) for text, many in each]

    @cached_property
    def clean(self) -> list[Guide | None]:
        """Guides at timestep 0, which serve all steps."""
        return self.guides(0.0, self.proxy_stream)

    def at(self, step: int, sigma: float, x: torch.Tensor) -> torch.Tensor:
        """The velocity (L, P) of the tokens `x` at a `sigma`, whose timestep is rounded down."""
        guided, timestep = self.stage.is_guided(sigma), int(sigma * 1000)
        shown, proxy_shown = (s if guided else s.unguided() for s in (self.stream, self.proxy_stream))
        if not self.detail.clean_proxy:
            proxies = self.guides(timestep, proxy_shown)
        else:
            proxies = self.clean if guided else [p and p.first() for p in self.clean[:1]]
        velocities: list[torch.Tensor] = []  # the prompt's, and with guidance the negative prompt's
        for text, proxy in zip(shown.texts, proxies, strict=True):
            many = len(text.bias)
            velocities += detail_forward(
                shown.model,
                x.expand(many, -1, -1),
                self.part,
                timestep,
                text,
                proxy,
                self.detail.layouts,
                self.chunk,
                phase=step,
                origin=self.origin,
                kernels=self.kernels,
                states=self.states,
                on_block=partial(self.on_block, many),
            )
        velocity, *negative = velocities
        return negative[0].lerp_(velocity, self.stage.guidance_scale) if guided else velocity


@torch.no_grad()
def sample_detail(
    stream: Stream,
    proxy_stream: Stream,
    stage: Stage,
    detail: Detail,
    patch: int,
    seed: int,
    level: int,
    below: torch.Tensor,
    *,
    chunk: int,
    region: Region | None = None,
    resume: tuple[int, dict[str, torch.Tensor]] | None = None,
    save: SaveState | None = None,
    on_block: Callable[[int], None] = lambda prompts: None,
    kernels: Kernels = EAGER,
    states: torch.device | None = None,
    keeps: bool = True,
    enlarged: torch.Tensor | None = None,
) -> torch.Tensor:
    """Latents (C, T, H, W) fp32 of a detail level above the latents `below`.

    A level of a strength below 1 starts from `enlarged`, the level below made as large in pixels (`enlarge`), or
    without it from `below` interpolated.

    Euler steps in place on the tokens: beside them live a hidden state for each prompt of a forward, a velocity (two
    with guidance) and the proxy's keys and values, on `states` (by default where the model computes), of all blocks or,
    unless it `keeps` them, of one: then the proxy stream is computed again beside every forward. With `region`,
    its surroundings go straight from where they start to the finished video. `on_block` gets the number of prompts that
    a block was computed for.
    """
    grid = stage.grid
    below = crop_to_stage(below, stage, patch)
    origin, end = (0, 0, 0), (grid.t, grid.h, grid.w)
    if region:
        origin, end = with_halo(region.start, region.end, grid, detail.halo)
    part = Grid(*(b - a for a, b in zip(origin, end, strict=True)))
    ranges = [range(a * p, b * p) for a, b, p in zip(origin, end, (1, patch, patch), strict=True)]
    field = _Field(
        stream, proxy_stream, stage, detail, patch, below, part, origin, chunk, on_block, kernels, states, keeps
    )
    start = partial(_start, stage, below, enlarged, ranges, patch, seed, level)
    done, x = (resume[0], resume[1]["tokens"]) if resume else (0, start())
    frozen = known = begun = torch.empty(0)
    if region:
        known = patchify(_box(region.latents, ranges), patch)
        frozen = ~_inside(region, origin, part)
        begun = start() if resume else x.clone()

    schedule = sigmas(stage.steps, stage.strength, stage.flow_shift)
    for i in range(done, stage.steps):
        now, following = schedule[i], schedule[i + 1]
        if region:
            x[frozen] = torch.lerp(known, begun, now / schedule[0])[frozen]
        x.add_(field.at(i, now, x), alpha=following - now)
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
