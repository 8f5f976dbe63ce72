"""Existing clips as frames for the model: upright, in time, cropped and scaled, one frame in memory at a time.

Scaling is torch's antialiased bicubic in float and not swscale's: it takes a fractional crop of any size exactly, and
gives the same values on every machine.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from av.stream import Disposition

from .digests import file_digest
from .errors import InputError
from .video import opened, rgb

DEFAULT_RATE = Fraction(25)  # of a stream that says nothing of time, as FFmpeg has it
ROUNDED = Fraction(1, 1000)  # containers round time stamps, Matroska to this
CUT_SHORT = Fraction(1, 2)  # seconds that may be missing at the end of a file
HDR = (16, 18)  # transfer characteristics of PQ and HLG


class Crop(NamedTuple):
    """A part of the wanted aspect: `zoom` >= 1 times smaller than the largest, at `x`, `y` in 0..1 of its room."""

    zoom: float = 1.0
    x: float = 0.5
    y: float = 0.5


@dataclass(frozen=True)
class Clip:
    """A video file that can be read. `width` and `height` are those of its upright first frame in square pixels.

    Seconds are exact; `start` and `last` are the times of its first and last frame, and it has `fps` frames a second on
    average. `rate` (frames a second) is set where frames carry no time stamps, and counts instead of them.
    """

    path: Path
    sha256: str
    width: float
    height: float
    seconds: Fraction
    start: Fraction
    last: Fraction
    fps: Fraction
    rate: Fraction | None
    is_hdr: bool


def content(path: Path) -> str:
    """sha256 of a clip in hex, read once a process. `InputError` where it is no file that can be read."""
    try:
        if path.is_file():
            return file_digest(path)
        reason = "it does not exist or is not a file"
    except OSError as error:
        reason = str(error.strerror)
    raise InputError(f"{path} cannot be read ({reason}): give the path of a video")


def open_clip(path: Path) -> Clip:
    """What `path` holds, after a pass over its packets and its first frame. `InputError` when it is not a video."""
    sha256 = content(path)
    with opened(path) as (container, stream):
        if stream.disposition & Disposition.attached_pic:
            raise InputError(f"'{path}' holds no video but a cover picture: give a video file.")
        first = next(container.decode(stream), None)
        if first is None:
            raise InputError(f"'{path}' holds no frame that can be decoded: save it again as H.264 .mp4.")
        size = float(first.width * (stream.sample_aspect_ratio or 1)), float(first.height)
        width, height = size[::-1] if _is_turned(first) else size
        is_hdr = int(first.color_trc) in HDR
    with opened(path) as (container, stream):  # not every container can be rewound
        start, last, end, fps, rate = _times(container, stream)
    if rate is None:  # frames before the first that can be decoded, as in a recording cut anywhere, are not there
        start = Fraction(first.pts) * first.time_base
    return Clip(path, sha256, width, height, end - start, start, last, fps, rate, is_hdr)


def _times(container: Any, stream: Any) -> tuple[Fraction, Fraction, Fraction, Fraction, Fraction | None]:
    """Seconds at which the first frame starts, the last one starts and ends; frames a second; the rate where frames are
    counted."""
    rate = stream.average_rate or stream.guessed_rate or DEFAULT_RATE
    count, timed, spans, delays = 0, True, None, set()
    for packet in container.demux(stream):
        if not packet.size or packet.is_discard:
            continue
        count += 1
        if packet.pts is None:
            timed = False
        else:
            delays.add(packet.dts is not None and packet.pts - packet.dts)
            end = packet.pts + (packet.duration or 0)
            low, high, ends = spans or (packet.pts, packet.pts, end)
            spans = min(low, packet.pts), max(high, packet.pts), max(ends, end)
    # AVI knows no times: FFmpeg gives packets those at which they lie in the file, wrong where frames are not shown in
    # that order
    if container.format.name == "avi" and stream.codec_context.has_b_frames and len(delays) == 1:
        timed = False
    if not timed or spans is None:
        return Fraction(0), (count - 1) / rate, count / rate, rate, rate
    first, last, end = (Fraction(v) * stream.time_base for v in spans)
    end = end if end > last else last + 1 / rate
    return first, last, end, count / (end - first), None


def read_clip(
    clip: Clip,
    fps: Fraction,
    count: int,
    shown: tuple[int, int],
    size: tuple[int, int] | None = None,
    crop_at: Callable[[int], Crop] = lambda _: Crop(),
) -> Iterator[torch.Tensor]:
    """`count` frames (3, H, W) fp32 in -1..1, at k/fps seconds the one that a player would show.

    A part of the aspect `shown` (width, height in pixels), for frame k the one of `crop_at(k)`, else the largest in the
    centre, is scaled to it; up to `size`, where that is larger, the right and bottom edges are repeated. After its end
    the clip holds its last frame. `InputError` where it cannot be decoded as far as it says that it goes.
    """
    made, image = None, None
    for k, (frame, pixel_aspect) in enumerate(_at(clip, fps, count)):
        crop = crop_at(k)
        if image is None or made != (frame, crop):  # a slow clip shows a frame several times
            pixel = 1 / pixel_aspect if _is_turned(frame) else pixel_aspect
            made, image = (frame, crop), _fit(upright(frame), pixel, shown, crop)
            if size:
                image = F.pad(image, (0, size[0] - shown[0], 0, size[1] - shown[1]), "replicate")
        yield image[0]


def _at(clip: Clip, fps: Fraction, count: int) -> Iterator[tuple[Any, Fraction]]:
    """The decoded frame at each of `count` instants, and the width of a pixel in heights."""
    shown, time, done = None, clip.start, 0
    with opened(clip.path) as (container, stream):
        stream.thread_type = "AUTO"
        pixel_aspect = stream.sample_aspect_ratio or Fraction(1)
        slack = min(stream.time_base / 2, ROUNDED / 2) if stream.time_base else ROUNDED / 2
        for i, frame in enumerate(container.decode(stream)):
            begins = i / clip.rate if clip.rate else Fraction(frame.pts) * frame.time_base
            while shown is not None and done < count and done / fps + slack < begins - clip.start:
                yield shown, pixel_aspect
                done += 1
            if done == count:
                return
            shown, time = frame, begins
    if shown is None or (time + CUT_SHORT < clip.last and done / fps < clip.last - clip.start):
        raise InputError(
            f"'{clip.path}' can be decoded up to {float(time - clip.start):.2f} s only, of {float(clip.seconds):.2f} s:"
            " copy it again, or cut it there."
        )
    for _ in range(done, count):
        yield shown, pixel_aspect


def upright(frame: Any) -> np.ndarray:
    """A decoded frame as (H, W, 3) uint8 RGB, turned and mirrored as its display matrix says, to a quarter turn."""
    image = rgb(frame)
    a, b, c, d = _display_matrix(frame)
    if _is_turned(frame):  # x' = c*y, y' = b*x
        image, across, down = image.transpose(1, 0, 2), c, b
    else:  # x' = a*x, y' = d*y
        across, down = a, d
    return image[:: -1 if down < 0 else 1, :: -1 if across < 0 else 1]


def _display_matrix(frame: Any) -> tuple[int, int, int, int]:
    """a, b, c, d of x' = a*x + c*y, y' = b*x + d*y, in 16.16."""
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return 1, 0, 0, 1
    a, b, _, c, d = np.frombuffer(bytes(data), np.int32)[:5].tolist()
    return a, b, c, d


def _is_turned(frame: Any) -> bool:
    """Whether a frame is shown with its sides exchanged."""
    a, b, c, d = _display_matrix(frame)
    return abs(b) + abs(c) > abs(a) + abs(d)


def _fit(image: np.ndarray, pixel_aspect: Fraction, shown: tuple[int, int], crop: Crop) -> torch.Tensor:
    """A part of `image` (H, W, 3) with the aspect of `shown`, scaled to it: (1, 3, h, w) in -1..1."""
    height, width = image.shape[:2]
    scale = min(float(width * pixel_aspect) / shown[0], height / shown[1]) / crop.zoom
    w = min(width, max(1, round(shown[0] * scale / float(pixel_aspect))))
    h = min(height, max(1, round(shown[1] * scale)))
    left, top = int((width - w) * crop.x), int((height - h) * crop.y)
    part = np.ascontiguousarray(image[top : top + h, left : left + w])
    pixels = torch.from_numpy(part).permute(2, 0, 1)[None].float()
    resized = F.interpolate(pixels, size=(shown[1], shown[0]), mode="bicubic", antialias=True, align_corners=False)
    return resized.div_(127.5).sub_(1).clamp_(-1, 1)
