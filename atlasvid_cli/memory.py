"""Bytes that a sampling stage needs, from shapes alone, for each way to offload (DESIGN §4).

Latents are fp32 in host memory; weights, hidden state, keys and values have the device's dtype, rotations compute in
fp32.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .machine import Device
from .presets import Preset
from .shapes import Grid, Shape

# Where weights and states live, from fastest to smallest. none: all on the compute device; block: the blocks' weights
# in host memory; host: hidden state and the proxy's keys and values there too.
Offload = Literal["none", "block", "host"]


@dataclass(frozen=True)
class Placement:
    """Where a level's weights and states live, and whether keys and values of its proxy stream are kept, those of all
    blocks, or computed anew beside every forward, a block's at a time."""

    offload: Offload
    keeps: bool = True


# from fastest to smallest: the proxy stream adds a seventh to a quarter to a forward's FLOPs
PLACEMENTS = (
    Placement("none"),
    Placement("block"),
    Placement("none", keeps=False),
    Placement("block", keeps=False),
    Placement("host"),
    Placement("host", keeps=False),
)
WITHOUT_PROXY = Placement("none"), Placement("block"), Placement("host")
# How the blocks' linear layers are kept; auto: as they compute.
WeightDtype = Literal["auto", "int8", "fp8"]

GIB = 1 << 30
PART = 1 << 13  # tokens embedded or projected, or taken through the proxy stream, at a time
PROGRAM_BYTES = int(0.6 * GIB)  # torch, diffusers and transformers, imported, before any weight
PROGRAM_VRAM = GIB  # the CUDA context and what its allocator cannot reuse
# Of a GPU's memory, what prompts and tiles are placed by: whatever is free at the moment, the same GPU gives the same
# values, and an interrupted job ends with the bytes that it would have had. Of host memory, what keys are kept by.
GPU_SHARE = HOST_SHARE = 0.9


@dataclass(frozen=True)
class Memory:
    """Bytes of the GPU's memory (0 where the CPU computes) and of host memory, needed beside the program."""

    device: int
    host: int

    @property
    def vram(self) -> int:
        """Bytes of the GPU's memory with the program's."""
        return self.device and PROGRAM_VRAM + self.device

    @property
    def ram(self) -> int:
        """Bytes of host memory with the program's."""
        return PROGRAM_BYTES + self.host


def text_memory(preset: Preset, device: Device) -> Memory:
    """The text encoder, alone in memory: on a GPU that has room for it, else on the CPU in fp32."""
    if encodes_text(preset, device):
        weights = preset.text.parameters * device.bytes_per_value
        return Memory(weights, weights)  # read into host memory first
    return Memory(0, 4 * preset.text.parameters)


def encodes_text(preset: Preset, device: Device) -> bool:
    """Whether prompts are encoded on a GPU: where the encoder, with what it computes, fits in its share of that."""
    weights = preset.text.parameters * device.bytes_per_value
    return device.kind == "cuda" and weights * 1.2 < GPU_SHARE * device.memory


def proxy_memory(
    preset: Preset, tokens: int, offload: Offload, device: Device, narrow: bool = False, models: int = 1
) -> Memory:
    """Stage 1 with one or two `models`: under full attention every token is in the block at once, so its states are
    never offloaded. `narrow`: the blocks' weights are kept in eight bits."""
    latents = 8 * latents_bytes(preset, tokens)  # the sample and a multistep scheduler's history
    working = tokens * _block_bytes(preset, device)
    return _placed(preset, device, offload, narrow, states=0, working=working, latents=latents, models=models)


def detail_memory(
    preset: Preset,
    grid: Grid,
    below: Grid,
    chunk: int,
    passes: int,
    latents: int,
    placement: Placement,
    device: Device,
    narrow: bool = False,
    guide: int = 0,
    together: int = 1,
) -> Memory:
    """A detail level of `grid`, `chunk` windows at a time, with `together` of its `passes` in one forward, beside
    latents of `latents` tokens; of the grid `below` a window sees `guide` tokens."""
    size, detail = preset.transformer, preset.detail
    a_token = size.dim * device.bytes_per_value
    computed = chunk * max(_tokens(grid, window) for window in detail.windows)
    hidden, states = grid.tokens * a_token * together, 0
    moving = [computed * a_token] * 4  # tokens of two chunks on their way, and of two on their way back
    models = 2 if detail.lora and detail.streams == "proxy" else 1
    if detail.proxy_attention:
        # of the proxy stream hidden state, keys and values of a block, and rotations; what is kept of all blocks
        beside = 3 * below.tokens * a_token * together + 4 * below.tokens * size.dim // size.heads * passes
        kept = 2 * size.layers * below.tokens * a_token * passes
        states = kept + max(0, beside - hidden) if placement.keeps else beside
        own = max(PART, _tokens(below, detail.proxy_window) * together)
        computed = max(computed, own)
        # of two chunks also the keys and values that they see, or of the stream those that it makes
        moving = [computed * a_token] * 4 + [max(chunk * guide, own) * a_token] * 4
    return _placed(
        preset,
        device,
        placement.offload,
        narrow,
        states=hidden + states,
        models=models,
        on_device=2 * (1 if placement.keeps else models),
        working=computed * _block_bytes(preset, device),
        moving=moving,
        latents=latents_bytes(preset, latents),
    )


def _tokens(grid: Grid, window: Shape) -> int:
    """Of a window, which is no larger than its grid."""
    return math.prod(map(min, dataclasses.astuple(grid), window))


def _placed(
    preset: Preset,
    device: Device,
    offload: Offload,
    narrow: bool,
    states: int,
    working: int,
    latents: int,
    models: int = 1,
    on_device: int = 2,
    moving: Sequence[int] = (),
) -> Memory:
    size, width = preset.transformer, device.bytes_per_value
    kept = 1 if narrow else width
    block = size.block_parameters * kept
    working += size.dim * size.ffn * width if narrow else 0  # the layer that computes, in the dtype that it computes in
    read = model_bytes(preset, device)  # each into host memory first, in the dtype that it computes in
    blocks, rest = size.layers * block, read - size.layers * size.block_parameters * width
    weights = models * (blocks + rest)
    if device.kind == "cpu":
        loading = weights - blocks - rest + read
        return Memory(0, max(loading, weights + states + working + latents))
    if offload == "none":
        return Memory(weights + states + working, max(read, latents))
    loaded = on_device * block + models * rest  # the block that computes and the one on its way
    pinned = size.layers * (8 * _pinned(size.dim**2 * kept) + 2 * _pinned(size.dim * size.ffn * kept))
    home = max((models - 1) * pinned + read, models * pinned + latents)
    if offload == "block":
        return Memory(loaded + states + working, home)
    return Memory(loaded + working + sum(moving), home + states + sum(map(_pinned, moving)))


def model_bytes(preset: Preset, device: Device) -> int:
    """A transformer's weights in the dtype that it computes in."""
    size = preset.transformer
    blocks = size.layers * size.block_parameters
    return (blocks + size.dim * (8 * size.dim + size.text_dim + 2 * _patch_values(preset))) * device.bytes_per_value


def latents_bytes(preset: Preset, tokens: int) -> int:
    """Of latents of so many tokens, fp32, in host memory or on disk."""
    return tokens * _patch_values(preset) * 4


def _pinned(size: int) -> int:
    """What PyTorch's allocator of pinned memory takes for a tensor of `size` bytes: the next power of two."""
    return 1 << max(0, size - 1).bit_length()


def _patch_values(preset: Preset) -> int:
    return preset.transformer.channels * preset.geometry.patch**2


def _block_bytes(preset: Preset, device: Device) -> int:
    """Activations of a block, a token: the widened feed-forward layer twice, a dozen hidden states, some in fp32."""
    size, width = preset.transformer, device.bytes_per_value
    return 2 * size.ffn * width + 6 * size.dim * (width + 4)
