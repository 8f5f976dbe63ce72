"""The two streams of stage 2, windows of Wan's blocks (DESIGN §4): the detail, and below it its proxy.

Shapes: n windows, L tokens a sample, m samples, D channels.
"""

import dataclasses
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from typing import Protocol

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanTransformerBlock

from .attention import rope, rotate
from .block import EAGER, Kernels, KeyValue
from .memory import PART
from .model import TextContext, embed_parts, modulation, of_each, predict
from .offload import Transfers, device_of, on_device
from .presets import Detail, Layout, window_cycle
from .shapes import Grid, Shape
from .windows import Windows, aligned_proxy, block_layout


@dataclass(frozen=True)
class Alignment:
    """How a proxy lies below a level: r_s and r_t, the tokens seen beyond a window's own, the windows of its own
    attention, and where its keys sit (DESIGN §4)."""

    ratio: Fraction
    time_ratio: int
    margin: Shape
    window: Shape
    centre: bool = False
    scaled: bool = True

    @classmethod
    def of(cls, detail: Detail, ratio: Fraction, time_ratio: int) -> "Alignment":
        """As a preset has it."""
        return cls(ratio, time_ratio, detail.margin, detail.proxy_window, detail.proxy_centre, detail.scaled_positions)


class Guide(Protocol):
    """What the detail stream sees of its proxy, of several one after another: keys, rotated at detail coordinates, and
    values (tokens, heads, d) of every block."""

    @property
    def grid(self) -> Grid: ...

    @property
    def alignment(self) -> Alignment: ...

    def first(self) -> "Guide":
        """That of the first proxy alone."""
        ...

    def at(self, i: int, model: WanTransformer3DModel, block: WanTransformerBlock) -> KeyValue:
        """Those of block `i`, which `model` computes with now: of all blocks in turn, from the first on."""
        ...


@dataclass(frozen=True)
class ProxyContext:
    """A guide that is kept (`proxy_context`).

    It may live in host memory: only what a chunk of windows is aligned with goes to the device.
    """

    grid: Grid
    alignment: Alignment
    keys_values: list[KeyValue]

    def first(self) -> "ProxyContext":
        size = self.grid.tokens
        return dataclasses.replace(
            self, keys_values=[(keys[:size], values[:size]) for keys, values in self.keys_values]
        )

    def at(self, i: int, model: WanTransformer3DModel, block: WanTransformerBlock) -> KeyValue:
        return self.keys_values[i]


def _aligned(guide: Guide, keys_values: KeyValue, windows: Windows, transfers: Transfers) -> KeyValue:
    """The rows of a block's keys and values that windows see."""
    at, tokens = guide.alignment, guide.grid.tokens
    index = aligned_proxy(windows, guide.grid, at.ratio, at.time_ratio, at.margin)
    keys, values = keys_values
    index = _in_each(index, tokens, len(keys) // tokens).to(keys.device)
    return transfers.rows(keys, index), transfers.rows(values, index)


def _in_each(index: torch.Tensor, size: int, count: int) -> torch.Tensor:
    """Rows (n, l) of a sample of `size` rows -> those rows of each of `count` samples in turn, (count * n, l)."""
    return (index + size * torch.arange(count)[:, None, None]).flatten(0, 1)


@dataclass(frozen=True)
class _Stream:
    """Samples on one `grid`, one after another, and what is the same to them in every block.

    `modulations` (m or 1, 6, D). Windows are computed `chunk` at a time, of all samples together, or as many as have
    PART tokens.
    """

    model: WanTransformer3DModel
    grid: Grid
    modulations: torch.Tensor
    text: TextContext
    layouts: Sequence[Layout]
    transfers: Transfers
    kernels: Kernels
    phase: int = 0
    origin: Shape = (0, 0, 0)
    chunk: int | None = None
    guide: Guide | None = None
    time_ratio: int = 1

    def chunks(self, i: int, count: int) -> Iterator[Windows]:
        """The windows of block `i`, those at a time that are computed together for `count` samples: at least one."""
        for group in block_layout(i, self.layouts, self.grid, self.phase):
            together = PART // math.prod(group.shape) if self.chunk is None else self.chunk
            yield from group.split(max(1, together // count))

    def through(self, i: int, block: WanTransformerBlock, x: torch.Tensor, *into: torch.Tensor) -> None:
        """Takes the hidden states `x` (m * L, D) of m samples through block `i`, a map over windows: its output, keys
        and values, as many as there are tensors for, go `into` these. Without gradients the first may be `x`."""
        count, transfers, head_dim = len(x) // self.grid.tokens, self.transfers, self.model.config.attention_head_dim
        seen = self.guide.at(i, self.model, block) if self.guide else None

        def fetch(windows: Windows) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, KeyValue | None]:
            index = _in_each(windows.indices(self.grid), self.grid.tokens, count).to(transfers.home)
            placed = windows.moved(self.origin)
            guide = _aligned(self.guide, seen, placed, transfers) if self.guide and seen else None
            t, h, w = (at.repeat(count, 1) for at in placed.axes())
            return index, transfers.rows(x, index), rope(t * self.time_ratio, h, w, head_dim, transfers.device), guide

        with transfers.begun():
            for index, part, rotation, guide in transfers.ahead(self.chunks(i, count), fetch):
                keys_values, bias = self.text.of_windows(i, len(index), count)
                modulations = of_each(self.modulations, len(index), count)
                made = self.kernels.run(self.model, block, part, modulations, rotation, keys_values, bias, guide)
                transfers.put(index, *zip(into, made, strict=False))


@dataclass
class ProxyStream:
    """The proxy stream: clean proxy `tokens` (L, P), block after block; or several proxies (m, L, P), each with its own
    prompt. A guide that is computed anew beside every forward of the detail, for which one block's keys and values
    exist at a time.

    It attends to itself, in windows no larger than its training grid, and to the text, at `timestep` (0..1000; a clean
    proxy's is 0). For the detail's queries its keys are rotated at detail coordinates: a proxy token sits at the middle
    of what it covers, in time at the end of its group of latents or (`centre`) at its middle; without `scaled` at its
    own. `states` is where hidden state, keys and values live (by default where the model computes).
    """

    model: WanTransformer3DModel
    tokens: torch.Tensor
    grid: Grid
    text: TextContext
    alignment: Alignment
    timestep: float = 0.0
    kernels: Kernels = EAGER
    states: torch.device | None = None
    _hidden: torch.Tensor | None = field(default=None, init=False)
    _blocks: Generator[WanTransformerBlock] | None = field(default=None, init=False)

    def first(self) -> "ProxyStream":
        return dataclasses.replace(
            self, tokens=self.tokens.view(-1, *self.tokens.shape[-2:])[:1], text=self.text.first()
        )

    def at(self, i: int, model: WanTransformer3DModel, block: WanTransformerBlock) -> KeyValue:
        device = device_of(self.model)
        if i == 0:
            self._hidden = embed_parts(self.model, self.tokens.flatten(0, -2), self.states or device)
            # a model that serves both streams has its block's weights at hand
            self._blocks = None if model is self.model else on_device(self.model.blocks, device)
        x = self._hidden
        assert x is not None
        out = torch.empty_like(x) if torch.is_grad_enabled() else x
        keys, values = (torch.empty_like(x).unflatten(-1, self._heads) for _ in range(2))
        self._stream.through(i, next(self._blocks) if self._blocks else block, x, out, keys, values)
        self._hidden = out
        if i == len(self.model.blocks) - 1:
            self._hidden = None
            if self._blocks:
                self._blocks.close()  # the last one's weights go home before another stream takes them
        return self._rotated(keys), values

    @property
    def _heads(self) -> tuple[int, int]:
        return self.model.config.num_attention_heads, self.model.config.attention_head_dim

    @cached_property
    def _stream(self) -> "_Stream":
        """In windows of its own, as far apart in time as in stage 1; in space as the base knows windows so large."""
        device = device_of(self.model)
        _, modulations = modulation(self.model, torch.tensor([self.timestep]))
        layouts, transfers = window_cycle([self.alignment.window]), Transfers(self.states or device, device)
        return _Stream(
            self.model,
            self.grid,
            modulations,
            self.text,
            layouts,
            transfers,
            self.kernels,
            time_ratio=self.alignment.time_ratio,
        )

    @cached_property
    def _rotation(self) -> torch.Tensor:
        """(1, L, 1, d/2, 2), of keys at detail coordinates."""
        grid, at = self.grid, self.alignment
        t = torch.arange(grid.t, dtype=torch.float64) * at.time_ratio
        if at.centre:
            t[1:] -= (at.time_ratio - 1) / 2
        scale = float(at.ratio) if at.scaled else 1.0
        h, w = (scale * (torch.arange(size, dtype=torch.float64) + 0.5) - 0.5 for size in (grid.h, grid.w))
        return rope(t[None], h[None], w[None], self._heads[1], self.states or device_of(self.model))

    def _rotated(self, keys: torch.Tensor) -> torch.Tensor:
        """Keys (m * L, heads, d) as the detail sees them, in place without gradients."""
        if torch.is_grad_enabled():
            return rotate(keys.unflatten(0, (-1, self.grid.tokens)), self._rotation).flatten(0, 1)
        for sample in keys.split(self.grid.tokens):
            for part, rotation in zip(sample.split(PART), self._rotation[0].split(PART), strict=True):
                part.copy_(rotate(part[None], rotation[None])[0])
        return keys


def proxy_context(
    model: WanTransformer3DModel,
    tokens: torch.Tensor,
    grid: Grid,
    text: TextContext,
    alignment: Alignment,
    timestep: float = 0.0,
    kernels: Kernels = EAGER,
    states: torch.device | None = None,
) -> ProxyContext:
    """What the proxy stream (`ProxyStream`) makes in all blocks, computed once and kept."""
    stream = ProxyStream(model, tokens, grid, text, alignment, timestep, kernels, states)
    blocks = enumerate(on_device(model.blocks, device_of(model)))
    return ProxyContext(grid, alignment, [stream.at(i, model, block) for i, block in blocks])


def detail_forward(
    model: WanTransformer3DModel,
    tokens: torch.Tensor,
    grid: Grid,
    timestep: float | torch.Tensor,
    text: TextContext,
    proxy: Guide | None,
    layouts: Sequence[Layout],
    chunk: int,
    phase: int = 0,
    origin: Shape = (0, 0, 0),
    kernels: Kernels = EAGER,
    states: torch.device | None = None,
    on_block: Callable[[], None] | None = None,
) -> torch.Tensor:
    """Velocity (L, P) of the detail `tokens` (L, P), on their device: a block is a map over windows.

    Of several samples (m, L, P) it takes the m timesteps, prompts and proxies; about `chunk` windows, of all together,
    are computed at a time, and at least one of each.
    `phase` is where the blocks' cycle of `layouts` begins, `origin` places the grid in the whole video when it is
    only a region of it, `states` is where the hidden state lives (by default where the model computes).

    Windows partition the tokens and read only themselves, the cached proxy and the text, so without gradients each
    chunk of windows is written back in place and the hidden state exists once.
    """
    device = device_of(model)
    states = states or device
    temb, modulations = modulation(model, torch.as_tensor(timestep).reshape(-1))
    count = tokens[..., 0].numel() // grid.tokens
    hidden = embed_parts(model, tokens.flatten(0, -2), states)
    transfers = Transfers(states, device)
    stream = _Stream(model, grid, modulations, text, layouts, transfers, kernels, phase, origin, chunk, proxy)
    for i, block in enumerate(on_device(model.blocks, device)):
        out = torch.empty_like(hidden) if torch.is_grad_enabled() else hidden
        stream.through(i, block, hidden, out)
        hidden = out
        if on_block:
            on_block()
    velocity, hidden = tokens.new_empty(count, grid.tokens, tokens.shape[-1]), hidden.unflatten(0, (count, -1))
    together = max(1, PART // count)
    for first in range(0, grid.tokens, together):
        part = hidden[:, first : first + together].to(device)
        velocity[:, first : first + together] = predict(model, part, temb).to(tokens)
    return velocity.view_as(tokens)
