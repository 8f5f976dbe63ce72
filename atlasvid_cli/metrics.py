"""What is in a decoded video of the procedural world, found on pixels by rules that know nothing of the model.

The detector labels every pixel with the nearest of the world's object colours and ground tones, and takes connected
components of one object colour that are large enough and do not fill the frame.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from . import world

SMALLEST, LARGEST = 0.008, 0.4  # of the frame's area
DETECTION_HEIGHT = 160


@dataclass(frozen=True)
class Detection:
    """What was seen: None where nothing was. Positions in frame heights, speed in frame extents a second."""

    colour: str | None
    direction: str | None
    count: int
    ground_colour: str | None
    speed: float | None


def detect(frames: list[np.ndarray], seconds: float) -> Detection:
    """Attributes of a clip given as uint8 (H, W, 3) frames that are evenly spread over `seconds`."""
    found = [_objects(_shrink(f)) for f in frames]
    votes = Counter(c for objects, _ in found for c, *_ in objects)
    grounds = Counter(g for _, g in found if g)
    ground = grounds.most_common(1)[0][0] if grounds else None
    if not votes:
        return Detection(None, None, 0, ground, None)
    colour = votes.most_common(1)[0][0]
    counts = Counter(len(objects) for objects, _ in found)
    centres = [next(((x, y) for c, x, y in objects if c == colour), None) for objects, _ in found]
    seen = [(i, c) for i, c in enumerate(centres) if c is not None]
    direction = speed = None
    if len(seen) >= 2:
        (i, a), (j, b) = seen[0], seen[-1]
        dx, dy = b[0] - a[0], b[1] - a[1]
        elapsed = max((j - i) * seconds / max(1, len(frames) - 1), 1e-6)
        if max(abs(dx), abs(dy)) > 0.01:
            horizontal = abs(dx) > abs(dy)
            direction = ("right" if dx > 0 else "left") if horizontal else ("down" if dy > 0 else "up")
            height, width, _ = frames[0].shape
            speed = abs(dx) / (width / height) / elapsed if horizontal else abs(dy) / elapsed
    return Detection(colour, direction, counts.most_common(1)[0][0], ground, speed)


def seam_energy(frame: np.ndarray, rows: list[int], columns: list[int]) -> tuple[float, float]:
    """Mean squared step between neighbouring pixels of a uint8 (H, W, 3) frame: across the borders, and elsewhere.

    A border at `rows` or `columns` y lies between pixels y - 1 and y. The ratio of the two, averaged over clips and
    divided by that of true renders, says whether windows show (DESIGN §9).
    """
    pixels = frame.astype(np.float32) / 255
    border: list[np.ndarray] = []
    elsewhere: list[np.ndarray] = []
    for axis, at in ((0, rows), (1, columns)):
        steps = np.square(np.diff(pixels, axis=axis)).mean(axis=(1 - axis, 2))
        on_border = np.zeros(len(steps), bool)
        on_border[[y - 1 for y in at if 0 < y <= len(steps)]] = True
        border.append(steps[on_border])
        elsewhere.append(steps[~on_border])
    return float(np.concatenate(border).mean()), float(np.concatenate(elsewhere).mean())


def adherence(detection: Detection, attributes: tuple[str, str, str, str, str]) -> dict[str, bool]:
    """Which attributes of the prompt came true."""
    colour, _, direction, ground_colour, _ = attributes
    return {
        "colour": detection.colour == colour,
        "direction": detection.direction == direction,
        "count": detection.count == 1,
        "ground colour": detection.ground_colour == ground_colour,
    }


def _shrink(frame: np.ndarray) -> np.ndarray:
    """Every n-th pixel, so that detection costs the same at any size."""
    step = max(1, frame.shape[0] // DETECTION_HEIGHT)
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


def _objects(frame: np.ndarray) -> tuple[list[tuple[str, float, float]], str | None]:
    """[(colour, x, y)] of the objects in a frame, positions in frame heights, and the ground's colour."""
    height, width, _ = frame.shape
    pixels = frame.reshape(-1, 3).astype(np.float32) / 255
    nearest = ((pixels[:, None] - COLOURS[None]) ** 2).sum(-1).argmin(1).reshape(height, width)
    objects = []
    for index in range(len(world.COLOURS)):
        for size, x, y in components(nearest == index):
            if SMALLEST <= size / nearest.size <= LARGEST:
                objects.append((NAMES[index], x / height, y / height))
    grounds = Counter(NAMES[i][7:] for i in nearest[nearest >= len(world.COLOURS)].tolist())
    return objects, grounds.most_common(1)[0][0] if grounds else None


def components(mask: np.ndarray) -> list[tuple[int, float, float]]:
    """(pixels, x, y) of each 4-connected component of a boolean image; x, y its mean position in pixels.

    Runs of each row are joined with the runs above that they touch (union-find).
    """
    parents: list[int] = []
    sums: list[list[float]] = []

    def root(i: int) -> int:
        while parents[i] != i:
            parents[i] = parents[parents[i]]
            i = parents[i]
        return i

    above: list[tuple[int, int, int]] = []
    for y, row in enumerate(mask):
        edges = np.flatnonzero(np.diff(np.concatenate(([0], row.astype(np.int8), [0]))))
        runs = []
        for a, b in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
            label = len(parents)
            parents.append(label)
            sums.append([b - a, (a + b - 1) / 2 * (b - a), y * (b - a)])
            for c, d, other in above:
                if a < d and c < b:
                    parents[root(label)] = root(other)
            runs.append((a, b, label))
        above = runs
    totals: dict[int, list[float]] = {}
    for label, values in enumerate(sums):
        total = totals.setdefault(root(label), [0.0, 0.0, 0.0])
        for i, value in enumerate(values):
            total[i] += value
    return [(int(n), x / n, y / n) for n, x, y in totals.values()]
