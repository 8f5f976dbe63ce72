"""What this machine has: free memory and disk, and how fast it multiplies matrices."""

import os
import shutil
import time
from pathlib import Path


def gemm_rate() -> float:
    """FLOP/s of a 1024-cube fp32 matrix product, timed for about a tenth of a second."""
    import torch

    a = torch.ones(1024, 1024)
    a @ a
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < 0.1:
        a @ a
        count += 1
    return count * 2 * 1024**3 / (time.perf_counter() - start)


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
