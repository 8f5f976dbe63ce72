"""Trains encoders to give what the embedded VAE's gives: one that looks at one frame near the pixels, and a first level
for frames half as large."""

import math
import random
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan

from .enlarge import resized
from .half import HalfEncoder
from .machine import cpu_autocast
from .train_vae import batch, crop, fit, let_learn
from .vae_clips import clip_moments, clip_pixels
from .vae_cost import space_factor


def disturbed(clips: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """Clips (n, 3, f, h, w) by chance as frames enlarged from a smaller and slower video, or with soft noise on them.

    An encoder sees such frames where a level starts from the one below, and in videos of another world.
    """
    x, (n, _, _, h, w) = clips, clips.shape
    if rng.random() < 0.4:
        ratio = rng.choice((2.0, 2.4, 3.0, 4.0))
        small = F.interpolate(x.transpose(1, 2).flatten(0, 1), (round(h / ratio), round(w / ratio)), mode="area")
        x = F.interpolate(small, (h, w), mode="bicubic").unflatten(0, (n, -1)).transpose(1, 2)
    if rng.random() < 0.4:
        x = _slowed(x, rng.choice((2, 4)))
    if rng.random() < 0.2:
        x = _with_soft_noise(x, rng)
    return x.clamp(-1, 1)


def _slowed(clips: torch.Tensor, slower: int) -> torch.Tensor:
    """Every so manieth frame, and blends of those in place of the others."""
    kept, at = clips[:, :, ::slower], torch.arange(clips.shape[2])
    before, part = at // slower, (at % slower / slower).view(-1, 1, 1)
    after = (before + 1).clamp(max=kept.shape[2] - 1)
    return torch.lerp(kept[:, :, before], kept[:, :, after], part)


def _with_soft_noise(clips: torch.Tensor, rng: random.Random) -> torch.Tensor:
    n, _, frames, h, w = clips.shape
    generator = torch.Generator().manual_seed(rng.getrandbits(40))
    side, slower = rng.choice((4, 8, 16, 32)), rng.choice((2, 4, 8))
    noise = torch.randn(n, 3, max(1, frames // slower), side, side, generator=generator)
    return clips + rng.random() * F.interpolate(noise, (frames, h, w), mode="trilinear")


def enlarged(
    vae: AutoencoderKLWan, rng: random.Random, count: int, size: int, frames: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Clips (count, 3, frames, size, size) as a detail level starts from them, made two to four times as large, and
    the same half as large. Half of the draws were decoded, as there; some hold blends of frames, or soft noise."""
    ratio, factor = Fraction(rng.randint(32, 64), 16), space_factor(vae.config)
    x = torch.stack([crop(rng, math.ceil(size / ratio / factor) * factor, frames) for _ in range(count)])
    if rng.random() < 0.5:
        with torch.no_grad(), cpu_autocast():
            x = clip_pixels(vae, clip_moments(vae, x)[:, : vae.config.z_dim]).float()
    if rng.random() < 0.4:
        x = _slowed(x, 4)
    if rng.random() < 0.2:
        x = _with_soft_noise(x, rng).clamp(-1, 1)

    singles = x.transpose(1, 2).flatten(0, 1)
    large, small = (
        torch.stack([resized(frame, by, (side, side)) for frame in singles])
        for by, side in ((ratio, size), (ratio / 2, size // 2))
    )
    return large.unflatten(0, (count, -1)).transpose(1, 2), small.unflatten(0, (count, -1)).transpose(1, 2)


def distil_encoder(
    vae: AutoencoderKLWan,
    teacher: AutoencoderKLWan,
    folder: Path,
    steps: int,
    lr: float,
    seed: int = 0,
    shapes: Sequence[tuple[int, int, int]] = ((3, 96, 9),),
) -> AutoencoderKLWan:
    """Trains the encoder of `vae` to give the latents that `teacher`'s gives (`train_vae.fit`). The decoder stays as it
    is."""

    def loss_at(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        x = disturbed(batch(seed, step, *shapes[step % len(shapes)]), random.Random(f"{seed}/{step}/disturbed"))
        with torch.no_grad(), cpu_autocast():
            target = clip_moments(teacher, x)
        with cpu_autocast():
            made = clip_moments(vae, x)
        return _error(made, target, vae.config.z_dim)

    fit(let_learn(vae, "encoder.", "quant_conv."), folder, steps, lr, loss_at)
    return vae


def distil_entry(
    vae: AutoencoderKLWan,
    folder: Path,
    steps: int,
    lr: float,
    seed: int = 0,
    shapes: Sequence[tuple[int, int, int]] = ((4, 96, 9),),
) -> HalfEncoder:
    """An encoder for frames half as large (`half`), trained to give of them the latents that the encoder of `vae`
    gives of whole ones (`train_vae.fit`)."""
    torch.manual_seed(seed)
    encoder = HalfEncoder(vae.requires_grad_(False).encoder)
    for parameter in encoder.own().values():
        parameter.requires_grad_(True)

    def loss_at(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        large, small = enlarged(vae, random.Random(f"{seed}/{step}/enlarged"), *shapes[step % len(shapes)])
        with torch.no_grad(), cpu_autocast():
            target = clip_moments(vae, large)
        with cpu_autocast():
            made = clip_moments(vae, small, encoder)
        return _error(made, target, vae.config.z_dim)

    fit(encoder, folder, steps, lr, loss_at)
    return encoder


def _error(made: torch.Tensor, target: torch.Tensor, channels: int) -> tuple[torch.Tensor, dict[str, float]]:
    """The loss of moments (n, C, T, h, w) whose means are the first `channels`, and "error": the RMS error of the means
    over their RMS spread."""
    made, target = made.float(), target.float()
    wrong = (made - target).square()
    error = wrong[:, :channels].mean() / target[:, :channels].var(dim=(0, 2, 3, 4)).mean()
    return error + 0.01 * wrong[:, channels:].mean(), {"error": round(math.sqrt(error.item()), 4)}
