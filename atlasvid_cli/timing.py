"""How long something takes: medians with their spread, when the stages of a run began and ended, and how fast the
machine was meanwhile."""

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from .console import Console
from .machine import synchronize


@dataclass(frozen=True)
class Timing:
    """Seconds: the median of `runs` and their spread.

    `fraction` < 1: the part of the work that was timed. `scaled`: other work was timed, perhaps more.
    """

    seconds: float
    low: float
    high: float
    runs: int
    fraction: float = 1.0
    scaled: bool = False

    @property
    def projected(self) -> bool:
        return self.scaled or self.fraction < 1

    def times(self, factor: float, fraction: float | None = None) -> "Timing":
        """Scaled to `factor` as much work; by default so much less of it was timed, and of less work no larger part."""
        seconds, low, high = (value * factor for value in (self.seconds, self.low, self.high))
        part = self.fraction / max(1.0, factor) if fraction is None else min(1.0, fraction)
        return Timing(seconds, low, high, self.runs, part, self.scaled or factor != 1)


def from_samples(samples: list[float]) -> Timing:
    return Timing(statistics.median(samples), min(samples), max(samples), len(samples))


def together(parts: Iterable[Timing]) -> Timing:
    """One after the other: from all at their fastest to all at their slowest. `fraction` is the least of theirs."""
    parts = list(parts)
    seconds, low, high = (sum(getattr(part, at) for part in parts) for at in ("seconds", "low", "high"))
    runs, fraction = min(part.runs for part in parts), min(part.fraction for part in parts)
    return Timing(seconds, low, high, runs, fraction, any(part.scaled for part in parts))


def extended(first: Timing, longer: Timing, times: float) -> Timing:
    """`first`, and so many `times` what `longer` takes beyond it, with the widest spread that their runs allow."""

    def beyond(start: float, end: float) -> float:
        return times * max(0.0, end - start)

    low, high = first.low + beyond(first.high, longer.low), first.high + beyond(first.low, longer.high)
    return Timing(first.seconds + beyond(first.seconds, longer.seconds), low, high, first.runs)


def timed(run: Callable[[], Any], repeats: int, warm_up: bool = True) -> Timing:
    """`run`, once to warm up and then `repeats` times."""
    samples = []
    with torch.no_grad():
        for _ in range(repeats + warm_up):
            synchronize()
            start = time.perf_counter()
            run()
            synchronize()
            samples.append(time.perf_counter() - start)
    return from_samples(samples[warm_up:])


@dataclass(frozen=True)
class Rates:
    """Of this machine: FLOP/s of a big GEMM by when it was timed, before all arms and right after each; bytes/s of a
    big copy; FLOP/s of a big GEMM in float32."""

    gemms: dict[str, float]
    copy: float
    float32: float

    @property
    def gemm(self) -> float:
        """The fastest, which had the machine to itself if any had."""
        return max(self.gemms.values())

    @property
    def drift(self) -> float:
        """How much faster the machine was at its fastest than at its slowest."""
        return self.gemm / min(self.gemms.values())


class Stopwatch(Console):
    """Stands where a function of `pipeline` takes a console, and notes when a stage began, advanced last and ended."""

    def __init__(self) -> None:
        super().__init__(interactive=False)
        self.marks: dict[str, tuple[float, float, float]] = {}

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Callable[..., None]]:
        start = last = time.perf_counter()

        def advance(n: int = 1, before: bool = False) -> None:
            nonlocal last
            last = time.perf_counter()

        yield advance
        self.marks[name] = (start, last, time.perf_counter())
