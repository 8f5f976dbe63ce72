"""Option values as text → numbers, each rejected with a sentence that shows a good one."""

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from .errors import InputError, UsageError

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
MAX_FPS = 120
MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class Lora:
    """A LoRA file, the weight that it is merged with, and the one of a model's two experts that it is for."""

    path: Path
    weight: float = 1.0
    expert: Literal["high", "low"] | None = None


def parse_lora(text: str) -> Lora:
    """ "style.safetensors", "style.safetensors:0.8", and for one of two experts "style.safetensors:0.8@high"."""
    match = re.fullmatch(r"(.+?)(?::(-?\d*\.?\d+))?(?:@(high|low))?", text, re.ASCII | re.DOTALL)
    if match is None or not Path(match[1]).is_file():
        raise InputError(f"--lora {text!r} names no file: give a path, or a path and a weight (style.safetensors:0.8)")
    return Lora(Path(match[1]), float(match[2] or 1), match[3])  # type: ignore[arg-type]


def parse_offload(text: str) -> Any:
    """`none`, `block` or `host`; None for `auto`, which leaves the choice to the plan."""
    return None if text == "auto" else text


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


def check_finite(option: str, value: float | None, least: float = 0, zero: bool = True) -> float | None:
    """`value`, finite and at least `least`, above it without `zero`; click's own ranges let nan and inf pass."""
    if value is not None and not (math.isfinite(value) and (value >= least if zero else value > least)):
        bound = f"of at least {least:g}" if zero else f"above {least:g}"
        raise UsageError(f"{option} {value} cannot be used: give a finite number {bound}")
    return value
