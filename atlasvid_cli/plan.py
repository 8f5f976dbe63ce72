"""Preset + flags -> numbers: grids, windows, steps, FLOPs, bytes, seconds. Stages take a `Plan` and never see flags."""

import dataclasses
import math
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import shapes
from .errors import UsageError
from .flops import context_flops, detail_flops, full_flops, linear_flops
from .memory import Offload, WeightDtype
from .parse import Lora
from .presets import Preset, Sampler, Transformer, load_preset
from .shapes import Grid, Shape
from .stages import Stage, level_stage, proxy_stage

if TYPE_CHECKING:
    from .footage import Clip


ALGORITHM = 2  # raised by whoever changes what the same plan and weights give: kept work is not taken for the new
MAX_LATENTS = 1 << 14  # latent frames: beyond, noise would repeat (`schedule.noise`)
# what of a preset's `Detail` is in a level's grid, ratio and sampling, or in the hash of weights, or changes no latents
ELSEWHERE = {"min_ratio", "max_ratio", "flow_shift", "first", "upper", "lora", "chunk"}


@dataclass(frozen=True)
class Request:
    """What the user asked for. Sizes in pixels; `region` (x, y, w, h), `frames` (first, end), `clip` as the proxy.

    The prompts are those of stage 1: above a saved proxy its own are taken.
    `steps`, `guidance_scale` and `flow_shift` are of the proxy, or where that is there already of the levels above it.
    """

    preset: str
    width: int
    height: int
    seconds: Fraction
    prompt: str = ""
    negative_prompt: str = ""
    fps: int | None = None
    seed: int = 0
    steps: int | None = None
    guidance_scale: float | None = None
    flow_shift: float | None = None
    sampler: Sampler | None = None  # of the proxy
    chunk: int | None = None
    codec: str = "h264"
    region: tuple[int, int, int, int] | None = None
    frames: tuple[int, int] | None = None
    model_path: str | None = None
    offload: Offload | None = None
    weight_dtype: WeightDtype = "auto"
    attention_backend: str | None = None
    compiled: bool = False
    loras: tuple[Lora, ...] = ()
    strict: bool = False
    clip: "Clip | None" = None
    proxy_only: bool = False


@dataclass(frozen=True)
class Plan:
    """A resolved job. `scale` is the factor by which a small video is generated larger and box-filtered down."""

    request: Request
    preset: Preset
    fps: int
    frames: int
    scale: int
    proxy: Stage
    levels: tuple[Stage, ...]
    given_proxy: bool = False  # the proxy exists already

    @property
    def chunk(self) -> int:
        return self.request.chunk or self.preset.detail.chunk

    @property
    def is_region(self) -> bool:
        """Whether only a part of a finished video is sampled again."""
        return self.request.region is not None or self.request.frames is not None

    @property
    def proxy_fps(self) -> Fraction:
        return Fraction(self.fps, self.proxy.time_ratio)

    @property
    def proxy_size(self) -> tuple[int, int]:
        """Width and height in pixels of what the video shows of its proxy."""
        ratio = math.prod((level.ratio for level in self.levels), start=Fraction(1, self.scale))
        size = self.request.width, self.request.height
        return shapes.shown_size(size, ratio, self.proxy.grid, self.preset.geometry)

    @property
    def target(self) -> Grid:
        return self.levels[-1].grid

    @property
    def target_latents(self) -> tuple[int, int]:
        """Height and width of the video's latents."""
        patch = self.preset.geometry.patch
        return self.target.h * patch, self.target.w * patch

    @property
    def region(self) -> tuple[Shape, Shape]:
        """The first and the end tokens (t, h, w) of the part of the last level that is asked for."""
        x, y, w, h = self.request.region or (0, 0, self.request.width, self.request.height)
        box = x * self.scale, y * self.scale, w * self.scale, h * self.scale
        return shapes.tokens_of(box, self.request.frames or (0, self.frames), self.target, self.preset.geometry)

    @property
    def region_shown(self) -> tuple[tuple[int, int, int, int], tuple[int, int]]:
        """The box (x, y, w, h) and the frames first..end of the video that such whole tokens are."""
        (x, y, w, h), (first, end) = shapes.box_of(*self.region, self.preset.geometry)
        x, y, right, bottom = (side // self.scale for side in (x, y, x + w, y + h))
        size = min(right, self.request.width) - x, min(bottom, self.request.height) - y
        return (x, y, *size), (first, min(end, self.frames))

    def sampled(self, stage: Stage) -> Grid:
        """The grid that a stage computes: of a region's level that part and its halo."""
        if not (self.is_region and stage is self.levels[-1]):
            return stage.grid
        low, high = shapes.with_halo(*self.region, stage.grid, self.preset.detail.halo)
        return Grid(*(b - a for a, b in zip(low, high, strict=True)))

    def key(self, stage: Stage | None = None) -> dict[str, Any]:
        """The fields that decide a stage's latents, given those below it (or the whole job): what is hashed."""
        if stage is None:
            stages = () if self.given_proxy else (self.proxy,)
            return {"stages": [self.key(s) for s in (*stages, *self.levels)]}
        fields = {"algorithm": ALGORITHM, "preset": self.preset.name, "seed": self.request.seed}
        if stage is self.proxy and (clip := self.request.clip):
            shown = {"grid": _plain(stage.grid), "size": list(self.proxy_size), **self._played}
            return {**fields, "clip": clip.sha256, **shown}
        sampled = dataclasses.replace(stage, entry=None)  # the file is known by what it holds (`Session.pixels_hash`)
        own = _plain(sampled)
        if not stage.is_autoguided:
            del own["autoguidance"]
        if stage.position_scale == 1:
            del own["position_scale"]
        fields |= {"stage": own, "text_length": self.preset.transformer.text_length}
        if stage is self.proxy:
            fields |= {"shown": list(self.proxy_size), **self._played}  # by its preview, and by what refine makes of it
        else:
            method = (f.name for f in dataclasses.fields(self.preset.detail) if f.name not in ELSEWHERE)
            fields |= {name: _plain(getattr(self.preset.detail, name)) for name in method}
        if stage is self.levels[-1]:
            fields |= {"size": [self.request.width, self.request.height, self.frames, self.scale, self.fps]}
        return fields

    def flops(self, stage: Stage, keeps: bool = True) -> int:
        """FLOPs of a stage over all its steps, and of a level's proxy stream, which runs once a pass, or beside every
        forward where what it makes is not kept."""
        size, patch, grid, detail = *self._sizes, self.sampled(stage), self.preset.detail
        if stage is self.proxy:
            return full_flops(size, patch, grid.tokens) * stage.forwards()
        below = self.below(stage)
        forward = detail_flops(size, patch, detail, grid, below, stage.ratio, stage.time_ratio)
        context = context_flops(size, patch, detail.proxy_window, below) if detail.proxy_attention else 0
        times = stage.passes if detail.clean_proxy and keeps else stage.forwards()
        return forward * stage.forwards() + context * times

    @property
    def native_grid(self) -> Grid:
        """What full attention at the asked size would denoise: a small video is not generated larger for it."""
        geometry, request = self.preset.geometry, self.request
        frames = shapes.frames_to_generate(self.frames, geometry.temporal)
        return shapes.video_grid(request.width, request.height, frames, geometry)

    def native_flops(self, steps: int, passes: int) -> int:
        """FLOPs of denoising the asked size under full attention, as WanPipeline does: text is padded."""
        size, patch = self._sizes
        return full_flops(size, patch, self.native_grid.tokens, size.text_length) * steps * passes

    @property
    def attention_free_ceiling(self) -> float:
        """The most that removing all attention can speed up native denoising, at equal steps (DESIGN §1)."""
        return self.native_flops(1, 1) / (self.native_grid.tokens * linear_flops(*self._sizes))

    def at_equal_steps(self, steps: int) -> "Plan":
        """The same job with `steps` and the proxy's guidance at every level, which is what native is compared with."""
        proxy = dataclasses.replace(self.proxy, steps=steps, autoguidance=0.0)
        guidance = proxy.guidance_scale
        levels = (
            dataclasses.replace(s, steps=steps, guidance_scale=guidance, guidance_interval=(0.0, 1.0))
            for s in self.levels
        )
        return dataclasses.replace(self, proxy=proxy, levels=tuple(levels))

    def windows(self, stage: Stage) -> int:
        """Windows of the first block of a stage; the proxy is one."""
        if stage is self.proxy:
            return 1
        count = 1
        for size, length in zip(dataclasses.astuple(self.sampled(stage)), self.preset.detail.windows[0], strict=True):
            count *= -(-size // length)
        return count

    @property
    def summary(self) -> dict[str, Any]:
        return {
            "preset": self.preset.name,
            "size": f"{self.request.width}x{self.request.height}",
            "frames": self.frames,
            "fps": self.fps,
            "seconds": float(Fraction(self.frames, self.fps)),
            "tokens": self.target.tokens,
            "generated": f"{self.scale}x" if self.scale > 1 else "1x",
            "codec": self.request.codec,
        }

    def own_stages(self) -> list[tuple[str, Stage]]:
        """The stages that this job samples: of a region the last level alone."""
        if self.is_region:
            return self.named_stages()[-1:]
        end = 1 if self.request.proxy_only else None
        return self.named_stages()[self.given_proxy or self.request.clip is not None : end]

    def named_stages(self) -> list[tuple[str, Stage]]:
        names = ["proxy", *(f"detail {i + 1}/{len(self.levels)}" for i in range(len(self.levels)))]
        return list(zip(names, (self.proxy, *self.levels), strict=True))

    def to_json(self) -> dict[str, Any]:
        stages = [{"stage": name, **_plain(stage)} for name, stage in self.own_stages()]
        return {"summary": self.summary, "request": _plain(self.request), "stages": stages}

    def below(self, stage: Stage) -> Grid:
        """The grid of what guides a level: the part of the level below that it is aligned with."""
        index = self.levels.index(stage)
        below = self.levels[index - 1].grid if index else self.proxy.grid
        aligned = shapes.proxy_grid(stage.grid, stage.ratio, stage.time_ratio)
        return Grid(min(below.t, aligned.t), min(below.h, aligned.h), min(below.w, aligned.w))

    @property
    def _played(self) -> dict[str, str]:
        return {"fps": str(self.fps), "seconds": str(self.request.seconds)}

    @property
    def _sizes(self) -> tuple[Transformer, int]:
        return self.preset.transformer, self.preset.geometry.patch


def make_plan(
    request: Request,
    proxy: Grid | None = None,
    proxy_fps: Fraction | None = None,
    preset: Preset | None = None,
    ratio: Fraction | None = None,
) -> Plan:
    """Resolves a request; with the grid and fps of a saved `proxy`, its levels climb from that, in all by a known
    `ratio`, else by that of the grids. Raises UsageError.

    A changed `preset` takes the place of the one that the request names.
    """
    preset = preset or load_preset(request.preset)
    fps = request.fps or preset.fps
    geometry, detail = preset.geometry, preset.detail
    written = shapes.frames_to_write(request.seconds, fps)
    if written < 1:
        raise UsageError(f"--seconds {float(request.seconds):g} at {fps} fps is less than one frame; ask for more")
    generated = shapes.frames_to_generate(written, geometry.temporal)
    scale = shapes.supersample(
        request.width, request.height, geometry.token_pixels, preset.proxy.base_tokens, detail.min_ratio
    )
    target = shapes.video_grid(request.width * scale, request.height * scale, generated, geometry)
    if target.t > MAX_LATENTS:
        raise UsageError(f"{generated} frames are more than can be made; ask for fewer --seconds or --fps")
    time_ratio = preset.proxy.time_ratio
    if proxy_fps is not None:
        if fps / proxy_fps not in (1, time_ratio):
            raise UsageError(
                f"latents at {proxy_fps} fps cannot guide a video at {fps} fps; use --fps {proxy_fps * time_ratio}"
            )
        time_ratio = int(fps / proxy_fps)
    base = shapes.base_grid(target, preset.proxy.base_tokens, detail.max_ratio, time_ratio)
    if proxy is not None:
        if proxy.t < base.t:
            raise UsageError(f"the proxy is shorter than {float(request.seconds):g} s; make a longer one")
        base = proxy
    stage_1 = proxy_stage(preset, base, time_ratio)
    given = {name: getattr(request, name) for name in ("steps", "guidance_scale", "flow_shift")}
    given = {name: value for name, value in given.items() if value is not None}  # of the proxy, or of the levels above
    if proxy is None:
        stage_1 = dataclasses.replace(stage_1, **given, sampler=request.sampler or stage_1.sampler)
        if stage_1.experts and "guidance_scale" in given:  # both follow it
            experts = dataclasses.replace(stage_1.experts, guidance_scale=given["guidance_scale"])
            stage_1 = dataclasses.replace(stage_1, experts=experts)
    levels = []
    for i, (grid, step) in enumerate(shapes.climb(base, target, detail.max_ratio, ratio)):
        from_proxy = i == 0 and time_ratio == preset.proxy.time_ratio  # and not from an earlier result
        level = detail.first if from_proxy else detail.upper
        stage = level_stage(detail, level, grid, step, 1 if i else time_ratio)
        levels.append(stage if proxy is None else dataclasses.replace(stage, **given))
    return Plan(request, preset, fps, written, scale, stage_1, tuple(levels), proxy is not None)


def _plain(value: Any) -> Any:
    """A dataclass as JSON can hold it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, (Fraction, Path)) else value
