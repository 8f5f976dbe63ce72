"""What decoding takes, from the VAE's config alone: memory, disk and FLOPs, and the tile that fits; and encoding.

`time_factor`, `space_factor` and `receptive_radius`, which neither `still` nor `idle` changes, take diffusers' own
`vae.config` too.
"""

import itertools
import math
import sys

from .errors import ResourceError
from .presets import Vae

# With a live middle attention tiles differ, so they are blended over this many latents across a border.
BLEND = 4

SMALLEST_TILE = 8  # its side in latents

# elements of a frame that are taken at a time on a CPU (`banded`): fewer slow convolutions down, more leave the cache
BAND = 1 << 20


def time_factor(vae: Vae) -> int:
    """Frames a latent frame, after the first."""
    return 2 ** sum(vae.temperal_downsample)


def space_factor(vae: Vae) -> int:
    """Pixels a latent, in height and in width."""
    return 2 ** (len(vae.dim_mult) - 1) * (vae.patch_size or 1)


def receptive_radius(vae: Vae) -> int:
    """Latents that a decoded pixel sees in each direction, middle attention apart."""
    convs = 2 * (vae.num_res_blocks + 1)
    radius = 1 + convs  # conv_out and the last block
    for _ in vae.dim_mult[1:]:
        radius = -(-(radius + 1) // 2) + convs  # the upsampler's convolution, then half the resolution
    return radius + 4 + 1  # the middle block and conv_in


def spool_bytes(vae: Vae, steps: int, h: int, w: int) -> int:
    """Disk that `decode_stream` with a tile takes for `steps` latent frames of h x w."""
    return (1 + time_factor(vae) * (steps - 1)) * 3 * h * w * space_factor(vae) ** 2 * 2


def decode_bytes(vae: Vae, h: int, w: int, tile: int | None = None, width: int = 4, banded: bool = True) -> int:
    """Peak bytes of activations and caches of `decode_stream` on h x w latents; weights and frames not counted.

    `width`: bytes a value of the VAE's dtype; frames come out in fp32. `banded`: as on a CPU, where frames of still
    levels are taken in bands.

    Counts tensors as the walk in `decode` holds them: two frames a convolution, what each level keeps while deeper
    ones run, and the largest working set on top of it.
    """
    h, w = seen_at_once(vae, h, w, tile)
    base = vae.decoder_base_dim or vae.base_dim
    dims = [base * m for m in (vae.dim_mult[-1], *reversed(vae.dim_mult))]
    temporal = [*reversed(vae.temperal_downsample), False]
    residual, convs = vae.is_residual, 2 * (vae.num_res_blocks + 1)
    area, channels, most = h * w, vae.out_channels, BAND if banded else sys.maxsize
    cached = (vae.z_dim + 4 * dims[0]) * area * 2
    peaks = [10 * dims[0] * area]  # the middle attention with its three copies of queries, keys and values
    held, band = vae.z_dim * area, area  # `band`: positions of what comes in
    for level, (source, d) in enumerate(itertools.pairwise(dims)):
        c = source // 2 if level and not residual else source
        last, still = level == len(dims) - 2, level >= len(dims) - 1 - vae.still
        cached += ((0 if still else c + (convs - 1) * d) + (d if temporal[level] else 0)) * area * 2
        kept = c * area if residual and not last else 0  # what the shortcut will need
        if not still:
            peaks.append(held + _block(c, d) * area)
        elif last:  # bands from the upsampler to the pixels, in fp32 at last
            peaks.append(held + max(2 * c + d, 4 * d, d + 2 * channels, 5 * channels * (width != 4)) * band)
        else:
            peaks.append(held + (c + d) * area + (c + 3 * d) * min(area, most // c))
        if last:
            break
        held += kept + (2 * d if temporal[level] else d) * area
        up, part = d if residual else d // 2, min(area, most // d)
        area, band = 4 * area, 4 * part
        if not (level == len(dims) - 3 and vae.still):  # a whole frame, and what becomes of a band
            peaks.append(held + up * (area + (band if band < area else 0)) + (2 * up + d) * part)
    if not vae.still:
        cached += dims[-1] * area * 2
        peaks.append(held + (dims[-1] + channels) * area + min(channels * area, most))
    return width * (cached + max(peaks))


def seen_at_once(vae: Vae, h: int, w: int, tile: int | None) -> tuple[int, int]:
    """Latents (h, w) that the decoder sees at a time: all, or the largest tile with what it is padded by."""
    if tile is None or tile >= max(h, w):
        return h, w
    reach = receptive_radius(vae) + BLEND // 2
    h, w = (min(side, math.ceil(side / math.ceil(side / tile)) + 2 * reach) for side in (h, w))
    return h, w


def output_bytes(vae: Vae, h: int, w: int) -> int:
    """Bytes of the frames, fp32 in host memory, that come of h x w latents: whoever takes them holds one while the next
    is made."""
    return 2 * 4 * 3 * h * w * space_factor(vae) ** 2


def _block(c: int, d: int) -> int:
    """Channels that residual blocks hold, from c to d: input, a normed frame and two terms of a sum, and before the
    second convolution what the first made."""
    return max(2 * c + 2 * d, c + 4 * d)


def encode_bytes(vae: Vae, h: int, w: int, width: int = 4, banded: bool = True, half: bool = False) -> int:
    """Peak bytes of activations, caches and input of `encode_stream` to h x w latents, which has no tiles; `half`: of
    frames half as large, through a first level of their own."""
    most = BAND if banded else sys.maxsize
    dims = [vae.base_dim * m for m in (1, *vae.dim_mult)]
    channels = vae.out_channels  # those that come in, too
    residual, blocks = vae.is_residual, vae.num_res_blocks
    area = h * w * 4 ** (len(dims) - 2 - half)
    frame = 3 * h * w * (space_factor(vae) // (1 + half)) ** 2
    cached, waiting = 0 if vae.still or half else 2 * channels * area, 0
    peaks = [0 if vae.still else (channels + dims[0]) * area]
    for level, (c, d) in enumerate(itertools.pairwise(dims)):
        last, still = level == len(dims) - 2, level < vae.still
        cached += 0 if still else 2 * (c + (2 * blocks - 1) * d) * area
        smaller = area if half and not level else area // 4
        kept = c * smaller if residual and not last else 0  # what the shortcut will need
        if not still:
            peaks.append(_block(c, d) * area)
        if last:
            break
        merged = vae.temperal_downsample[level]
        waiting += kept if merged else 0
        if still:  # bands of what comes in, and a frame of what they become
            came = c * area if level else channels * area * (width != 4)  # the frame in the VAE's dtype
            band = min(area, most // (c if level else channels))
            peaks.append(came + 2 * kept + d * smaller + max(2 * channels, c + 3 * d) * band)
        else:
            peaks.append(kept + 2 * d * area + 2 * d * smaller)  # a padded frame and what becomes of it
        area = smaller
        cached += 2 * d * area if merged else 0
    cached += 2 * (4 + 1) * dims[-1] * area
    peaks.append(10 * dims[-1] * area)  # the middle attention, as in the decoder
    return width * (cached + waiting + max(peaks)) + 4 * frame  # which comes in fp32


def decode_flops(vae: Vae, h: int, w: int) -> int:
    """FLOPs of the convolutions that one latent frame of h x w takes (two for each multiply-add); tiles add overlap."""
    base = vae.decoder_base_dim or vae.base_dim
    dims = [base * m for m in (vae.dim_mult[-1], *reversed(vae.dim_mult))]
    temporal = [*reversed(vae.temperal_downsample), False]
    residual, blocks = vae.is_residual, vae.num_res_blocks + 1
    area, frames = h * w, 1
    total = 27 * (vae.z_dim * dims[0] + 4 * dims[0] ** 2) * area
    for level, (source, d) in enumerate(itertools.pairwise(dims)):
        c = source // 2 if level and not residual else source
        taps = 9 if level >= len(dims) - 1 - vae.still else 27
        total += taps * (c * d + (2 * blocks - 1) * d * d) * area * frames
        if level == len(dims) - 2:
            total -= taps * 2 * vae.idle * d * d * area * frames
            break
        if temporal[level]:
            total += 3 * d * 2 * d * area * frames
            frames *= 2
        area *= 4
        total += 4 * d * (d if residual else d // 2) * area * frames
    return 2 * (total + taps * dims[-1] * vae.out_channels * area * frames)


def encode_flops(vae: Vae, h: int, w: int, half: bool = False) -> int:
    """FLOPs of the convolutions that encoding to one latent frame of h x w takes, after the first; `half` as above."""
    dims = [vae.base_dim * m for m in (1, *vae.dim_mult)]
    still, blocks = vae.still, vae.num_res_blocks
    area, frames = h * w * 4 ** (len(dims) - 2 - half), time_factor(vae)
    total = (9 if still or half else 27) * vae.out_channels * dims[0] * area * frames
    for level, (c, d) in enumerate(itertools.pairwise(dims)):
        total += (9 if level < still else 27) * (c * d + (2 * blocks - 1) * d * d) * area * frames
        if level == len(dims) - 2:
            break
        if level or not half:
            area //= 4
            total += 9 * d * d * area * frames
        if vae.temperal_downsample[level]:
            frames //= 2
            total += 3 * d * d * area * frames
    return 2 * (total + 27 * dims[-1] * (4 * dims[-1] + 2 * vae.z_dim) * area)


def spans(size: int, tile: int) -> list[tuple[int, int]]:
    """Cuts `size` latents into the fewest parts of at most `tile`, as equal as they can be."""
    parts = math.ceil(size / tile)
    return [(i * size // parts, (i + 1) * size // parts) for i in range(parts)]


def overlap(vae: Vae, h: int, w: int, tile: int | None) -> float:
    """How many times as much decoding tiles are as the whole frame of h x w latents."""
    if tile is None or tile >= max(h, w):
        return 1.0
    reach, seen = receptive_radius(vae) + BLEND // 2, 1.0
    for size in (h, w):
        seen *= sum(min(size, b + reach) - max(0, a - reach) for a, b in spans(size, tile)) / size
    return seen


def choose_tile(vae: Vae, h: int, w: int, budget_bytes: int, width: int = 4, banded: bool = True) -> int | None:
    """The largest tile side whose decoding fits in `budget_bytes`: None for whole frames, `ResourceError` if none."""
    if decode_bytes(vae, h, w, None, width, banded) <= budget_bytes:
        return None
    for tile in range(max(h, w) - 1, SMALLEST_TILE - 1, -1):
        if decode_bytes(vae, h, w, tile, width, banded) <= budget_bytes:
            return tile
    least = decode_bytes(vae, h, w, SMALLEST_TILE, width, banded) / 2**30
    raise ResourceError(
        f"decoding needs {least:.1f} GiB even in the smallest tiles, and decode_gib of the preset allows"
        f" {budget_bytes / 2**30:.1f}; raise it in a preset of your own"
    )
