"""The procedural world that the embedded model is trained on: scenes, and their exact frames at any scale.

A scene is one object of a given colour, shape and direction over a textured ground. Rendering is analytic (signed
distances, box-filtered edges), so a 4K crop and a 256 px frame of the same scene agree without resampling.
Scene units: the frame is 1 high and `aspect` wide, y grows downwards.
"""

import hashlib
import math
import random
from dataclasses import dataclass

import torch

Attributes = tuple[str, str, str, str, str]  # colour, shape, direction, ground colour, ground

COLOURS: dict[str, tuple[float, float, float]] = {  # sRGB, 0..1
    "red": (0.86, 0.10, 0.12),
    "green": (0.10, 0.62, 0.20),
    "blue": (0.12, 0.25, 0.86),
    "yellow": (0.96, 0.86, 0.12),
    "purple": (0.54, 0.14, 0.70),
    "orange": (0.97, 0.52, 0.08),
    "white": (0.97, 0.97, 0.97),
    "black": (0.05, 0.05, 0.05),
}
SHAPES = ("ball", "square", "triangle", "ring", "star")
DIRECTIONS: dict[str, tuple[float, float]] = {
    "left": (-1.0, 0.0),
    "right": (1.0, 0.0),
    "up": (0.0, -1.0),
    "down": (0.0, 1.0),
}
GROUNDS = ("checkerboard", "stripes", "hills", "gradient")
HELD_OUT_FRACTION = 0.1
# how often each is drawn for training, by how hard it is to draw well (docs/LOG.md); held-out ones all alike
SHAPE_SHARES, GROUND_SHARES = (2, 2, 3, 4, 4), (1, 1, 2, 1)
SPEED = (0.045, 0.055)  # frame extents a second along the direction, where the object then stays in frame
LONGEST = 12.0  # seconds
REACH = 0.9  # cells from a cell's middle to what it may touch: half a diagonal and a little


@dataclass(frozen=True)
class Scene:
    """One scene. `size` is the object's radius, `start` its centre at t = 0, in scene units; `speed` in units/s."""

    colour: str
    shape: str
    direction: str
    ground_colour: str
    ground: str
    aspect: float
    size: float
    start: tuple[float, float]
    speed: float
    phase: tuple[float, float]

    @property
    def attributes(self) -> Attributes:
        return self.colour, self.shape, self.direction, self.ground_colour, self.ground


def is_held_out(combination: tuple[str, ...]) -> bool:
    """Whether a combination of attributes, or of phrases, is kept out of training: by its hash alone, so it never
    moves."""
    digest = hashlib.sha256(" ".join(combination).encode()).digest()
    return int.from_bytes(digest[:4], "big") < HELD_OUT_FRACTION * 2**32


def sample_attributes(rng: random.Random, held_out: bool = False) -> Attributes:
    """Random attributes from the training or the held-out combinations."""

    def draw(values: tuple[str, ...], shares: tuple[int, ...]) -> str:
        return rng.choice(values) if held_out else rng.choices(values, shares)[0]

    while True:
        colour, ground_colour = rng.sample(sorted(COLOURS), 2)
        attributes = (
            colour,
            draw(SHAPES, SHAPE_SHARES),
            rng.choice(sorted(DIRECTIONS)),
            ground_colour,
            draw(GROUNDS, GROUND_SHARES),
        )
        if is_held_out(attributes) == held_out:
            return attributes


def sample_scene(
    rng: random.Random,
    aspect: float,
    seconds: float,
    attributes: Attributes | None = None,
    haste: float = 1.0,
) -> Scene:
    """A random scene whose object stays inside the frame for `seconds`; `haste` times as fast, for 12/haste at most."""
    colour, shape, direction, ground_colour, ground = attributes or sample_attributes(rng)
    size = rng.uniform(0.17, 0.22) * min(1.0, aspect)
    dx, dy = DIRECTIONS[direction]
    extent = aspect if dx else 1.0
    margin = size * 1.05
    speed = haste * min(rng.uniform(*SPEED) * extent, (extent - 2 * margin) / LONGEST)
    travel = speed * seconds
    # the centre starts where the whole path fits, on the side that the object moves away from
    slack = extent - 2 * margin - travel
    along = margin + rng.uniform(0.0, slack)
    if dx + dy < 0:
        along = extent - along
    across_extent = 1.0 if dx else aspect
    across = across_extent / 2 + rng.uniform(-0.6, 0.6) * max(across_extent / 2 - margin, 0.0)
    start = (along, across) if dx else (across, along)
    return Scene(
        colour,
        shape,
        direction,
        ground_colour,
        ground,
        aspect,
        size,
        start,
        speed,
        (rng.random(), rng.random()),
    )


def render(
    scene: Scene,
    times: torch.Tensor,
    height: int,
    width: int,
    window: tuple[float, float, float] | None = None,
) -> torch.Tensor:
    """Frames of the scene as (3, T, H, W) fp32 in -1..1.

    `times` (T,) are seconds. `window` is (x, y, h) in scene units: the top-left corner and the height that is shown
    (its width follows from the pixel aspect); without it, the whole frame.
    """
    x0, y0, shown = window or (0.0, 0.0, 1.0)
    pixel = shown / height
    y = y0 + (torch.arange(height, dtype=torch.float32) + 0.5) * pixel
    x = x0 + (torch.arange(width, dtype=torch.float32) + 0.5) * pixel
    ground = _ground(scene, x, y, pixel)
    colour = torch.tensor(COLOURS[scene.colour]).view(3, 1, 1)
    dx, dy = DIRECTIONS[scene.direction]
    frames = []
    for t in times.tolist():
        cx, cy = scene.start[0] + dx * scene.speed * t, scene.start[1] + dy * scene.speed * t
        distance = shape_distance(scene.shape, (x - cx)[None, :], (y - cy)[:, None], scene.size)
        cover = (0.5 - distance / pixel).clamp_(0.0, 1.0)
        frames.append(torch.lerp(ground, colour.expand_as(ground), cover))
    return torch.stack(frames, dim=1).mul_(2.0).sub_(1.0)


def near_object(
    scene: Scene,
    times: torch.Tensor,
    rows: int,
    columns: int,
    window: tuple[float, float, float] | None = None,
) -> torch.Tensor:
    """Which of `rows` x `columns` cells of the frame, or of `window`, the object's outline or inside may touch at each
    time, (T, rows, columns) bool."""
    x0, y0, shown = window or (0.0, 0.0, 1.0)
    cell = shown / rows
    y, x = (first + (torch.arange(n) + 0.5) * cell for first, n in ((y0, rows), (x0, columns)))
    moved = scene.speed * times.view(-1, 1, 1)
    cx, cy = (at + d * moved for at, d in zip(scene.start, DIRECTIONS[scene.direction], strict=True))
    return shape_distance(scene.shape, x - cx, y[:, None] - cy, scene.size) < REACH * cell


def ground_tones(colour: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The light and dark tone (3,) of a ground: greyer than any object, so that the two never look alike."""
    light = torch.lerp(torch.tensor(COLOURS[colour]), torch.full((3,), 0.55), 0.38)
    return light, light * 0.7


def shape_distance(shape: str, x: torch.Tensor, y: torch.Tensor, r: float) -> torch.Tensor:
    """Signed distance to the outline, negative inside, scene units."""
    if shape == "ball":
        return torch.hypot(x, y) - r
    if shape == "ring":
        return (torch.hypot(x, y) - 0.74 * r).abs() - 0.26 * r
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.85 * r
    if shape == "triangle":  # equilateral, apex up: three half planes
        s = math.sqrt(3.0) / 2
        return torch.maximum(y - 0.5 * r, s * x.abs() - 0.5 * y - 0.5 * r)
    if shape == "star":  # five points: fold into one tenth, then the edge from tip to notch
        sector = math.pi / 5
        angle = torch.atan2(x.expand_as(x + y), -y.expand_as(x + y))
        folded = torch.remainder(angle + sector, 2 * sector) - sector
        radius = torch.hypot(x, y)
        px, py = radius * torch.cos(folded), radius * torch.sin(folded).abs()
        notch = 0.45 * r
        nx, ny = notch * math.cos(sector), notch * math.sin(sector)
        ex, ey = nx - r, ny
        length = math.hypot(ex, ey)
        return ((py * -ex) + (px - r) * ey) / length
    raise ValueError(f"unknown shape {shape!r}")


def _ground(scene: Scene, x: torch.Tensor, y: torch.Tensor, pixel: float) -> torch.Tensor:
    light, dark = (tone.view(3, 1, 1) for tone in ground_tones(scene.ground_colour))
    return torch.lerp(light, dark, ground_mix(scene.ground, scene.phase, x, y, pixel))


def ground_mix(ground: str, phase: tuple[float, float], x: torch.Tensor, y: torch.Tensor, pixel: float) -> torch.Tensor:
    """How dark a ground is, (H, W) from 0 (its light tone) to 1, at x (W,) and y (H,), box-filtered over `pixel`."""
    px, py = phase
    if ground == "checkerboard":
        cell = 0.25
        columns, rows = (_square_wave(at / cell + p, pixel / cell) for at, p in ((x, px), (y, py)))
        return 0.5 - 0.5 * columns[None, :] * rows[:, None]
    if ground == "stripes":  # diagonal
        cell = 0.2
        return 0.5 - 0.5 * _square_wave((x[None, :] + y[:, None]) / cell / math.sqrt(2) + px, pixel / cell)
    if ground == "hills":  # three ridges, each darker than the one behind it
        mix = torch.zeros(len(y), len(x))
        for i in range(3):
            ridge = 0.3 + 0.25 * i + 0.09 * torch.sin(2 * math.pi * (x * (0.8 + 0.23 * i) + px + i * py))
            cover = ((y[:, None] - ridge[None, :]) / pixel + 0.5).clamp(0.0, 1.0)
            mix = torch.lerp(mix, torch.full_like(mix, (i + 1) / 3), cover)
        return mix
    if ground == "gradient":  # light at the top
        return y[:, None].clamp(0.0, 1.0).expand(len(y), len(x))
    raise ValueError(f"unknown ground {ground!r}")


def _square_wave(phase: torch.Tensor, footprint: float) -> torch.Tensor:
    """+1 on even cells, -1 on odd ones, averaged over a box of `footprint` cells."""

    # the integral of the wave is a triangle wave; a box filter is a difference of integrals
    def integral(p: torch.Tensor) -> torch.Tensor:
        return 1.0 - (torch.remainder(p, 2.0) - 1.0).abs()

    return (integral(phase + footprint / 2) - integral(phase - footprint / 2)) / footprint
