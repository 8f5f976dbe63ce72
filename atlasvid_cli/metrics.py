"""What is in a decoded video of the procedural world, found on pixels by rules that know nothing of the model.

The detector labels every pixel with the nearest of the world's object colours and ground tones, and takes connected
components of one object colour that are large enough and do not fill the frame. A shape is the one whose outline covers
the component best, a ground the pattern that how dark the rest is goes with best.
"""

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from . import world

SMALLEST, LARGEST = 0.008, 0.4  # of the frame's area
DETECTION_HEIGHT, GROUND_HEIGHT = 160, 40
TEMPLATE = 64
ALIKE = 0.8  # the part of component and outline together that both cover; a square's and its ball's is pi / 4
OUTLINE_POINTS = 200
BRIDGE = 0.04  # of the frame's height: objects joined by less are two
FAINT = 8 / 255  # of full scale, a step
PHASES = np.arange(10) / 10  # tried of each of a ground's two
# how much larger than in a whole frame a ground may be: a video shows its proxy's top left part, less up to a token
ZOOMS = (1.0, 1.1, 1.2)


@dataclass(frozen=True)
class Detection:
    """What was seen: None where nothing was. Speed in frame extents a second; `unsteady` is how far it is off in a
    quarter of the clip at most, as a part of it."""

    colour: str | None
    shape: str | None
    direction: str | None
    count: int
    ground_colour: str | None
    ground: str | None
    speed: float | None
    unsteady: float | None = None


class Component(NamedTuple):
    """A connected part of a mask: its pixels, their mean position, and its box (left, top, right, bottom)."""

    pixels: int
    x: float
    y: float
    box: tuple[int, int, int, int]


class Thing(NamedTuple):
    """An object in a frame: position in frame heights, how well each shape covers it, 0..1, and how many it is, since
    several may have grown together."""

    colour: str
    x: float
    y: float
    likeness: dict[str, float]
    number: int


def detect(frames: list[np.ndarray], times: Sequence[float]) -> Detection:
    """Attributes of a clip given as uint8 (H, W, 3) frames at `times`, which rise, in seconds."""
    found = [_objects(_shrink(f, DETECTION_HEIGHT)) for f in frames]
    grounds = Counter(g for _, g in found if g)
    ground_colour = grounds.most_common(1)[0][0] if grounds else None
    ground = _ground_pattern([_shrink(f, GROUND_HEIGHT) for f in frames], ground_colour) if ground_colour else None
    votes = Counter(thing.colour for things, _ in found for thing in things)
    if not votes:
        return Detection(None, None, None, 0, ground_colour, ground, None)
    colour = votes.most_common(1)[0][0]
    count = Counter(sum(thing.number for thing in things) for things, _ in found).most_common(1)[0][0]
    firsts = [next((thing for thing in things if thing.colour == colour), None) for things, _ in found]
    seen = [(t, thing) for t, thing in zip(times, firsts, strict=True) if thing is not None]
    shape: str | None = max(world.SHAPES, key=lambda s: sum(thing.likeness[s] for _, thing in seen))
    if shape and sum(thing.likeness[shape] for _, thing in seen) < ALIKE * len(seen):
        shape = None
    direction = speed = unsteady = None
    if len(seen) >= 2:
        (start, a), (end, b) = seen[0], seen[-1]
        dx, dy = b.x - a.x, b.y - a.y
        if max(abs(dx), abs(dy)) > 0.01:
            horizontal = abs(dx) > abs(dy)
            direction = ("right" if dx > 0 else "left") if horizontal else ("down" if dy > 0 else "up")
            height, width, _ = frames[0].shape
            speed = (abs(dx) / (width / height) if horizontal else abs(dy)) / (end - start)
            unsteady = _unsteady([(t, thing.x if horizontal else thing.y) for t, thing in seen])
    return Detection(colour, shape, direction, count, ground_colour, ground, speed, unsteady)


def _unsteady(places: list[tuple[float, float]]) -> float | None:
    """How far the speed in each quarter of the (time, place) is from the whole's; None where there are too few."""
    if len(places) < 5:
        return None
    ends = [places[round(k * (len(places) - 1) / 4)] for k in range(5)]

    def speed(a: tuple[float, float], b: tuple[float, float]) -> float:
        return (b[1] - a[1]) / (b[0] - a[0])

    return max(abs(speed(a, b) / speed(ends[0], ends[-1]) - 1) for a, b in itertools.pairwise(ends))


def step_energy(frame: np.ndarray, rows: list[int], columns: list[int], pitch: int) -> np.ndarray:
    """Mean squared step between neighbouring pixels of a uint8 (H, W, 3) frame across window borders, and across the
    same borders moved by 1 to `pitch` - 1 pixels: (pitch,), the borders themselves first; NaN where there are none.

    A border at `rows` or `columns` y lies between pixels y - 1 and y. Steps count as `FAINT` at most, since a seam is
    faint and long: otherwise a few outlines decide, and a checkerboard that the eye sees is lost beside them.
    """
    pixels = frame.astype(np.float32) / 255
    found = []
    for axis, at in ((0, rows), (1, columns)):
        steps = np.square(np.abs(np.diff(pixels, axis=axis)).clip(max=FAINT)).mean(axis=(1 - axis, 2))
        firsts = np.array([y - 1 for y in at if y > 0 and y + pitch - 1 <= len(steps)], int)
        found.append(steps[firsts[:, None] + np.arange(pitch)])
    lines = np.concatenate(found)
    return lines.mean(axis=0) if len(lines) else np.full(pitch, np.nan)


def edge_width(frame: np.ndarray) -> float | None:
    """Pixels in which a uint8 (H, W, 3) frame goes from 10 % to 90 % of the way across the outline of its largest
    object: the median over the outline, along its normal, None where there is no object.

    Each profile is measured between the colours at its own two ends, so that a ground with a pattern does not count.
    They reach 0.3 of the object's radius to either side, and no edge is found to be wider than they are.
    """
    step = max(1, frame.shape[0] // DETECTION_HEIGHT)
    nearest = _nearest(_shrink(frame, DETECTION_HEIGHT))
    parts = [(part, index) for index in range(len(world.COLOURS)) for part in components(nearest == index)]
    parts = [(part, index) for part, index in parts if SMALLEST <= part.pixels / nearest.size <= LARGEST]
    if not parts:
        return None
    part, index = max(parts)
    reach = max(2, round(0.3 * step * math.sqrt(part.pixels / math.pi)))
    left, top, right, bottom = (v * step for v in part.box)
    y0, x0 = max(0, top - 2 * reach), max(0, left - 2 * reach)
    near = frame[y0 : bottom + 2 * reach, x0 : right + 2 * reach]
    mask = torch.from_numpy(_nearest(near) == index).float()[None, None]
    smooth = mask
    for side in ((2 * reach + 1, 1), (1, 2 * reach + 1)):  # a box filter, one axis after the other
        smooth = F.avg_pool2d(smooth, side, 1, (side[0] // 2, side[1] // 2), count_include_pad=False)
    smooth = smooth[0, 0]
    slope = torch.stack(torch.gradient(smooth)[::-1])  # points (x, y) into the object
    inside = mask[0, 0] > 0
    rim = inside & (F.avg_pool2d(mask, 3, 1, 1, count_include_pad=False)[0, 0] < 1) & (slope.norm(dim=0) > 1e-3)
    ys, xs = torch.nonzero(rim, as_tuple=True)
    if len(ys) == 0:
        return None
    chosen = torch.linspace(0, len(ys) - 1, min(len(ys), OUTLINE_POINTS)).long()
    ys, xs = ys[chosen], xs[chosen]
    outward = -slope[:, ys, xs] / slope[:, ys, xs].norm(dim=0)
    along = torch.linspace(-reach, reach, 8 * reach + 1)
    x, y = (at[:, None] + outward[axis, :, None] * along for axis, at in enumerate((xs, ys)))
    pixels = torch.from_numpy(np.ascontiguousarray(near)).permute(2, 0, 1)[None].float()
    points = torch.stack((2 * x / (near.shape[1] - 1) - 1, 2 * y / (near.shape[0] - 1) - 1), dim=-1)
    profiles = F.grid_sample(pixels, points[None], padding_mode="border", align_corners=True)[0]  # (3, points, along)
    ends = max(1, len(along) // 10)
    first, last = profiles[..., :ends].mean(-1), profiles[..., -ends:].mean(-1)
    axis = (last - first) / (last - first).square().sum(0).clamp_min(1e-6)
    rise = ((profiles - first[..., None]) * axis[..., None]).sum(0)
    # from the last time below 10 % before the middle is crossed, to the first above 90 % after
    middle = (rise > 0.5).int().argmax(-1)
    places = torch.arange(len(along))
    low = torch.where((rise < 0.1) & (places < middle[:, None]), places, 0).amax(-1)
    high = torch.where((rise > 0.9) & (places >= middle[:, None]), places, len(along)).amin(-1)
    return float((high - low).float().median() * (along[1] - along[0]))


def adherence(detection: Detection, attributes: world.Attributes) -> dict[str, bool]:
    """Which attributes of the prompt came true."""
    colour, shape, direction, ground_colour, ground = attributes
    return {
        "colour": detection.colour == colour,
        "shape": detection.shape == shape,
        "direction": detection.direction == direction,
        "count": detection.count == 1,
        "ground colour": detection.ground_colour == ground_colour,
        "ground": detection.ground == ground,
    }


def _shrink(frame: np.ndarray, height: int) -> np.ndarray:
    """Every n-th pixel, so that detection costs the same at any size."""
    step = max(1, frame.shape[0] // height)
    return frame[step // 2 :: step, step // 2 :: step]


def _palette() -> tuple[list[str], np.ndarray]:
    """Names and colours (0..1): objects first, then each ground's tones from light to dark."""
    names, colours = list(world.COLOURS), [list(c) for c in world.COLOURS.values()]
    for name in world.COLOURS:
        light, dark = (tone.numpy() for tone in world.ground_tones(name))
        for mix in np.linspace(0, 1, 4):
            names.append(f"ground {name}")
            colours.append(list(light * (1 - mix) + dark * mix))
    return names, np.array(colours, dtype=np.float32)


NAMES, COLOURS = _palette()


def _nearest(frame: np.ndarray) -> np.ndarray:
    """(H, W) indices into `COLOURS`."""
    pixels = frame.reshape(-1, 3).astype(np.float32) / 255
    distances = (COLOURS**2).sum(1) - 2 * pixels @ COLOURS.T  # squared, without what is alike for all colours
    return distances.argmin(1).reshape(frame.shape[:2])


def _objects(frame: np.ndarray) -> tuple[list[Thing], str | None]:
    """The objects in a frame, largest first within a colour, and the ground's colour."""
    height, nearest = frame.shape[0], _nearest(frame)
    found = np.bincount(nearest.reshape(-1), minlength=len(NAMES))
    things = []
    for index in range(len(world.COLOURS)):
        if found[index] < SMALLEST * nearest.size:
            continue
        mask = nearest == index
        for part in sorted(components(mask), reverse=True):
            if SMALLEST <= part.pixels / nearest.size <= LARGEST:
                left, top, right, bottom = part.box
                own = mask[top:bottom, left:right]
                number = _number(own, round(BRIDGE * height / 2))
                things.append(Thing(NAMES[index], part.x / height, part.y / height, _likeness(own), number))
    grounds: Counter[str] = Counter()
    for name, pixels in zip(NAMES[len(world.COLOURS) :], found[len(world.COLOURS) :].tolist(), strict=True):
        grounds[name[7:]] += pixels
    return things, grounds.most_common(1)[0][0] if grounds.total() else None


def _number(mask: np.ndarray, depth: int) -> int:
    """How many large parts a mask falls into without its outermost `depth` pixels; at least one."""
    inner = np.pad(mask, 1)
    for _ in range(depth):
        within = inner.copy()
        for axis in (0, 1):
            for step in (1, -1):
                within &= np.roll(inner, step, axis)
        inner = within
    sizes = [part.pixels for part in components(inner)]
    return max(1, sum(size >= max(sizes) / 4 for size in sizes))


def _likeness(mask: np.ndarray) -> dict[str, float]:
    """Of each shape, stretched to the box of `mask`: intersection over union of the two."""
    rows, columns = (((np.arange(TEMPLATE) + 0.5) * size / TEMPLATE).astype(int) for size in mask.shape)
    stretched = mask[rows][:, columns]
    return {
        shape: float((stretched & template).sum() / (stretched | template).sum())
        for shape, template in _templates().items()
    }


@cache
def _templates() -> dict[str, np.ndarray]:
    """Each shape in its own box, (TEMPLATE, TEMPLATE) booleans."""
    fine = torch.linspace(-1.1, 1.1, 881)
    made = {}
    for shape in world.SHAPES:
        inside = (world.shape_distance(shape, fine[None, :], fine[:, None], 1.0) < 0).numpy()
        (top, bottom), (left, right) = (np.flatnonzero(inside.any(axis))[[0, -1]] for axis in (1, 0))
        box = inside[top : bottom + 1, left : right + 1]
        rows, columns = (((np.arange(TEMPLATE) + 0.5) * size / TEMPLATE).astype(int) for size in box.shape)
        made[shape] = box[rows][:, columns]
    return made


def _ground_pattern(frames: list[np.ndarray], colour: str) -> str:
    """The ground whose darkness correlates best with that of the frames, at any of the phases that it may have."""
    light, dark = (tone.numpy() for tone in world.ground_tones(colour))
    axis = (dark - light) / ((dark - light) ** 2).sum()
    names, patterns = _patterns(*frames[0].shape[:2])
    ground = np.stack([_nearest(f).reshape(-1) >= len(world.COLOURS) for f in frames], axis=1)
    darkness = np.stack([(f.reshape(-1, 3) / 255 - light) @ axis for f in frames], axis=1)
    pixels = np.maximum(ground.sum(0), 1)
    darkness = np.where(ground, darkness - (darkness * ground).sum(0) / pixels, 0)
    # sums over each frame's ground, so that no pattern is copied
    there = ground.astype(np.float64)
    variance = np.square(patterns) @ there - np.square(patterns @ there) / pixels
    scales = np.sqrt(np.maximum(variance, 0)) * np.linalg.norm(darkness, axis=0)
    return names[int((patterns @ darkness / np.maximum(scales, 1e-9)).sum(1).argmax())]


@cache
def _patterns(height: int, width: int) -> tuple[list[str], np.ndarray]:
    """Every ground at every phase and zoom in a frame: names, and darkness (patterns, height * width)."""
    names, patterns = [], []
    for ground, zoom in itertools.product(world.GROUNDS, ZOOMS):
        pixel = 1 / height / zoom
        x, y = ((torch.arange(size) + 0.5) * pixel for size in (width, height))
        for a in PHASES if ground != "gradient" else PHASES[:1]:
            for b in PHASES if ground in ("checkerboard", "hills") else PHASES[:1]:
                names.append(ground)
                patterns.append(world.ground_mix(ground, (float(a), float(b)), x, y, pixel).flatten().numpy())
    return names, np.stack(patterns).astype(np.float64)


def components(mask: np.ndarray) -> list[Component]:
    """The 4-connected components of a boolean image, positions in pixels.

    Runs of each row are joined with the runs above that they touch (union-find).
    """
    steps = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    y, start = np.nonzero(steps == 1)  # of the runs, row by row and from left to right
    end = np.nonzero(steps == -1)[1]
    if len(y) == 0:
        return []
    parents = list(range(len(y)))

    def root(i: int) -> int:
        while parents[i] != i:
            parents[i] = parents[parents[i]]
            i = parents[i]
        return i

    rows, starts, ends, above = y.tolist(), start.tolist(), end.tolist(), 0
    for run, (row, a, b) in enumerate(zip(rows, starts, ends, strict=True)):
        while rows[above] < row - 1 or (rows[above] == row - 1 and ends[above] <= a):
            above += 1
        touched = above
        while rows[touched] == row - 1 and starts[touched] < b:
            parents[root(run)] = root(touched)
            touched += 1
    roots = np.array([root(run) for run in range(len(rows))])
    order = np.argsort(roots, kind="stable")
    first = np.flatnonzero(np.diff(roots[order], prepend=-1))  # run of each component, in that order
    y, start, end = y[order], start[order], end[order]
    pixels = np.add.reduceat(end - start, first)
    x_mean = np.add.reduceat((start + end - 1) / 2 * (end - start), first) / pixels
    y_mean = np.add.reduceat(y * (end - start), first) / pixels
    boxes = (
        np.minimum.reduceat(start, first),
        np.minimum.reduceat(y, first),
        np.maximum.reduceat(end, first),
        np.maximum.reduceat(y, first) + 1,
    )
    return [
        Component(n, x, y, (left, top, right, bottom))
        for n, x, y, left, top, right, bottom in zip(
            *(column.tolist() for column in (pixels, x_mean, y_mean, *boxes)), strict=True
        )
    ]
