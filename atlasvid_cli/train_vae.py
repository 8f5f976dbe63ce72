"""Trains the embedded model's VAE from nothing on random-zoom crops of the procedural world.

The schedule is a function of elapsed training steps, and every step draws its batch from the seed and its own number,
so a run that is stopped and started again sees the same data.
"""

import json
import math
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResidualBlock
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from . import world
from .causal import is_idle
from .checkpoint import load_checkpoint, save_checkpoint
from .loop import cut_log
from .machine import cpu_autocast
from .optim import Optimizer, learning_rate
from .vae_clips import clip_moments, clip_pixels

KL_WEIGHT, DRIFT_WEIGHT = 1e-4, 0.2
HELD_FRAMES = 24  # a multiple of the temporal stride
SAVE_STEPS, LOG_STEPS = 500, 25


def build(config: dict, seed: int = 0) -> AutoencoderKLWan:
    """A VAE with random weights whose middle attention is switched off, which makes tiled coding exact."""
    torch.manual_seed(seed)
    vae = AutoencoderKLWan(**config)
    for part in (vae.encoder, vae.decoder):
        for attention in part.mid_block.attentions:
            torch.nn.init.zeros_(attention.proj.weight)
            torch.nn.init.zeros_(attention.proj.bias)
    return let_learn(vae, "")


def let_learn(vae: AutoencoderKLWan, *parts: str) -> AutoencoderKLWan:
    """Lets the parameters learn whose names begin with one of `parts`, and no other; middle attention and idle blocks
    never."""
    for name, parameter in vae.named_parameters():
        parameter.requires_grad_(name.startswith(parts) and "attentions" not in name)
    for block in vae.modules():
        if isinstance(block, WanResidualBlock) and is_idle(block):
            block.requires_grad_(False)
    return vae


@torch.no_grad()
def compress(vae: AutoencoderKLWan, channels: int) -> AutoencoderKLWan:
    """The same VAE with fewer latent channels: the principal components of its latents, half whitened.

    Training leaves the latents in a small subspace of their channels, and a diffusion model would have to carry noise
    in all the others. `quant_conv` and `post_quant_conv` become identities, folded into their neighbours.
    """
    old = vae.config.z_dim
    latents = [clip_moments(vae, batch(-1, i, 6, 96, 9))[:, :old].transpose(0, 1).flatten(1) for i in range(10)]
    values = torch.cat(latents, dim=1)
    variance, axes = torch.linalg.eigh(torch.cov(values))
    variance, axes, mean = variance.flip(0)[:channels], axes.flip(1)[:, :channels], values.mean(1)
    scale = variance.pow(-0.25)
    inward, outward = scale[:, None] * axes.T, axes / scale
    zeros, ones = [0.0] * channels, [1.0] * channels
    small = build({**vae.config, "z_dim": channels, "latents_mean": zeros, "latents_std": ones})
    changed = ("quant_conv.", "post_quant_conv.", "encoder.conv_out.", "decoder.conv_in.")
    small.load_state_dict({k: v for k, v in vae.state_dict().items() if not k.startswith(changed)}, strict=False)
    for conv in (small.quant_conv, small.post_quant_conv):
        conv.weight.copy_(torch.eye(conv.weight.shape[0]).view_as(conv.weight))
        conv.bias.zero_()
    to_mean = inward @ vae.quant_conv.weight[:old].flatten(1)
    out = small.encoder.conv_out
    out.weight.zero_()
    out.weight[:channels] = torch.einsum("ij,jcthw->icthw", to_mean, vae.encoder.conv_out.weight)
    out.bias[:channels] = to_mean @ vae.encoder.conv_out.bias + inward @ (vae.quant_conv.bias[:old] - mean)
    out.bias[channels:] = math.log(0.1**2)
    back = vae.post_quant_conv.weight.flatten(1)
    kernel = vae.decoder.conv_in.weight
    small.decoder.conv_in.weight.copy_(torch.einsum("dcthw,ci->dithw", kernel, back @ outward))
    constant = back @ mean + vae.post_quant_conv.bias
    small.decoder.conv_in.bias.copy_(vae.decoder.conv_in.bias + kernel.sum((2, 3, 4)) @ constant)
    return small


def crop(rng: random.Random, size: int, frames: int, zoom: float | None = None) -> torch.Tensor:
    """A (3, frames, size, size) crop of a random scene, at a zoom from the whole 160 px frame to a 4K close-up.

    Half of the close-ups are centred on the outline of the object, where there is something to see.
    """
    aspect = rng.choice((16 / 9, 1.0, 9 / 16, 2.37))
    fps = rng.choice((4.0, 16.0))
    seconds = (frames - 1) / fps
    scene = world.sample_scene(rng, aspect, max(seconds, 4.0))
    zoom = zoom or math.exp(rng.uniform(0.0, math.log(2160 / 160)))
    shown = size / (160 * zoom)
    start = rng.uniform(0.0, max(0.0, 4.0 - seconds))
    times = start + torch.arange(frames) / fps
    if rng.random() < 0.6:  # somewhere on the object's outline, halfway through the crop
        dx, dy = world.DIRECTIONS[scene.direction]
        middle = scene.speed * float(times[frames // 2])
        angle = rng.uniform(0, 2 * math.pi)
        x = scene.start[0] + dx * middle + scene.size * math.cos(angle) * rng.random() ** 0.3 - shown / 2
        y = scene.start[1] + dy * middle + scene.size * math.sin(angle) * rng.random() ** 0.3 - shown / 2
    else:
        x, y = rng.uniform(0, max(0.0, aspect - shown)), rng.uniform(0, max(0.0, 1 - shown))
    return world.render(scene, times, size, size, (x, y, shown))


def batch(seed: int, step: int, count: int, size: int, frames: int) -> torch.Tensor:
    rng = random.Random(f"{seed}/{step}")
    return torch.stack([crop(rng, size, frames) for _ in range(count)])


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of two tensors in -1..1."""
    return 10 * math.log10(4.0 / max(F.mse_loss(a, b).item(), 1e-12))


@torch.no_grad()
def evaluate(vae: AutoencoderKLWan, clips: int = 4, size: int = 160, frames: int = 25) -> dict[str, float]:
    """Mean PSNR (dB) of held-out clips at each zoom from whole frame (1) to 4K crop (13.5)."""
    result = {}
    for zoom in (1.0, 2.0, 4.0, 8.0, 13.5):
        rng = random.Random(f"held-out/{zoom}")
        x = torch.stack([crop(rng, size, frames, zoom) for _ in range(clips)])
        y = clip_pixels(vae, clip_moments(vae, x)[:, : vae.config.z_dim])
        result[f"{zoom:g}"] = round(sum(psnr(a, b) for a, b in zip(y, x, strict=True)) / clips, 2)
    result["mean"] = round(sum(result.values()) / len(result), 2)
    return result


@torch.no_grad()
def settled(vae: AutoencoderKLWan, x: torch.Tensor) -> torch.Tensor:
    """The latents of clips (n, 3, f, h, w) as if their first frame had stood still for long before them.

    `vae` sees zeros before a clip, and what they do to its latents fades over some 16 frames.
    """
    held = x[:, :, :1].expand(-1, -1, HELD_FRAMES, -1, -1)
    return clip_moments(vae, torch.cat([held, x], dim=2))[:, : vae.config.z_dim, HELD_FRAMES // 4 :]


def cut_sides(latents: torch.Tensor, pixels: torch.Tensor, rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents (..., h, w) and their pixels (..., H, W) with or without each side's outermost latent, by chance."""
    _, _, _, h, w = latents.shape
    scale = pixels.shape[-1] // w
    top, left, bottom, right = (rng.randint(0, 1) for _ in range(4))
    kept = latents[..., top : h - bottom, left : w - right]
    return kept, pixels[..., top * scale : (h - bottom) * scale, left * scale : (w - right) * scale]


def fit(
    model: torch.nn.Module,
    folder: Path,
    steps: int,
    lr: float,
    loss_at: Callable[[int], tuple[torch.Tensor, dict[str, float]]],
    evaluate: Callable[[], dict[str, Any]] = dict,
) -> None:
    """Trains what needs a gradient of `model` for `steps` on the loss that `loss_at(step)` gives, with figures to log.

    Goes on from the checkpoint in `folder` where there is one. Figures go to `folder/log.jsonl`, at checkpoints with
    what `evaluate()` finds: before the checkpoint, since what is logged after the last one is logged again.
    """
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    optimizer = Optimizer(named, lr, adamw_names=("conv_in", "conv_out", "quant_conv"))
    step, _ = load_checkpoint(folder, model, optimizer)
    cut_log(folder / "log.jsonl", step)
    started = time.monotonic()
    while step < steps:
        loss, figures = loss_at(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in named], 1.0)
        optimizer.step(learning_rate(step, steps, lr))
        step += 1
        saved = step % SAVE_STEPS == 0 or step == steps
        if step % LOG_STEPS == 0 or saved:
            row = {"step": step, **figures, "seconds": round(time.monotonic() - started, 1)}
            row |= evaluate() if saved else {}
            with (folder / "log.jsonl").open("a") as log:
                log.write(json.dumps(row) + "\n")
        if saved:
            save_checkpoint(folder, model, optimizer, step)


def train(
    vae: AutoencoderKLWan,
    folder: Path,
    steps: int,
    lr: float,
    noise: float = 0.0,
    seed: int = 0,
    shapes: Sequence[tuple[int, int, int]] = ((3, 96, 9),),
    teacher: AutoencoderKLWan | None = None,
    slopes: float = 0.0,
    cut: bool = False,
) -> AutoencoderKLWan:
    """Trains `vae` (`fit`); logs PSNR (dB) of reconstructions in training, and held-out (`evaluate`).

    Steps take the `shapes` (clips, pixels a side, frames) in turn.

    With `noise`, latents are noised by up to that part of their RMS spread before decoding, which makes them smooth and
    the decoder forgiving of what a diffusion model leaves (Latent Denoising Makes Good Tokenizers, arXiv 2507.15856).
    With a `teacher`, the encoder also learns to give from the first frame on what the teacher gives once settled:
    a diffusion model that does not know how long ago a clip began cannot follow latents that drift.
    `slopes` weighs the squared error of steps between neighbouring pixels: where an outline lies is not known to the
    pixel, and the other terms do not mind if it comes out as stairs, one for each patch of pixels that the decoder
    makes together. (Its absolute error asks for stairs: most steps are zero.) With `cut` the decoder gets parts of
    what was encoded: the encoder pads clips with zeros, to the right and below more than elsewhere, and latents that a
    diffusion model makes at the border of a larger grid do not show it. What needs no gradient stays as it is.
    """

    def loss_at(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        count, size, frames = shapes[step % len(shapes)]
        x = batch(seed, step, count, size, frames)
        with cpu_autocast():
            posterior = DiagonalGaussianDistribution(clip_moments(vae, x))
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        latents = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
        strength = noise * torch.rand(count, 1, 1, 1, 1, generator=generator)
        scale = posterior.mean.detach().var(dim=(0, 2, 3, 4)).mean().sqrt()
        latents = latents + strength * scale * torch.randn(latents.shape, generator=generator)
        seen = x
        if cut:
            latents, seen = cut_sides(latents, x, random.Random(f"{seed}/{step}/cut"))
        with cpu_autocast():
            reconstruction = clip_pixels(vae, latents)
        error = reconstruction.float() - seen
        # L1 keeps edges sharp, L2 is what PSNR counts
        loss = error.abs().mean() * 0.5 + error.square().mean()
        loss = loss + slopes * sum(error.diff(dim=axis).square().mean() for axis in (-2, -1))
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        drift = torch.zeros(())
        if teacher:
            target = settled(teacher, x)
            drift = F.mse_loss(posterior.mean, target) / target.var(dim=(0, 2, 3, 4)).mean()
        figures = {
            "loss": round(loss.item(), 5),
            "psnr": round(10 * math.log10(4 / error.square().mean().item()), 2),
            "kl": round(kl.item(), 3),
            "drift": round(drift.item(), 4),
        }
        return loss + KL_WEIGHT * kl + DRIFT_WEIGHT * drift, figures

    fit(vae, folder, steps, lr, loss_at, lambda: {"held_out": evaluate(vae)})
    return vae
