"""The arms of the ablation: how each makes its video (DESIGN §9)."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import WanPipeline

from . import pipeline, world
from .artefacts import read_latents
from .console import Console
from .cost import placement_of
from .decode import decode_stream
from .decode_cost import vae_tile
from .encode import encode_stream
from .plan import Plan, Request
from .presets import Preset
from .quality import true_scene
from .session import Session
from .video import write_video
from .weights import load_scheduler, load_text, load_transformer


def _detail(**changes: Any) -> Callable[[Preset], Preset]:
    return lambda preset: dataclasses.replace(preset, detail=dataclasses.replace(preset.detail, **changes))


def _unscaled_time(preset: Preset) -> Preset:
    return dataclasses.replace(preset, proxy=dataclasses.replace(preset.proxy, scaled_time=False))


def _half_the_steps(preset: Preset) -> Preset:
    levels = (preset.detail.first, preset.detail.upper)
    first, upper = (dataclasses.replace(level, steps=-(-level.steps // 2)) for level in levels)
    return _detail(first=first, upper=upper)(preset)


def _tiles(preset: Preset) -> Preset:
    return _detail(proxy_attention=False, shifted=False, windows=preset.detail.windows[:1])(preset)


WHOLE = "the full method"
# arms that sample detail, as changes of the preset, and whether its adapters were trained for that
SAMPLED: dict[str, tuple[Callable[[Preset], Preset], bool]] = {
    WHOLE: (lambda preset: preset, True),
    "half the detail steps": (_half_the_steps, True),
    "without proxy attention": (_detail(proxy_attention=False), False),
    "without shifts": (_detail(shifted=False), False),
    "without scaled positions": (_detail(scaled_positions=False), False),
    "without scaled time": (_unscaled_time, False),
    "proxy at the detail's timestep": (_detail(clean_proxy=False), False),
    "no detail adapter": (_detail(lora=None), False),
    "tiles, each alone": (_tiles, False),
}
RECONSTRUCTED, UPSAMPLED, NATIVE = "a true render through the VAE", "upsampled proxy", "native full attention"


@dataclass(frozen=True)
class Arm:
    """How an arm makes the video of a prompt above the proxy in a run directory:
    `make(plan, attributes, proxy, video)`. `warm` loads what it needs, which is not timed."""

    name: str
    session: Session
    trained: bool
    warm: Callable[[Plan], object]
    make: Callable[[Plan, world.Attributes, Path, Path], object]


def arms(request: Request, console: Console) -> Iterator[Arm]:
    """Every arm; of those that sample, all that the preset does not come to anyway."""
    base = Session(request.preset, request.model_path)
    yield Arm(RECONSTRUCTED, base, True, lambda plan: base.vae(), partial(reconstruct, base))
    yield Arm(UPSAMPLED, base, True, lambda plan: base.vae(), partial(upsample, base))
    for name, (change, trained) in SAMPLED.items():
        if name == WHOLE or change(base.preset) != base.preset:
            yield _sampled(name, Session(change(base.preset), request.model_path), trained, console)
    yield _native(base)


def _sampled(name: str, session: Session, trained: bool, console: Console) -> Arm:
    def warm(plan: Plan) -> None:
        session.detail_models(placement_of(plan).offload, console)
        session.vae()

    def make(plan: Plan, attributes: world.Attributes, proxy: Path, video: Path) -> None:
        latents = pipeline.refine(session, plan, proxy / "proxy.safetensors", video.with_suffix(""), console)
        pipeline.decode(session, latents, video, plan.request.codec, console)

    return Arm(name, session, trained, warm, make)


def _native(session: Session) -> Arm:
    """diffusers' WanPipeline with the base weights under full attention at the asked size, with the proxy's steps."""

    @cache
    def load() -> WanPipeline:
        text, model = load_text(session.folder), load_transformer(session.folder, dtype=session.dtype)
        scheduler = load_scheduler(session.folder, session.preset.proxy.flow_shift, session.preset.proxy.sampler)
        pipe = WanPipeline(*text, session.vae(), scheduler, model).to(session.device)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def make(plan: Plan, attributes: world.Attributes, proxy: Path, video: Path) -> None:
        grid, geometry = plan.native_grid, session.preset.geometry
        frames = load()(
            plan.request.prompt,
            plan.request.negative_prompt,
            height=grid.h * geometry.token_pixels,
            width=grid.w * geometry.token_pixels,
            num_frames=(grid.t - 1) * geometry.temporal + 1,
            num_inference_steps=plan.proxy.steps,
            guidance_scale=plan.proxy.guidance_scale,
            generator=torch.Generator().manual_seed(plan.request.seed),
            output_type="pt",
        ).frames[0]
        write_video(video, iter(frames.float().cpu()), **_shape(plan))

    return Arm(NATIVE, session, True, lambda plan: load(), make)


def reconstruct(session: Session, plan: Plan, attributes: world.Attributes, proxy: Path, video: Path) -> None:
    """A true render encoded and decoded again: what the VAE costs, and so the best that any arm can reach."""
    scene, grid, geometry = true_scene(plan, attributes), plan.target, session.preset.geometry
    width, height = grid.w * geometry.token_pixels, grid.h * geometry.token_pixels
    window = (0.0, 0.0, height / (plan.request.height * plan.scale))
    times = torch.arange((grid.t - 1) * geometry.temporal + 1) / plan.fps
    latents = encode_stream(session.vae(), (world.render(scene, t[None], height, width, window)[:, 0] for t in times))
    tile = vae_tile(session.preset, *latents.shape[2:])
    frames = decode_stream(session.vae(), latents, tile, video.parent)
    sizes = plan.request.height * plan.scale, plan.request.width * plan.scale
    cropped = (frame[:, : sizes[0], : sizes[1]] for frame in frames)
    write_video(video, (F.avg_pool2d(frame, plan.scale) for frame in cropped), **_shape(plan))


def upsample(session: Session, plan: Plan, attributes: world.Attributes, proxy: Path, video: Path) -> None:
    """The proxy made as large as the video by bicubic interpolation, each of its frames shown until the next."""
    latents, _ = read_latents(proxy / "proxy.safetensors", session, "vae")
    width, height = plan.proxy_size
    size = plan.request.height, plan.request.width

    def frames() -> Iterator[torch.Tensor]:
        tile = vae_tile(session.preset, *latents.shape[2:])
        for frame in decode_stream(session.vae(), latents, tile, video.parent):
            large = F.interpolate(frame[None, :, :height, :width], size=size, mode="bicubic")[0].clamp(0, 1)
            yield from itertools.repeat(large, plan.proxy.time_ratio)

    write_video(video, frames(), **_shape(plan))


def _shape(plan: Plan) -> dict[str, Any]:
    request = plan.request
    size = {"width": request.width, "height": request.height, "fps": plan.fps, "frame_count": plan.frames}
    return {**size, "codec": request.codec}
