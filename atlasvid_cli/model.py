"""The two streams that are built from Wan's blocks (DESIGN §4).

Shapes: n windows (or clips), L tokens a window, D channels. `WanTransformer3DModel` holds the weights; nothing here
owns a parameter. Parity with its `forward` is a test.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanTransformerBlock

from .attention import rope, rotate
from .block import EAGER, Kernels, KeyValue
from .layers import root_mean_square
from .offload import Transfers, device_of, on_device
from .presets import Detail, Layout, window_cycle
from .shapes import Grid, Shape
from .windows import Windows, aligned_proxy, block_layout

PART = 1 << 13  # tokens embedded or projected, or taken through the proxy stream, at a time


@dataclass(frozen=True)
class TextContext:
    """Prompt keys and values of every block, (m, tokens, heads, d), with the logit bias (m, 1, 1, tokens).

    Wan pads text to 512 keys that are all alike and not masked. They are two keys here (`keys_for`).
    """

    keys_values: list[KeyValue]
    bias: torch.Tensor

    def first(self) -> "TextContext":
        """The first prompt alone."""
        return TextContext([(keys[:1], values[:1]) for keys, values in self.keys_values], self.bias[:1])

    def of_windows(self, block: int, total: int, count: int) -> tuple[KeyValue, torch.Tensor]:
        """A block's keys and values, and the bias, for `total` windows, those of `count` samples in turn."""
        keys, values = (_of_windows(x, total, count) for x in self.keys_values[block])
        return (keys, values), _of_windows(self.bias, total, count)


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


@dataclass(frozen=True)
class ProxyContext:
    """What the detail stream needs of its proxy: keys (rotated at detail coordinates) and values (tokens, heads, d), of
    several proxies one after another.

    They may live in host memory: only what a chunk of windows is aligned with goes to the device.
    """

    grid: Grid
    alignment: Alignment
    keys_values: list[KeyValue]

    def first(self) -> "ProxyContext":
        """The first proxy alone."""
        size = self.grid.tokens
        return dataclasses.replace(
            self, keys_values=[(keys[:size], values[:size]) for keys, values in self.keys_values]
        )

    def aligned(self, block: int, windows: Windows, transfers: Transfers) -> KeyValue:
        (keys, values), at = self.keys_values[block], self.alignment
        index = aligned_proxy(windows, self.grid, at.ratio, at.time_ratio, at.margin)
        index = _in_each(index, self.grid.tokens, len(keys) // self.grid.tokens).to(keys.device)
        return transfers.rows(keys, index), transfers.rows(values, index)


def _in_each(index: torch.Tensor, size: int, count: int) -> torch.Tensor:
    """Rows (n, l) of a sample of `size` rows -> those rows of each of `count` samples in turn, (count * n, l)."""
    return (index + size * torch.arange(count)[:, None, None]).flatten(0, 1)


def _of_windows(x: torch.Tensor, total: int, count: int) -> torch.Tensor:
    """What `count` samples have each, (count, ...), or share, (1, ...), for `total` windows, those of each in turn."""
    return x if len(x) == 1 else x.repeat_interleave(total // count, 0)


def keys_for(count: int, dtype: torch.dtype) -> list[float]:
    """Biases of two keys that together weigh as much as `count` alike ones. Of one, log(count) rounds to steps of 1/32
    in bfloat16, so by a per cent that is the same at every query of every block."""
    first = torch.tensor(math.log(0.975 * count)).to(dtype).double()  # less than all of it, however it rounds
    return [first.item(), math.log(count - first.exp().item())]


def text_context(model: WanTransformer3DModel, embeddings: list[torch.Tensor], length: int) -> TextContext:
    """Projects prompts, each (tokens, text_dim) without padding, as Wan would after padding each to `length` keys."""
    longest = max(len(e) for e in embeddings)
    projection = model.condition_embedder.text_embedder.linear_1.weight
    padded = projection.new_zeros(len(embeddings), longest + 2, embeddings[0].shape[1])
    bias = torch.full((len(embeddings), 1, 1, longest + 2), -math.inf, device=padded.device)
    for i, e in enumerate(embeddings):
        padded[i, : len(e)] = e
        bias[i, ..., : len(e)] = 0.0
        if length > len(e):
            bias[i, ..., -2:] = bias.new_tensor(keys_for(length - len(e), projection.dtype))
    hidden = model.condition_embedder.text_embedder(padded)
    keys_values = []
    for attn in on_device([block.attn2 for block in model.blocks], device_of(model)):
        keys = root_mean_square(attn.norm_k, attn.to_k(hidden)).unflatten(-1, (attn.heads, -1))
        keys_values.append((keys, attn.to_v(hidden).unflatten(-1, (attn.heads, -1))))
    return TextContext(keys_values, bias.to(hidden.dtype))


def text_contexts(model: WanTransformer3DModel, groups: list[list[torch.Tensor]], length: int) -> list[TextContext]:
    """A `text_context` for each group of prompts, which take one forward together; without gradients."""
    with torch.no_grad():
        return [text_context(model, group, length) for group in groups]


def modulation(model: WanTransformer3DModel, timestep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Time embedding (m, D) and the blocks' modulation (m, 6, D) at timesteps (m,) in 0..1000."""
    embedder = model.condition_embedder
    frequencies = embedder.timesteps_proj(timestep.to(device_of(model)))
    temb = embedder.time_embedder(frequencies.to(embedder.time_embedder.linear_1.weight.dtype))
    temb = temb.to(embedder.time_proj.weight.dtype)
    return temb, embedder.time_proj(embedder.act_fn(temb)).unflatten(1, (6, -1))


def patchify(latents: torch.Tensor, patch: int) -> torch.Tensor:
    """Latents (C, T, H, W) -> tokens (T*h*w, C*patch*patch) in raster order."""
    c, t, height, width = latents.shape
    x = latents.view(c, t, height // patch, patch, width // patch, patch)
    return x.permute(1, 2, 4, 0, 3, 5).reshape(-1, c * patch * patch)


def unpatchify(tokens: torch.Tensor, grid: Grid, patch: int) -> torch.Tensor:
    """The inverse of `patchify`."""
    x = tokens.view(grid.t, grid.h, grid.w, -1, patch, patch)
    return x.permute(3, 0, 1, 4, 2, 5).reshape(-1, grid.t, grid.h * patch, grid.w * patch)


def embed(model: WanTransformer3DModel, tokens: torch.Tensor) -> torch.Tensor:
    """Patch embedding of tokens (..., C*patch*patch) -> (..., D), in the weights' dtype under autocast too."""
    weight, bias = model.patch_embedding.weight, model.patch_embedding.bias
    return torch.nn.functional.linear(tokens.to(weight), weight.flatten(1), bias).type_as(weight)


def embed_parts(model: WanTransformer3DModel, tokens: torch.Tensor, states: torch.device) -> torch.Tensor:
    """`embed` of tokens (L, P), a part at a time, into one hidden state (L, D) on `states`."""
    weight = model.patch_embedding.weight
    hidden = torch.empty(len(tokens), len(weight), dtype=weight.dtype, device=states)
    for first in range(0, len(tokens), PART):
        hidden[first : first + PART] = embed(model, tokens[first : first + PART]).to(states)
    return hidden


def predict(model: WanTransformer3DModel, x: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
    """Final norm and projection of x (n, L, D) -> velocity (n, L, C*patch*patch), in the order of `patchify`."""
    shift, scale = (model.scale_shift_table + temb.unsqueeze(1)).chunk(2, dim=1)
    out = model.proj_out((model.norm_out(x.float()) * (1 + scale) + shift).type_as(x))
    patch = math.prod(model.config.patch_size)  # Wan puts channels last in the output, first in the input
    return out.unflatten(-1, (patch, -1)).transpose(-1, -2).flatten(-2)


def clip_forward(
    model: WanTransformer3DModel,
    tokens: torch.Tensor,
    grid: Grid,
    timestep: torch.Tensor,
    text: TextContext,
    time_ratio: int = 1,
    kernels: Kernels = EAGER,
) -> torch.Tensor:
    """Stage 1 (DESIGN §3): velocity (n, L, P) of whole clips `tokens` (n, L, P) under full attention.

    Positions are (time_ratio * t, y, x); time_ratio 1 is Wan's own forward.
    """
    device = device_of(model)
    t, h, w = (torch.arange(size)[None] for size in (grid.t, grid.h, grid.w))
    rotation = rope(t * time_ratio, h, w, model.config.attention_head_dim, device)
    temb, modulations = modulation(model, timestep)
    x = embed(model, tokens)
    for block, keys_values in zip(on_device(model.blocks, device), text.keys_values, strict=True):
        x, _, _ = kernels.run(model, block, x, modulations, rotation, keys_values, text.bias, None)
    return predict(model, x, temb).to(tokens)


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
    proxy: ProxyContext | None = None
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

        def fetch(windows: Windows) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, KeyValue | None]:
            index = _in_each(windows.indices(self.grid), self.grid.tokens, count).to(transfers.home)
            placed = windows.moved(self.origin)
            guide = self.proxy.aligned(i, placed, transfers) if self.proxy else None
            t, h, w = (at.repeat(count, 1) for at in placed.axes())
            return index, transfers.rows(x, index), rope(t * self.time_ratio, h, w, head_dim, transfers.device), guide

        with transfers.begun():
            for index, part, rotation, guide in transfers.ahead(self.chunks(i, count), fetch):
                keys_values, bias = self.text.of_windows(i, len(index), count)
                modulations = _of_windows(self.modulations, len(index), count)
                made = self.kernels.run(self.model, block, part, modulations, rotation, keys_values, bias, guide)
                transfers.put(index, *zip(into, made, strict=False))


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
    """The proxy stream: clean proxy `tokens` (L, P) through all blocks, keeping each block's keys and values; or those
    of several proxies (m, L, P), each with its own prompt.

    It attends to itself, in windows no larger than its training grid, and to the text, at `timestep` (0..1000; a clean
    proxy's is 0). For the detail's queries its keys are rotated at detail coordinates: a proxy token sits at the middle
    of what it covers, in time at the end of its group of latents or (`centre`) at its middle; without `scaled` at its
    own. `states` is where hidden state, keys and values live.
    """
    time_ratio = alignment.time_ratio
    head_dim, device = model.config.attention_head_dim, device_of(model)
    states = states or device
    _, modulations = modulation(model, torch.tensor([timestep]))
    count = tokens[..., 0].numel() // grid.tokens
    x = embed_parts(model, tokens.flatten(0, -2), states)
    t = torch.arange(grid.t, dtype=torch.float64) * time_ratio
    if alignment.centre:
        t[1:] -= (time_ratio - 1) / 2
    scale = float(alignment.ratio) if alignment.scaled else 1.0
    h, w = (scale * (torch.arange(size, dtype=torch.float64) + 0.5) - 0.5 for size in (grid.h, grid.w))
    detail_rotation = rope(t[None], h[None], w[None], head_dim, states)
    layouts, transfers = window_cycle([alignment.window]), Transfers(states, device)
    stream = _Stream(model, grid, modulations, text, layouts, transfers, kernels, time_ratio=time_ratio)
    kept: list[KeyValue] = []
    for i, block in enumerate(on_device(model.blocks, device)):
        out = torch.empty_like(x)
        keys, values = (torch.empty_like(x).unflatten(-1, (model.config.num_attention_heads, -1)) for _ in range(2))
        stream.through(i, block, x, out, keys, values)
        kept.append((rotate(keys.unflatten(0, (count, -1)), detail_rotation).flatten(0, 1), values))
        x = out
    return ProxyContext(grid, alignment, kept)


def detail_forward(
    model: WanTransformer3DModel,
    tokens: torch.Tensor,
    grid: Grid,
    timestep: float | torch.Tensor,
    text: TextContext,
    proxy: ProxyContext | None,
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
