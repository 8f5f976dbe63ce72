"""Sigmas, noise keyed by coordinates, and latents upsampled to start a level from (DESIGN §4)."""

from fractions import Fraction

import numpy as np
import torch
import torch.nn.functional as F


def shift_sigma(sigma: float, shift: float) -> float:
    """The flow-matching time shift: shift*s / (1 + (shift - 1)*s), of which rounding makes no more than 1."""
    return min(1.0, shift * sigma / (1 + (shift - 1) * sigma))


def unshift_sigma(sigma: float, shift: float) -> float:
    """The s whose `shift_sigma` is `sigma`."""
    return sigma / (shift - (shift - 1) * sigma)


def sigmas(steps: int, strength: float, shift: float) -> list[float]:
    """steps + 1 sigmas from `strength` (0..1] down to 0: even in unshifted time, then shifted."""
    start = unshift_sigma(strength, shift)
    return [shift_sigma(start * (1 - i / steps), shift) for i in range(steps + 1)]


def upsample(latents: torch.Tensor, ratio: Fraction, time_ratio: int, box: tuple[range, range, range]) -> torch.Tensor:
    """Latents (C, T, H, W) of the level below, interpolated linearly at the `box` of latents (t, y, x) of the level
    that is `ratio` times as large and `time_ratio` times as dense: (C, t, y, x)."""
    _, low_t, low_h, low_w = latents.shape
    t, y, x = (torch.tensor(list(r), dtype=torch.float32) for r in box)
    at = (t / time_ratio, (y + 0.5) / float(ratio) - 0.5, (x + 0.5) / float(ratio) - 0.5)
    # grid_sample wants -1..1 over the centres of the first and last sample
    scaled = [2 * a / max(n - 1, 1) - 1 for a, n in zip(at, (low_t, low_h, low_w), strict=True)]
    zz, yy, xx = torch.meshgrid(*scaled, indexing="ij")
    points = torch.stack((xx, yy, zz), dim=-1)[None]
    return F.grid_sample(latents[None], points, mode="bilinear", padding_mode="border", align_corners=True)[0]


def _mix(z: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014) on uint64."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def noise(seed: int, stage: int, channels: int, t: range, y: range, x: range) -> torch.Tensor:
    """Standard normal noise (channels, len(t), len(y), len(x)) fp32 of the box of latent coordinates.

    A counter-based generator: each value is a function of (seed, stage, channel, t, y, x) alone, so a box has the same
    noise on any device, in any order, for any part of the video. Coordinates are below 2**16 (t: 2**14).
    """
    with np.errstate(over="ignore"):
        if seed >= 1 << 58:  # the stage takes six bits
            seed = int(_mix(np.array([seed], dtype=np.uint64))[0]) >> 6
        key = _mix(np.array([seed * 64 + stage], dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15))
        ts, ys, xs = (np.arange(r.start, r.stop, dtype=np.uint64) for r in (t, y, x))
        pairs = np.arange((channels + 1) // 2, dtype=np.uint64)
        counter = (
            (pairs << np.uint64(46))[:, None, None, None]
            | (ts << np.uint64(32))[None, :, None, None]
            | (ys << np.uint64(16))[None, None, :, None]
            | xs[None, None, None, :]
        )
        bits = _mix(_mix(counter * np.uint64(0x9E3779B97F4A7C15) + key) ^ key)
    # Box-Muller: two uniforms of 32 bits make the normals of two channels
    u = ((bits >> np.uint64(32)).astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32)
    angle = (bits & np.uint64(0xFFFFFFFF)).astype(np.float32) * np.float32(2 * np.pi * 2.0**-32)
    radius = np.sqrt(-2 * np.log(np.clip(u, 2.0**-33, 1.0)))
    both = np.concatenate((radius * np.cos(angle), radius * np.sin(angle)))[:channels]
    return torch.from_numpy(both)
