"""What this machine has and does: where to compute, memory, disk, the rate of matrix products, the most memory held."""

import contextlib
import gc
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from . import __version__
from .errors import UsageError, one_line

if TYPE_CHECKING:
    import torch

CGROUP, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# files of a memory cgroup of version 2 and 1: limit, use, and what of its use are files that can be let go
CGROUP_FILES = (
    ("memory.max", "memory.current", ("inactive_file", "active_file")),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
)


@dataclass(frozen=True)
class Device:
    """Where the transformer computes, in which dtype, and why. `bytes_per_value` is that dtype's size, `memory` the
    bytes of its own memory, free or not (0 of a CPU)."""

    kind: Literal["cpu", "cuda"]
    name: str
    dtype: str
    bytes_per_value: int
    why: str
    memory: int = 0


@lru_cache(maxsize=1)
def has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 by instructions of its own, at several times the fp32 rate.

    Elsewhere bf16 is emulated: matrix products ran at 1 % of the fp32 rate on AVX2.
    """
    import torch

    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def cpu_autocast(wanted: bool = True) -> "torch.autocast":
    """For training on a CPU: products in bfloat16 where it has that, and where `wanted`."""
    import torch

    return torch.autocast("cpu", torch.bfloat16, enabled=wanted and has_bfloat16())


@lru_cache(maxsize=1)
def compute_device() -> Device:
    """A CUDA GPU where there is one, in bfloat16; else the CPU, in bfloat16 where it has that and else in float32.

    UsageError for a GPU that has no bfloat16 of its own: PyTorch's attention would hold all scores there.
    """
    import torch

    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            raise UsageError(f"{name} does not compute in bfloat16; set CUDA_VISIBLE_DEVICES= to compute on the CPU")
        why = f"{name} computes in bfloat16, the dtype Wan was trained in"
        return Device("cuda", name, "bfloat16", 2, why, torch.cuda.mem_get_info()[1])
    if has_bfloat16():
        return Device("cpu", "cpu", "bfloat16", 2, "no CUDA GPU; this CPU multiplies bfloat16 faster than float32")
    why = "no CUDA GPU; bfloat16 is slower than float32 on CPUs without AMX or AVX512-BF16"
    return Device("cpu", "cpu", "float32", 4, why)


@dataclass(frozen=True)
class Machine:
    """What a plan is made for: where it computes, the bytes of GPU memory that are free there, and whether it is this
    machine, whose rates can be timed and whose memory and disk are known."""

    device: Device
    vram: int
    is_here: bool = True


def this_machine() -> Machine:
    return Machine(compute_device(), available_vram())


def machine_with_gpu(gib: float) -> Machine:
    """One that has a GPU with so much memory, and nothing else on it."""
    memory = int(gib * 2**30)
    return Machine(Device("cuda", f"a GPU of {gib:g} GiB", "bfloat16", 2, "not this machine", memory), memory, False)


def check_compiler(device: "torch.device") -> None:
    """Raises UsageError where torch.compile makes no kernels, as a little one shows."""
    import torch

    try:
        torch.compile(lambda x: x + 1, dynamic=True)(torch.ones(8, device=device))
    except Exception as error:  # compilers fail in ways of their own
        why = one_line(str(error).partition("\n")[0])
        raise UsageError(
            f"blocks cannot be compiled here ({why}); install a C++ compiler, on a GPU also Triton, or leave --compile"
            " out"
        ) from None


def decode_dtype(wanted: str, device: Device | None = None) -> "torch.dtype":
    """`wanted`, the dtype that a preset's VAE bears, where the device (by default this one's) multiplies it, else
    float32."""
    import torch

    return getattr(torch, wanted if wanted == (device or compute_device()).dtype else "float32")


def conv_rate(dtype: "torch.dtype", seconds: float = 0.1) -> float:
    """FLOP/s of a 3x3 channels-last convolution of 64 channels, what most of decoding consists of."""
    import torch

    x, weight = (
        torch.ones(shape, dtype=dtype, device=compute_device().kind).to(memory_format=torch.channels_last)
        for shape in ((1, 64, 270, 480), (64, 64, 3, 3))
    )
    return _rate(lambda: torch.nn.functional.conv2d(x, weight, padding=1), 2 * x.numel() * 64 * 9, seconds)


def versions() -> dict[str, str]:
    """Of this tool, and of the libraries that values come from."""
    return {"atlasvid": __version__} | {name: version(name) for name in ("torch", "diffusers", "transformers", "av")}


def gemm_rate(size: int | None = None, seconds: float = 0.1, dtype: str | None = None) -> float:
    """FLOP/s of a `size`-cube matrix product in `dtype`, by default that of the compute device, repeated for about so
    many seconds."""
    import torch

    device = compute_device()
    size = size or (1024 if device.kind == "cpu" else 8192)
    # drawn, since a GPU clocks higher on numbers that are all alike
    a = torch.randn(size, size, device=device.kind, dtype=getattr(torch, dtype or device.dtype))
    return _rate(lambda: a @ a, 2 * size**3, seconds)


def _rate(work: Callable[[], Any], flops: int, seconds: float) -> float:
    """FLOP/s of `work`, repeated for about so many seconds: by the median, which what else runs now and then spares."""
    work()
    synchronize()
    times = [time.perf_counter()]
    while times[-1] - times[0] < seconds or len(times) < 4:
        work()
        synchronize()
        times.append(time.perf_counter())
    return flops / statistics.median(b - a for a, b in pairwise(times))


def synchronize() -> None:
    """Waits until the compute device has done what it was given: a GPU answers before it has worked."""
    if compute_device().kind == "cuda":
        import torch

        torch.cuda.synchronize()


def release_gpu() -> None:
    """Gives back what PyTorch keeps of memory that nothing uses: a GPU's, and the host's that was pinned for it."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()
    if torch.cuda.is_available():
        torch._C._host_emptyCache()


def copy_rate() -> float:
    """Bytes a second that copying 256 MiB reads and writes, the fastest of five times."""
    import torch

    a = torch.ones(1 << 26, device=compute_device().kind)
    b = torch.empty_like(a)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        b.copy_(a)
        synchronize()
        times.append(time.perf_counter() - start)
    return 2 * a.nbytes / min(times)


def reset_peak() -> None:
    """Starts a new measurement of `peak_bytes`, where the system can (Linux)."""
    if compute_device().kind == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """The most bytes of memory this process has held since `reset_peak`, or since it began: of a GPU's where that
    computes, as it runs out first."""
    if compute_device().kind == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def disk_of(folder: Path) -> tuple[int, int]:
    """The file system that `folder`, there already or not, lies on: its device number and its free bytes."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder.stat().st_dev, shutil.disk_usage(folder).free


def available_vram() -> int:
    """Bytes of the compute device's own memory that are free or held by this process; 0 where it is the CPU."""
    if compute_device().kind == "cpu":
        return 0
    import torch

    return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()


def available_ram() -> int:
    """Bytes that can be allocated without swapping, or without being killed for it in a container."""
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    for folder, (limit, used, files) in _memory_cgroups():
        with contextlib.suppress(OSError, ValueError, KeyError):  # not there, or without a limit ("max")
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            kept = sum(int(stat[name]) for name in files)
            free = min(free, int((folder / limit).read_text()) - int((folder / used).read_text()) + kept)
    return max(0, free)


def total_ram() -> int:
    """Bytes of host memory that this process may have in all: the machine's, or its container's."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for folder, (limit, *_) in _memory_cgroups():
        with contextlib.suppress(OSError, ValueError):  # not there, or without a limit ("max")
            total = min(total, int((folder / limit).read_text()))
    return total


def _memory_cgroups() -> Iterator[tuple[Path, tuple[str, str, tuple[str, str]]]]:
    """The folders of the cgroups that may bound this process's memory, its own and all above, with what their files are
    called: a container has them, a batch system, systemd."""
    try:
        lines = OWN_CGROUPS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, files = CGROUP, CGROUP_FILES[0]
        elif "memory" in controllers.split(","):
            root, files = CGROUP / "memory", CGROUP_FILES[1]
        else:
            continue
        folder = root / path.strip("/")
        for each in (folder, *folder.parents):
            yield each, files
            if each == root:
                break
