"""Option values as text → numbers, each rejected with a sentence that shows a good one."""

import math
import re
from fractions import Fraction
from typing import TYPE_CHECKING

from .errors import UsageError

if TYPE_CHECKING:
    from .plan import Request

RESOLUTIONS = {
    "8k": (7680, 4320),
    "4k": (3840, 2160),
    "uhd": (3840, 2160),
    "2160p": (3840, 2160),
    "1440p": (2560, 1440),
    "1080p": (1920, 1080),
    "720p": (1280, 720),
    "540p": (960, 540),
    "480p": (832, 480),
}
MIN_SIDE_PX = 16
MAX_SIDE_PX = 16384
MAX_SECONDS = 600


def parse_resolution(text: str) -> tuple[int, int]:
    """Width and height in pixels of "3840x2160", "3840*2160", "4k" or "1080p"."""
    if (named := RESOLUTIONS.get(text.strip().lower())) is not None:
        return named
    match = re.fullmatch(r"\s*(\d{1,6})\s*[xX*×]\s*(\d{1,6})\s*", text, re.ASCII)
    if match is None:
        names = ", ".join(RESOLUTIONS)
        raise UsageError(f"--res {text!r} is not a size: give pixels (--res 3840x2160) or one of {names}")
    width, height = int(match[1]), int(match[2])
    if min(width, height) < MIN_SIDE_PX or max(width, height) > MAX_SIDE_PX:
        raise UsageError(
            f"--res {text!r} cannot be made, because each side must have {MIN_SIDE_PX} to {MAX_SIDE_PX} pixels: "
            "try --res 1920x1080"
        )
    return width, height


def parse_seconds(text: str) -> Fraction:
    """Exact duration in seconds of "12", "2.5" or "25/2"."""
    # Fraction alone would take 1e999999999 and compute it.
    if re.fullmatch(r"\d{1,6}(\.\d{0,9})?|\.\d{1,9}|\d{1,9}/\d{1,9}", text.strip(), re.ASCII):
        try:
            seconds = Fraction(text.strip())
        except (ZeroDivisionError, ValueError):
            seconds = Fraction(0)
        if 0 < seconds <= MAX_SECONDS:
            return seconds
    raise UsageError(
        f"--seconds {text!r} is not a duration: give a number above 0 and at most {MAX_SECONDS}, such as --seconds 12"
    )


def parse_region(text: str, width: int, height: int) -> tuple[int, int, int, int]:
    """`x, y, w, h` in output pixels; the rectangle must lie inside a `width` x `height` frame."""
    match = re.fullmatch(r"\s*(\d{1,6})\s*,\s*(\d{1,6})\s*,\s*(\d{1,6})\s*,\s*(\d{1,6})\s*", text, re.ASCII)
    if match is None:
        raise UsageError(f"--region {text!r} is not x,y,w,h in output pixels: try --region 0,0,640,360")
    x, y, w, h = (int(part) for part in match.groups())
    if not w or not h or x + w > width or y + h > height:
        raise UsageError(
            f"--region {text!r} is empty or leaves the {width}x{height} frame: give x,y,w,h in output pixels inside it"
        )
    return x, y, w, h


def parse_frames(text: str) -> tuple[int, int]:
    """`a:b`, output frames from a up to but without b."""
    match = re.fullmatch(r"\s*(\d{1,6})\s*:\s*(\d{1,6})\s*", text, re.ASCII)
    if match is None or int(match[1]) >= int(match[2]):
        raise UsageError(f"--frames {text!r} is not a range of frames: give first:end, as --frames 0:48")
    return int(match[1]), int(match[2])


def parse_shard(text: str) -> tuple[int, int]:
    """`i, n` of "i/n", 1 <= i <= n."""
    match = re.fullmatch(r"\s*(\d{1,6})\s*/\s*(\d{1,6})\s*", text, re.ASCII)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise UsageError(f"--shard {text!r} is not i/n with 1 <= i <= n: the first of four jobs takes --shard 1/4")
    return int(match[1]), int(match[2])


def check_finite(option: str, value: float | None, above: float) -> float | None:
    """`value`, which must be a finite number of at least `above`; click's own ranges let nan and inf pass."""
    if value is not None and not (math.isfinite(value) and value >= above):
        raise UsageError(f"{option} {value} cannot be used: give a finite number of at least {above:g}")
    return value


def make_request(
    res: str,
    seconds: str,
    fps: int | None,
    seed: int,
    steps: int | None,
    guidance_scale: float | None,
    flow_shift: float | None,
    preset: str,
    model_path: str | None,
    chunk: int | None = None,
    codec: str = "h264",
) -> "Request":
    """The request that these flags make. Raises UsageError."""
    width, height = parse_resolution(res)
    length = parse_seconds(seconds)
    check_finite("--guidance-scale", guidance_scale, 0)
    check_finite("--flow-shift", flow_shift, 0)
    from .plan import Request
    from .video import suffix_for

    suffix_for(codec)  # an unknown codec is said before anything else

    return Request(
        preset,
        width,
        height,
        length,
        fps,
        seed,
        steps,
        guidance_scale,
        flow_shift,
        chunk,
        codec,
        None,
        None,
        model_path,
    )
