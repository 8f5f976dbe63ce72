"""Training clips of the procedural world as latents on disk, encoded once, in shards that can be resumed.

Kinds: `image` and `clip` (1 and 33 frames at 16 fps) train the base, `proxy` (49 frames at 4 fps) its stage 1 adapter;
crops of 1 and 33 frames at 16 fps train the stage 2 adapter: `first_still` and `first` as the level above a proxy meets
them, with the whole frame's proxy at 4 fps, `upper_still` and `upper` as the further levels do, at any zoom, with their
own proxy at 16 fps.
"""

import json
import math
import random
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from safetensors import safe_open

from . import captions, world
from .encode import encode_clips
from .machine import cpu_autocast
from .store import artefact_hash
from .tensor_file import save_tensors

FPS = 16
TOKEN, LATENT = 32, 16  # pixels
SHARD = 20
# grids in tokens (h, w) of the whole frame, with how often each is drawn
FRAME_GRIDS = (((5, 8), 6), ((8, 5), 1), ((6, 6), 1), ((4, 9), 1))
PROXY_GRIDS = (((7, 12), 6), ((12, 7), 1), ((9, 9), 1), ((6, 14), 1))
CLIP_FRAMES, PROXY_FRAMES = 33, 49
HASTE = 4.0  # the fastest of the base's clips: as in footage, some objects cross a good part of the frame in 2 s
CLOSE_UPS = 0.35  # of the base's samples, as footage has them
ENCODED_TOGETHER = {"image": 20, "clip": 4, "proxy": 4, "first_still": 20, "first": 2, "upper_still": 20, "upper": 2}
DETAIL_TOKENS = 12
# each makes a crop a whole number of proxy tokens; plans mostly take those from 2.4 to 3.2
DETAIL_RATIOS = (Fraction(4), Fraction(3), Fraction(3), Fraction(12, 5), Fraction(12, 5), Fraction(2))


def folder_of(work: Path, vae_hash: str) -> Path:
    """Where the samples of a VAE lie in `work`: those of other grids or frames are never taken for these."""
    recipe = {
        "grids": [FRAME_GRIDS, PROXY_GRIDS],
        "frames": [CLIP_FRAMES, PROXY_FRAMES],
        "draws": [HASTE, CLOSE_UPS, world.SHAPE_SHARES, world.GROUND_SHARES],
        "world": [world.HELD_OUT_FRACTION, world.SPEED, world.LONGEST, world.COLOURS],
        "told": ["near", captions.ORDERS, captions.OBJECTS, captions.MOTIONS, captions.GROUNDS, captions.NAMED_GROUNDS],
        "shard": SHARD,
        "crops": [DETAIL_TOKENS, DETAIL_RATIOS],
    }
    return work / f"data-{vae_hash}-{artefact_hash(recipe)[:8]}"


def whole_frame(
    rng: random.Random, grid: tuple[int, int], frames: int, fps: int, haste: float = 1.0
) -> tuple[world.Scene, torch.Tensor, str]:
    """A scene, the times of its frames and its caption; an object that would leave starts further back."""
    h, w = grid
    seconds = (frames - 1) / fps
    horizon = max(seconds, rng.uniform(4.0, 12.0) / haste)
    scene = world.sample_scene(rng, w / h, horizon, haste=haste)
    start = rng.uniform(0.0, horizon - seconds)
    times = start + torch.arange(frames) / fps
    return scene, times, captions.caption(scene, rng)


def close_up(rng: random.Random, pixels: int, seconds: float, lowest: float) -> tuple[world.Scene, tuple, float]:
    """A scene, a square window of it that is `pixels` wide at a frame height of `lowest`..2160 px, and a start time."""
    aspect = rng.choice((16 / 9, 1.6, 1.0, 9 / 16))
    horizon = max(seconds, rng.uniform(4.0, 12.0))
    scene = world.sample_scene(rng, aspect, horizon)
    shown = pixels / math.exp(rng.uniform(math.log(lowest), math.log(2160)))
    start = rng.uniform(0.0, horizon - seconds)
    if rng.random() < 0.65:  # the object's outline passes through
        dx, dy = world.DIRECTIONS[scene.direction]
        moved = scene.speed * (start + seconds / 2)
        angle, reach = rng.uniform(0, 2 * math.pi), scene.size * rng.random() ** 0.3
        x = scene.start[0] + dx * moved + reach * math.cos(angle) - shown / 2
        y = scene.start[1] + dy * moved + reach * math.sin(angle) - shown / 2
    else:
        x, y = rng.uniform(0, max(0.0, aspect - shown)), rng.uniform(0, max(0.0, 1 - shown))
    return scene, (x, y, shown), start


def seen_whole(
    rng: random.Random, grid: tuple[int, int], ratio: Fraction, seconds: float
) -> tuple[world.Scene, tuple[int, int], float]:
    """A scene of a proxy of `grid` tokens (h, w), the first token (y, x) of a crop of it, and a start time.

    Most crops touch the object: what stage 1 gets wrong is mostly there.
    """
    h, w = grid
    side = int(DETAIL_TOKENS / ratio)
    horizon = max(seconds, rng.uniform(4.0, 12.0))
    scene = world.sample_scene(rng, w / h, horizon)
    start = rng.uniform(0.0, horizon - seconds)
    places = [(y, x) for y in range(h - side + 1) for x in range(w - side + 1)]
    dx, dy = world.DIRECTIONS[scene.direction]
    moved = scene.speed * (start + seconds / 2)
    cx, cy, reach = scene.start[0] + dx * moved, scene.start[1] + dy * moved, scene.size

    def touched(place: tuple[int, int]) -> bool:
        y, x = place
        return x / h < cx + reach and cx - reach < (x + side) / h and y / h < cy + reach and cy - reach < (y + side) / h

    return scene, rng.choice([p for p in places if touched(p)] if rng.random() < 0.8 else places), start


def sample(
    kind: str, rng: random.Random, grid: tuple[int, int], ratio: Fraction
) -> tuple[dict[str, torch.Tensor], torch.Tensor, dict]:
    """Pixels of one training sample by name, where its object is (`near`), and its caption; of a crop also its ratio
    and, in tokens of the whole frame's proxy, where it lies (`at`: y, x). Crops are square, whatever the grid."""
    if kind == "proxy":
        scene, times, text = whole_frame(rng, grid, PROXY_FRAMES, FPS // 4)
        return {"latents": _seen(scene, times, grid)}, near(scene, times, grid), {"caption": text}
    if kind in ("image", "clip"):
        frames, window = 1 if kind == "image" else CLIP_FRAMES, None
        if rng.random() >= CLOSE_UPS:
            scene, times, text = whole_frame(rng, grid, frames, FPS, haste=HASTE ** rng.random())
        else:
            scene, window, start = close_up(rng, grid[0] * TOKEN, (frames - 1) / FPS, grid[0] * TOKEN * 1.3)
            times, text = start + torch.arange(frames) / FPS, captions.caption(scene, rng)
        return {"latents": _seen(scene, times, grid, window)}, near(scene, times, grid, window), {"caption": text}
    crop, frames = (DETAIL_TOKENS, DETAIL_TOKENS), 1 if kind.endswith("_still") else CLIP_FRAMES
    if kind.startswith("first"):
        scene, (y, x), start = seen_whole(rng, grid, ratio, (frames - 1) / FPS)
        times = start + torch.arange(frames) / FPS
        window = (x / grid[0], y / grid[0], DETAIL_TOKENS / float(ratio) / grid[0])
        pixels = {"latents": _seen(scene, times, crop, window), "whole_4": _seen(scene, times[::4], grid)}
        info = {"caption": captions.caption(scene, rng), "ratio": str(ratio), "at": [y, x]}
        return pixels, near(scene, times, crop, window), info
    scene, window, start = close_up(rng, DETAIL_TOKENS * TOKEN, 9.0, DETAIL_TOKENS * TOKEN)
    times, small = start + torch.arange(frames) / FPS, int(DETAIL_TOKENS * TOKEN / ratio)
    pixels = {
        "latents": _seen(scene, times, crop, window),
        "proxy_1": world.render(scene, times, small, small, window),
    }
    return pixels, near(scene, times, crop, window), {"caption": captions.caption(scene, rng), "ratio": str(ratio)}


def _seen(
    scene: world.Scene, times: torch.Tensor, grid: tuple[int, int], window: tuple[float, float, float] | None = None
) -> torch.Tensor:
    return world.render(scene, times, grid[0] * TOKEN, grid[1] * TOKEN, window)


def near(
    scene: world.Scene, times: torch.Tensor, grid: tuple[int, int], window: tuple[float, float, float] | None = None
) -> torch.Tensor:
    """Which tokens the object touches in any frame of a latent one, (1, T, h, w) bool; times are 4k + 1."""
    touched = world.near_object(scene, times, *grid, window)
    return torch.cat((touched[:1], touched[1:].unflatten(0, (-1, 4)).any(1)))[None]


def build(kind: str, count: int, folder: Path, vae: AutoencoderKLWan, seed: int = 0) -> list[dict]:
    """The first `count` samples of a kind: `caption`, latents fp16 by name, `near` uint8, and what else `sample` told;
    `proxy_4` is cut from the whole frame's.

    They and what fills their last shard lie in `folder/kind-NNNN.safetensors`; shards that exist are kept. The samples
    of a shard have one shape, so that they are encoded together. Shards are made side by side, a thread each, in bf16
    where the CPU has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    threads = torch.get_num_threads()

    def build_shard(number: int) -> Path:
        path = folder / f"{kind}-{number:04d}.safetensors"
        if path.exists():
            return path
        first, of_shard = number * SHARD, random.Random(f"{seed}/{kind}/shard {number}")
        grids = PROXY_GRIDS if kind == "proxy" or kind.startswith("first") else FRAME_GRIDS
        grid = of_shard.choices([g for g, _ in grids], [n for _, n in grids])[0]
        ratio = of_shard.choice(DETAIL_RATIOS)
        tensors: dict[str, torch.Tensor] = {}
        infos: list[dict] = []
        numbers = range(first, first + SHARD)
        together = ENCODED_TOGETHER[kind]
        for group in (numbers[i : i + together] for i in range(0, len(numbers), together)):
            made = [sample(kind, random.Random(f"{seed}/{kind}/{i}"), grid, ratio) for i in group]
            infos += [info for *_, info in made]
            tensors |= {
                f"{i - first}.near": where.to(torch.uint8) for i, (_, where, _) in zip(group, made, strict=True)
            }
            for name in made[0][0]:
                pixels = torch.stack([by_name[name] for by_name, *_ in made])
                with cpu_autocast():
                    latents = encode_clips(vae, pixels)
                tensors |= {f"{i - first}.{name}": x.half().clone() for i, x in zip(group, latents, strict=True)}
        save_tensors(path, tensors, {"samples": json.dumps(infos)})
        return path

    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        shards = list(pool.map(build_shard, range(math.ceil(count / SHARD))))
    result: list[dict] = []
    for path in shards:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            result += split(tensors, json.loads(file.metadata()["samples"]))
    for each in result:
        if "whole_4" in each:
            each["proxy_4"] = own_part(each, each["whole_4"])
    return result[:count]


def own_part(sample: dict, whole: torch.Tensor) -> torch.Tensor:
    """The part of latents (C, T, H, W) of a whole frame that a crop sees."""
    (y, x), side = sample["at"], sample["latents"].shape[-1] / Fraction(sample["ratio"])
    latents = TOKEN // LATENT  # a token
    return whole[:, :, latents * y : latents * y + int(side), latents * x : latents * x + int(side)]


def split(tensors: dict[str, torch.Tensor], infos: list[dict]) -> list[dict]:
    """The samples of one file, whose tensors are named `<number>.<name>`."""
    samples = [dict(info) for info in infos]
    for key, tensor in tensors.items():
        number, name = key.split(".", 1)
        samples[int(number)][name] = tensor
    return samples
