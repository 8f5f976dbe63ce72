"""From flags to the request that a plan is made from."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import InputError, UsageError
from .parse import MAX_SECONDS, check_finite, parse_lora, parse_offload, parse_resolution, parse_seconds

if TYPE_CHECKING:
    from .console import Console
    from .plan import Request


def make_request(
    res: str, seconds: str | None, preset: str, loras: list[str] | None = None, offload: str = "auto", **fields: Any
) -> "Request":
    """The request that flags make; `fields` are those of its fields that need no parsing. Raises UsageError."""
    width, height = parse_resolution(res)
    length = parse_seconds("4" if seconds is None else seconds)
    check_finite("--guidance-scale", fields.get("guidance_scale"), 1)
    check_finite("--flow-shift", fields.get("flow_shift"), zero=False)
    from .plan import Request
    from .video import suffix_for

    suffix_for(fields.get("codec", "h264"))  # an unknown codec is said before anything else
    given = {"loras": tuple(map(parse_lora, loras or ())), "offload": parse_offload(offload)}
    return Request(preset, width, height, length, **given, **fields)


def with_clip(
    request: "Request", path: Path | None, seconds: str | None, prompt_file: str | None, console: "Console"
) -> "Request":
    """The request with the clip of --from-video, which decides the length where `seconds` was not given."""
    if path is None:
        return request
    names = "steps", "guidance_scale", "flow_shift", "sampler"
    sampling = {name.replace("_", "-"): getattr(request, name) for name in names}
    for option, value in {"prompt-file": prompt_file, **sampling}.items():
        if value is not None:
            raise UsageError(f"--{option} cannot be used with --from-video; leave one of the two out")
    from .footage import ROUNDED, open_clip

    clip = open_clip(path)
    length = clip.seconds if seconds is None else request.seconds
    if length > MAX_SECONDS:
        raise UsageError(f"{path} lasts {float(length):.0f} s; give --seconds, at most {MAX_SECONDS}")
    if length > clip.seconds + 3 * ROUNDED:  # its first and last time stamp, and its length
        lasts = f"{path} lasts {float(clip.seconds):g} s and not {float(length):g} s"
        raise InputError(f"{lasts}; give fewer --seconds, or leave it out to take the whole clip")
    if clip.is_hdr:
        console.warn(f"{path} is HDR and is taken as it is, so its colours come out pale; convert it to SDR first")
    return dataclasses.replace(request, clip=clip, seconds=length)
