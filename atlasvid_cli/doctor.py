"""`atlasvid doctor`: what this machine can do, and a verdict on each preset."""

import importlib.util
import os
import platform
import shutil
from fractions import Fraction
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from . import __version__
from .errors import AtlasError, UsageError

if TYPE_CHECKING:
    from .machine import Device

# values of --attention-backend whose kernels are packages of their own
BACKENDS = {
    "flash": "flash_attn",
    "_flash_3": "flash_attn_interface",
    "sage": "sageattention",
    "xformers": "xformers",
    "flash_hub": "kernels",
    "_flash_3_hub": "kernels",
    "sage_hub": "kernels",
}
DAY = 86400
VERDICT_SIZE = (3840, 2160, Fraction(12))


def examine(folder: Path) -> dict:
    """Facts about this machine for output in `folder`: device, versions, backends, codecs, memory, presets."""
    import av

    from .machine import available_ram, available_vram, compute_device
    from .video import CODECS

    device = compute_device()
    disk = shutil.disk_usage(folder)
    return {
        "atlasvid": __version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "diffusers", "transformers", "av")},
        "device": device.name,
        "dtype": device.dtype,
        "dtype_reason": device.why,
        "vram_available_bytes": available_vram(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "ram_available_bytes": available_ram(),
        "disk_free_bytes": disk.free,
        "attention_backends": ["native", *(name for name in BACKENDS if _attends(name, device))],
        "codecs": [name for name, codec in CODECS.items() if codec.encoder in av.codecs_available],
        "presets": _verdicts(folder),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _attends(backend: str, device: "Device") -> bool:
    """Whether an attention backend is installed and runs here. Kernels of the hub are not tried: that fetches them."""
    if importlib.util.find_spec(BACKENDS[backend]) is None:
        return False
    if backend.endswith("_hub"):
        return True
    import torch

    from .attention import check_backend

    try:
        check_backend(backend, torch.device(device.kind), getattr(torch, device.dtype))
    except UsageError:
        return False
    return True


def _verdicts(folder: Path) -> dict[str, str]:
    """For each preset, whether 3840x2160 x 12 s can be made here and in what time, or why not in a sentence."""
    from .console import duration
    from .cost import check_resources, rows
    from .machine import compute_device
    from .plan import Request, make_plan
    from .presets import preset_names

    width, height, seconds = VERDICT_SIZE
    verdicts = {}
    for name in preset_names():
        plan = make_plan(Request(name, width, height, seconds))
        try:
            check_resources(plan, folder, costs=(costs := rows(plan)))
            takes = sum(row.seconds for row in costs)
            verdicts[name] = f"{width}x{height} x {seconds} s fits and takes about {duration(takes)}"
            verdicts[name] += ", which is work for a GPU" if takes > DAY and compute_device().kind == "cpu" else ""
        except AtlasError as error:
            verdicts[name] = f"no: {error}"
    return verdicts
