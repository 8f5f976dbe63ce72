"""What this machine has and does: memory, disk, the rate of matrix products, the most memory held."""

import contextlib
import os
import shutil
import sys
import time
from pathlib import Path


def gemm_rate(size: int = 1024, seconds: float = 0.1) -> float:
    """FLOP/s of a `size`-cube fp32 matrix product, repeated for about so many seconds."""
    import torch

    a = torch.ones(size, size)
    a @ a
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        a @ a
        count += 1
    return count * 2 * size**3 / (time.perf_counter() - start)


def copy_rate() -> float:
    """Bytes a second that copying 256 MiB reads and writes, the fastest of five times."""
    import torch

    a = torch.ones(1 << 26)
    b = torch.empty_like(a)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        b.copy_(a)
        times.append(time.perf_counter() - start)
    return 2 * a.nbytes / min(times)


def reset_peak() -> None:
    """Starts a new measurement of `peak_rss`, where the system can (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_rss() -> int:
    """The most bytes of memory this process has held since `reset_peak`, or since it began."""
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


def available_ram() -> int:
    """Bytes that can be allocated without swapping."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
