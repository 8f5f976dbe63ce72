"""What surrounds Wan's blocks, and stage 1, whole clips through them (DESIGN §3, §4).

Shapes: n clips, L tokens a clip, D channels. `WanTransformer3DModel` holds the weights; nothing here or in `streams`
owns a parameter. Parity with its `forward` is a test.
"""

import math
from dataclasses import dataclass

import torch
from diffusers import WanTransformer3DModel

from .attention import rope
from .block import EAGER, Kernels, KeyValue
from .layers import root_mean_square
from .memory import PART
from .offload import device_of, on_device
from .shapes import NATIVE, Grid, Spacing


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
        keys, values = (of_each(x, total, count) for x in self.keys_values[block])
        return (keys, values), of_each(self.bias, total, count)


def of_each(x: torch.Tensor, total: int, count: int) -> torch.Tensor:
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
    spacing: Spacing = NATIVE,
    kernels: Kernels = EAGER,
) -> torch.Tensor:
    """Stage 1 (DESIGN §3): velocity (n, L, P) of whole clips `tokens` (n, L, P) under full attention, at positions of a
    `spacing`; NATIVE is Wan's own forward."""
    device = device_of(model)
    t, h, w = (torch.arange(size)[None] for size in (grid.t, grid.h, grid.w))
    rotation = rope(t * spacing.time, h * spacing.space, w * spacing.space, model.config.attention_head_dim, device)
    temb, modulations = modulation(model, timestep)
    x = embed(model, tokens)
    for block, keys_values in zip(on_device(model.blocks, device), text.keys_values, strict=True):
        x, _, _ = kernels.run(model, block, x, modulations, rotation, keys_values, text.bias, None)
    return predict(model, x, temb).to(tokens)
