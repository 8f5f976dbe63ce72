"""Pictures of what an adapter in training makes of held-out clips, for those who watch it learn."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel

from .decode import decode_stream
from .decode_cost import vae_tile
from .model import TextContext, text_context
from .proxy import Expert, sample_proxy
from .refine import Stream, sample_detail
from .schedule import sigmas
from .session import Session
from .stages import Stage, level_stage, proxy_stage
from .train import PATCH, Embed, grid_of
from .video import contact_sheet, write_png
from .wear import wear
from .weights import load_scheduler, load_vae

SHOWN = 2  # held-out samples
FRAMES = 5  # of each, evenly spread
THUMBNAIL = 320  # pixels of the longer side
SEED = 0


@dataclass(frozen=True)
class Sampler:
    """Samples `held_out` with the models in training, as `render` would but without autoguidance: their own grids,
    the preset's steps.

    `model` is the one in training, `bare` the other stream's in stage 2 where the adapter acts on one alone. One that
    works between two `sigmas` alone starts stage 1 from the truth noised to the upper and steps from the lower to 0.
    """

    session: Session
    stage: str
    bare: WanTransformer3DModel
    model: WanTransformer3DModel
    held_out: Sequence[dict]
    embed: Embed
    folder: Path
    guidance_scale: float
    sigmas: tuple[float, float]

    def show(self, step: int) -> None:
        """Writes `folder/step-<step>-<sample>.png`: a row of frames of the truth, and below it one as sampled."""
        make = self._proxy if self.stage == "proxy" else self._detail
        vae = load_vae(self.session.folder).to(self.session.device)
        self.folder.mkdir(exist_ok=True)
        for number, sample in enumerate(self.held_out[:SHOWN]):
            frames = [f for x in (sample["latents"].float(), make(sample)) for f in _frames(self.session, vae, x)]
            write_png(self.folder / f"step-{step:06d}-{number}.png", contact_sheet(frames, FRAMES))

    def _proxy(self, sample: dict) -> torch.Tensor:
        preset, grid = self.session.preset, grid_of(sample["latents"])
        stage = proxy_stage(preset, grid, preset.proxy.time_ratio)
        if self.sigmas != (0.0, 1.0):
            return self._part_of_proxy(sample, stage)
        prompt, negative = self._texts(self.model, sample["caption"], preset.negative_prompt)
        expert = Expert(self.model, prompt, negative, self.guidance_scale)
        scheduler = load_scheduler(self.session.folder, stage.flow_shift, stage.sampler)
        return sample_proxy(lambda _: expert, scheduler, stage, preset.transformer.channels, PATCH, SEED)

    def _part_of_proxy(self, sample: dict, stage: Stage) -> torch.Tensor:
        low, high = self.sigmas
        inside = [s for s in sigmas(stage.steps, 1.0, stage.flow_shift) if low <= s < high]
        schedule = [high, *(s for s in inside if s > 0), 0.0]
        figures = stage.spacing, [schedule], torch.Generator().manual_seed(SEED)
        negative = self.embed(self.session.preset.negative_prompt)
        latents, prompts = sample["latents"].float()[None], [self.embed(sample["caption"])]
        return wear(self.model, latents, prompts, *figures, self.guidance_scale, negative)[0]

    def _detail(self, sample: dict) -> torch.Tensor:
        preset, ratio = self.session.preset, Fraction(sample["ratio"])
        time_ratio, detail = preset.proxy.time_ratio, preset.detail
        level = detail.first
        if f"proxy_{time_ratio}" not in sample:
            level, time_ratio = detail.upper, 1
        stage = level_stage(detail, level, grid_of(sample["latents"]), ratio, time_ratio)
        prompts = (sample["caption"], preset.negative_prompt)[: stage.passes]
        stream, guide = (Stream(model, self._texts(model, *prompts)) for model in (self.bare, self.model))
        below = sample[f"proxy_{time_ratio}"].float()
        enlarged = sample.get(f"enlarged_{time_ratio}")
        start = None if enlarged is None else enlarged.float()
        return sample_detail(stream, guide, stage, detail, PATCH, SEED, 1, below, chunk=detail.chunk, enlarged=start)

    def _texts(self, model: WanTransformer3DModel, *prompts: str) -> list[TextContext]:
        length = self.session.preset.transformer.text_length
        with torch.no_grad():
            return [text_context(model, [self.embed(prompt)], length) for prompt in prompts]


def _frames(session: Session, vae: torch.nn.Module, latents: torch.Tensor) -> list[torch.Tensor]:
    """`FRAMES` thumbnails (3, h, w) in 0..1, evenly spread over a clip of normalised latents (C, T, H, W)."""
    tile = vae_tile(session.preset, *latents.shape[2:])
    made = torch.stack(list(decode_stream(vae, latents, tile)))
    chosen = made[torch.linspace(0, len(made) - 1, FRAMES).round().long()]
    factor = min(1.0, THUMBNAIL / max(chosen.shape[2:]))
    return list(F.interpolate(chosen, scale_factor=factor, mode="area"))
