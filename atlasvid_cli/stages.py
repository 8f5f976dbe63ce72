"""A sampling stage: its grid and all that decides how it is denoised."""

import dataclasses
from dataclasses import dataclass
from fractions import Fraction

from .presets import Detail, Experts, Level, Preset, Sampler, Upsample
from .shapes import Grid, Spacing


@dataclass(frozen=True)
class Stage:
    """A sampling stage: the proxy, or a detail level that climbs from a grid `ratio` times smaller in space and
    `time_ratio` times slower."""

    grid: Grid
    ratio: Fraction
    time_ratio: int
    steps: int
    strength: float
    guidance_scale: float
    flow_shift: float
    sampler: Sampler = "euler"
    experts: Experts | None = None
    scaled_time: bool = True
    position_scale: float = 1.0
    autoguidance: float = 0.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_batch: bool = False
    upsample: Upsample = "latents"
    entry: str | None = None

    @property
    def spacing(self) -> Spacing:
        """Of stage 1's positions."""
        return Spacing(self.time_ratio if self.scaled_time else 1, self.position_scale)

    @property
    def in_pixels(self) -> bool:
        """Whether the level below is decoded, made as large and encoded again to start from."""
        return self.upsample == "pixels" and self.strength < 1

    @property
    def together(self) -> int:
        """Prompts in one forward."""
        return self.passes if self.guidance_batch else 1

    @property
    def passes(self) -> int:
        """Prompts that are denoised with: two where guidance acts, if only at some steps or in one expert."""
        second = self.experts.guidance_scale if self.experts else 0
        return 2 if max(self.guidance_scale, second) > 1 else 1

    @property
    def is_autoguided(self) -> bool:
        """Whether a guided step takes one more forward, without the adapter."""
        return self.passes == 2 and self.autoguidance > 0

    def is_guided(self, sigma: float) -> bool:
        """Whether the step at `sigma` takes a forward with each prompt, and not one with the first."""
        low, high = self.guidance_interval
        return self.passes == 2 and low <= sigma <= high

    def forwards(self, steps: int | None = None) -> int:
        """Forwards of the first `steps` steps, by default of all; both experts count as guided where one is."""
        from .schedule import sigmas

        steps = self.steps if steps is None else steps
        guided = sum(map(self.is_guided, sigmas(self.steps, self.strength, self.flow_shift)[:steps]))
        return steps + guided * (1 + self.is_autoguided)


def proxy_stage(preset: Preset, grid: Grid, time_ratio: int) -> Stage:
    """Stage 1 on a grid as a preset samples it."""
    proxy = preset.proxy
    return Stage(
        grid,
        Fraction(1),
        time_ratio,
        steps=proxy.steps,
        strength=1.0,
        guidance_scale=proxy.guidance_scale,
        flow_shift=proxy.flow_shift,
        sampler=proxy.sampler,
        experts=preset.experts,
        scaled_time=proxy.scaled_time,
        position_scale=proxy.position_scale,
        autoguidance=proxy.autoguidance,
    )


def level_stage(detail: Detail, level: Level, grid: Grid, ratio: Fraction, time_ratio: int) -> Stage:
    """A detail level on a grid as a preset samples it. Below a ratio of 2 frames half as large would lose detail."""
    level = level if ratio >= 2 else dataclasses.replace(level, entry=None)
    return Stage(grid, ratio, time_ratio, flow_shift=detail.flow_shift, **vars(level))
