"""Times of both arms' parts: in full, or from a sample that is scaled by exact counts and says so (DESIGN §9).

The native arm is diffusers' own code throughout; the other arm is what `pipeline` runs.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers import transformer_wan

from .block import Kernels
from .cost import EFFICIENCY, placement_of
from .decode import decode_stream
from .decode_cost import start_tile
from .enlarge import enlarge
from .flops import detail_flops, full_flops, linear_flops
from .half import HalfEncoder
from .machine import compute_device, conv_rate
from .model import text_context
from .plan import Plan
from .presets import Transformer, Vae
from .shapes import Grid
from .stages import Stage
from .streams import Alignment, detail_forward, proxy_context
from .timing import Timing, extended, from_samples, timed, together
from .vae_cost import decode_flops, space_factor
from .video import write_video

MIN_ROWS = 1024  # PyTorch's CPU kernel cuts long queries in slices, short ones finer: a sample must be long
SLICE = 256  # rows of one head, which a thread of that kernel takes at a time
SLICES = 4  # a thread at least, as many as keep all of them busy: whole attention has thousands
KEY_BYTES = 1 << 30  # keys and values of an attention sample; heads beyond are scaled
WIDEST_BYTES = 1 << 29  # the widest activation of a sample of the linear layers, or of native's decoder
SAMPLE_SECONDS = 40.0  # a longer sample is no better
STOCK_CONV_RATE = 0.15  # of a channels-last conv2d's rate, which stock conv3d reaches in decoding (docs/LOG.md)
KERNELS = Kernels("native")  # of both arms, whatever ours would choose


class Budget(NamedTuple):
    """What a measurement may take: about `seconds` for a warm-up and `repeats`. `rate`: FLOP/s of a big GEMM."""

    rate: float
    seconds: float
    repeats: int

    @property
    def flops(self) -> float:
        """Of the warm-up or a repeat."""
        return self.rate * EFFICIENCY * self.seconds / (self.repeats + 1)

    def at_most(self, seconds: float) -> "Budget":
        return self._replace(seconds=min(self.seconds, seconds))


# --- the transformer -----------------------------------------------------------------------------------------------


def random_model(size: Transformer, patch: int) -> WanTransformer3DModel:
    """A transformer of these sizes with random weights: one block's, which stands at every layer, so that any fits."""
    model = WanTransformer3DModel(
        patch_size=(1, patch, patch),
        num_attention_heads=size.heads,
        attention_head_dim=size.dim // size.heads,
        in_channels=size.channels,
        out_channels=size.channels,
        text_dim=size.dim,
        ffn_dim=size.ffn,
        num_layers=1,
    )
    model.blocks = torch.nn.ModuleList([model.blocks[0]] * size.layers)
    dtype = getattr(torch, compute_device().dtype)
    for name, parameter in model.named_parameters():  # as from_pretrained does
        kept = any(part in model._keep_in_fp32_modules for part in name.split("."))
        parameter.data = parameter.data.to(torch.float32 if kept else dtype)
    return model.to(compute_device().kind).eval().requires_grad_(False)  # with its buffers


@contextmanager
def _first_blocks(model: Any, count: int) -> Iterator[None]:
    """The model with its first blocks only."""
    blocks = model.blocks
    model.blocks = blocks[:count]
    try:
        yield
    finally:
        model.blocks = blocks


@contextmanager
def _without_self_attention() -> Iterator[None]:
    """diffusers' Wan blocks with everything but QK^T and PV of self-attention, whose result is the values."""
    dispatch = transformer_wan.dispatch_attention_fn

    def cross_only(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
        return value if key.shape[1] == query.shape[1] else dispatch(query, key, value, **options)

    transformer_wan.dispatch_attention_fn = cross_only
    try:
        yield
    finally:
        transformer_wan.dispatch_attention_fn = dispatch


def crop(grid: Grid, tokens: float, multiple: int = 1) -> Grid:
    """The grid with its longer side cut, in steps of `multiple`, until it has at most `tokens` or nothing is left."""
    h, w, t = grid.h, grid.w, grid.t
    while t * h * w > tokens and max(h, w) > multiple:
        if h > w:
            h = max(multiple, (h - 1) // multiple * multiple)
        else:
            w = max(multiple, (w - 1) // multiple * multiple)
    while t * h * w > tokens and t > 1 and multiple == 1:
        t -= 1
    return Grid(t, h, w)


def native_forward(model: Any, patch: int, text: int, grid: Grid) -> Callable[[], Any]:
    """One forward of diffusers' WanTransformer3DModel on a whole clip, text padded to `text` keys."""
    like = {"device": model.device, "dtype": model.dtype}
    latents = torch.randn(1, model.config.in_channels, grid.t, grid.h * patch, grid.w * patch, **like)
    states, timestep = torch.randn(1, text, model.config.text_dim, **like), torch.tensor([500], device=model.device)
    return lambda: model(latents, timestep, states, return_dict=False)


def native_pass(model: Any, size: Transformer, patch: int, grid: Grid, budget: Budget) -> Timing:
    """One forward under full attention; a sample where it would take more than its budget."""
    if full_flops(size, patch, grid.tokens, size.text_length) <= budget.flops:
        return timed(native_forward(model, patch, size.text_length, grid), budget.repeats)
    heads = heads_in_memory(size, grid.tokens)
    return native_sample(model, size, patch, grid, heads, budget.at_most(SAMPLE_SECONDS))


def heads_in_memory(size: Transformer, tokens: int) -> int:
    """Heads whose keys and values a sample of attention to so many tokens may hold."""
    return min(size.heads, max(1, KEY_BYTES // (8 * tokens * size.dim // size.heads)))


def native_sample(model: Any, size: Transformer, patch: int, grid: Grid, heads: int, budget: Budget) -> Timing:
    """One forward under full attention, projected.

    Timed are some query rows against all keys and values, in diffusers' attention, and diffusers' model without
    self-attention, with no block and with one, on as many tokens as the time allows. Attention is scaled by rows, heads
    and layers, the rest by tokens and layers. It is of `heads`, and of as many rows as keep all threads of a CPU busy;
    where there are too few rows, of more heads.
    """
    share = budget.flops / 3  # of each of the three
    tokens, text = grid.tokens, size.text_length
    head = size.dim // size.heads
    slices = SLICES * torch.get_num_threads() if model.device.type == "cpu" else 1
    heads = min(size.heads, max(heads, math.ceil(slices * SLICE / tokens)))
    rows = int(share / (4 * head * heads * tokens)) // 512 * 512
    rows = min(tokens, max(MIN_ROWS, math.ceil(slices / heads) * SLICE, rows))
    like = {"device": model.device, "dtype": model.dtype}
    q, k, v = (torch.randn(1, n, heads, head, **like) for n in (rows, tokens, tokens))
    attention = timed(lambda: dispatch_attention_fn(q, k, v, dropout_p=0.0, is_causal=False), budget.repeats)

    linear = linear_flops(size, patch, 1) + 4 * size.dim * text
    part = crop(grid, min(share / linear, WIDEST_BYTES / (4 * size.ffn)))
    if part.tokens == text:  # attention to itself is known by its length
        part = crop(part, text - 1)
    run = native_forward(model, patch, text, part)
    with _without_self_attention():
        with _first_blocks(model, 0):
            bare = timed(run, budget.repeats)
        with _first_blocks(model, 1):
            one = timed(run, budget.repeats)
    layers, per_layer = size.layers, tokens / rows * size.heads / heads
    without = extended(bare, one, layers).times(tokens / part.tokens)
    done = part.tokens * linear + 4 * head * heads * rows * tokens
    fraction = done / full_flops(size, patch, tokens, text)
    return together((without, attention.times(layers * per_layer))).times(1, fraction)


def detail_sample(model: Any, plan: Plan, stage: Stage, budget: Budget) -> Timing:
    """All of a detail level, projected from `detail_forward` on a part of its windows, scaled by FLOPs.

    The part has whole windows. Where a column of them along time is still too much, it takes one cycle of the block
    layouts, and then one window. States live where a render keeps them. Weights are resident, whatever it offloads: a
    random model has the same block at each layer, which would not be brought again.
    """
    size, detail, patch = plan.preset.transformer, plan.preset.detail, plan.preset.geometry.patch
    largest = max(max(w[1:]) for w in detail.windows)
    most = budget.at_most(SAMPLE_SECONDS).flops
    layers, cycle = size.layers, min(size.layers, len(detail.layouts))

    def cost(grid: Grid, below: Grid, layers: int) -> int:
        return detail_flops(size, patch, detail, grid, below, stage.ratio, stage.time_ratio, layers)

    below = plan.below(stage)
    per_token = cost(stage.grid, below, layers) / stage.grid.tokens
    part = crop(stage.grid, most / per_token, largest)
    if per_token * part.tokens > most:
        layers = cycle
    if per_token * part.tokens * layers / size.layers > most:
        part = replace(part, t=min(part.t, max(w[0] for w in detail.windows)))
    channels = size.channels * patch**2
    states = torch.device("cpu") if placement_of(plan).offload == "host" else None
    # the guide of the part: as much of the level below as its windows can see
    low = Grid(below.t, min(below.h, part.h), min(below.w, part.w))
    low = crop(low, max(low.t * 4, part.tokens))
    tokens, guide = torch.randn(part.tokens, channels), torch.randn(low.tokens, channels)
    with torch.no_grad(), _first_blocks(model, layers):
        text = text_context(model, [torch.randn(24, model.config.text_dim)], size.text_length)
        context = None
        if detail.proxy_attention:
            alignment = Alignment.of(detail, stage.ratio, stage.time_ratio)
            context = proxy_context(model, guide, low, text, alignment, kernels=KERNELS, states=states)
        arguments = (model, tokens, part, 500.0, text, context, detail.layouts, plan.chunk)
        one = timed(lambda: detail_forward(*arguments, kernels=KERNELS, states=states), budget.repeats)
    done, whole = cost(part, low, layers), plan.flops(stage)
    return one.times(whole / done, done / whole)


def enlarge_sample(vae: Any, plan: Plan, stage: Stage, folder: Path, repeats: int) -> Timing:
    """Making the level below as large in pixels, projected from its first two latent frames."""
    geometry, below, grid = plan.preset.geometry, plan.below(stage), stage.grid
    latents = torch.randn(plan.preset.transformer.channels, 1, below.h * geometry.patch, below.w * geometry.patch)
    latents = latents.expand(-1, min(2, below.t), -1, -1).contiguous()
    size = grid.h * geometry.token_pixels, grid.w * geometry.token_pixels
    frames = (grid.t - 1) * geometry.temporal + 1
    timed_frames = min(frames, geometry.temporal * stage.time_ratio + 1)
    figures = stage.ratio, stage.time_ratio, size, timed_frames, start_tile(plan, stage), folder
    encoder = HalfEncoder(vae.encoder) if stage.entry else None  # whose values do not matter
    one = timed(lambda: enlarge(vae, latents, *figures, encoder=encoder), repeats)
    return one.times(frames / timed_frames, timed_frames / frames)


def proxy_sample(model: Any, plan: Plan, budget: Budget) -> Timing:
    """All of stage 1, projected from one forward, or a sample of one, of the same blocks in diffusers' code."""
    stage, size, patch = plan.proxy, plan.preset.transformer, plan.preset.geometry.patch
    return native_pass(model, size, patch, stage.grid, budget).times(stage.forwards())


# --- decode and mux ------------------------------------------------------------------------------------------------


def native_decode(vae: Any, grid: Grid, patch: int, seconds: float, repeats: int) -> Timing:
    """`AutoencoderKLWan.decode` of a clip, projected from its first two latent frames and, if those take too long,
    from a part of each frame (which spares native the middle attention's square)."""
    h, w = grid.h * patch, grid.w * patch
    budget = conv_rate(vae.dtype) * STOCK_CONV_RATE * min(seconds, SAMPLE_SECONDS) / (repeats + 1) / 2
    part = crop(Grid(1, h, w), budget / (decode_flops(Vae.stock(vae.config), h, w) / (h * w)))
    cells = (space_factor(vae.config) // (vae.config.patch_size or 1)) ** 2  # of the last level, a latent
    part = crop(part, WIDEST_BYTES / (4 * 4 * cells * vae.config.base_dim))
    clips = [torch.randn(1, vae.config.z_dim, n, part.h, part.w, device=vae.device, dtype=vae.dtype) for n in (1, 2)]
    first, both = (timed(partial(vae.decode, z), repeats) for z in clips)
    more = h * w / part.tokens
    return extended(first, both, grid.t - 1).times(more, min(1.0, 2 / grid.t) / more)


def decode_sample(
    vae: Any, latents: torch.Tensor, plan: Plan, stage: Stage, tile: int | None, folder: Path, repeats: int
) -> tuple[Timing, Timing]:
    """(decode, mux) of all frames of the last level, or of the proxy's preview, projected from the few latent frames
    (C, k, h, w) given, at their size.

    Decoder and encoder run beside each other, so mux is what is left to encode after the last frame has come.
    """
    k, geometry = latents.shape[1], plan.preset.geometry
    count, all_frames = ((n - 1) * geometry.temporal + 1 for n in (k, stage.grid.t))
    (width, height), fps = plan.proxy_size, plan.proxy_fps
    if stage is not plan.proxy:
        width, height, fps, all_frames = plan.request.width, plan.request.height, Fraction(plan.fps), plan.frames
    decodes, muxes = [], []
    for _ in range(repeats):
        times: list[float] = []
        start = time.perf_counter()
        write_video(
            folder / "sample.mp4",
            decode_stream(vae, latents, tile, folder),
            width=min(width, latents.shape[3] * geometry.spatial),
            height=min(height, latents.shape[2] * geometry.spatial),
            fps=fps,
            frame_count=count,
            on_frame=partial(_note, times),
        )
        end = time.perf_counter()
        rest = (stage.grid.t - 1) / max(1, k - 1)
        mux = end - times[-1]
        # tiles are all decoded before the first frame comes
        whole = (end - start) * all_frames / count if tile else times[0] - start + (end - times[0]) * rest
        decodes.append(whole - mux)
        muxes.append(mux)
    fraction = k / stage.grid.t
    return from_samples(decodes).times(1, fraction), from_samples(muxes).times(1, fraction)


def _note(times: list[float], _: int) -> None:
    times.append(time.perf_counter())


def mux_alone(frames: list[torch.Tensor], plan: Plan, folder: Path, repeats: int) -> Timing:
    """Encoding the whole video while nothing decodes, from some of its frames (3, H, W), or of a part of each."""
    request, (_, height, width) = plan.request, frames[0].shape
    more = plan.frames / len(frames) * request.width * request.height / (width * height)

    def run() -> None:
        write_video(
            folder / "mux.mp4",
            iter(frames),
            width=width,
            height=height,
            fps=Fraction(plan.fps),
            frame_count=len(frames),
        )

    return timed(run, repeats, warm_up=False).times(more)
