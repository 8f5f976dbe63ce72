"""stdout carries data; progress, tables and warnings go to stderr."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from threading import Lock
from typing import TextIO

from rich import box
from rich.cells import cell_len
from rich.console import Console as RichConsole
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from .errors import ExitCode, ResourceError, one_line
from .store import FULL

PLAIN_INTERVAL_S = 10.0
VALUE_CELLS = 20  # a number with its unit is no longer, and stays on one line
MAX_CELLS = 4096  # no table is wider


def duration(seconds: float) -> str:
    """Seconds as "42 s", "3 min 05 s", "2 h 05 min" or "12 days"."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02} min"
    return f"{whole // 86400:,} days"


def remaining(elapsed_s: float, done: float, left: float) -> float:
    """Seconds if what is left goes as what was done; rich's own column forgets what is older than 30 s."""
    return elapsed_s / done * left


class _TimeLeft(ProgressColumn):
    """Ticks down between two steps, which may be minutes apart."""

    def render(self, task: Task) -> Text:
        done, at_last_step = task.completed - task.fields["before"], task.fields["at_last_step"]
        if task.finished or not done or task.total is None:
            return Text("" if task.finished else "-- left")
        since = (task.elapsed or 0.0) - at_last_step
        return Text(f"{duration(remaining(at_last_step, done, task.total - task.completed) - since)} left")


class _Stderr(RichConsole):
    """stderr, which falls silent where nobody takes what it says: hours of work do not end for that."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        _discard(sys.stderr)

    def _check_buffer(self) -> None:
        try:
            super()._check_buffer()
        except OSError:  # a terminal that is gone, a full disk behind a log
            self.on_broken_pipe()


def _discard(stream: TextIO) -> None:
    """Lets all further output of a stream go nowhere, so that the interpreter's own flush at exit finds a file."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextmanager
def _stdout() -> Iterator[None]:
    """Around what writes on stdout and flushes it; ResourceError where a full disk takes no more."""
    try:
        yield
    except BrokenPipeError:
        # The reader (`head`, say) has left: nobody wants the rest. SystemExit, so that a batch's
        # `except Exception` does not go on.
        _discard(sys.stdout)
        raise SystemExit(ExitCode.RENDER) from None
    except OSError as error:
        if error.errno not in FULL:
            raise
        _discard(sys.stdout)
        remedy = "free some space; the same command goes on from what is finished"
        raise ResourceError(f"standard output cannot take more ({error.strerror}): {remedy}") from None


class Console:
    """Where a command talks to its user.

    `interactive` forces bars on or off; by default they show where stderr is a terminal. A `quiet` one says nothing.
    """

    def __init__(self, json_lines: bool = False, interactive: bool | None = None, quiet: bool = False) -> None:
        self.json_lines, self._quiet = json_lines, quiet
        self._rich = _Stderr(stderr=True, markup=False, highlight=False, emoji=False, quiet=quiet)
        self._interactive = self._rich.is_terminal if interactive is None else interactive
        self._lock = Lock()
        self._bars: Progress | None = None
        self._open = 0

    def emit(self, event: dict, text: str) -> None:
        """Prints one datum on stdout, flushed: `event` as a JSON line with --json, else `text`."""
        if self._quiet:
            return
        line = json.dumps(event, default=str) if self.json_lines else text
        with _stdout():
            print(line, flush=True)

    def note(self, text: str) -> None:
        """Prints a line on stderr, above any bars."""
        self._say(one_line(text))

    def warn(self, text: str) -> None:
        """Prints a warning on stderr, above any bars."""
        self._say(f"warning: {one_line(text)}")

    def error(self, text: str) -> None:
        """Prints an error on stderr, above any bars."""
        self._say(f"error: {one_line(text)}")

    def table(self, title: str, rows: Sequence[dict], asked_for: bool = False) -> None:
        """Prints `rows` on stderr, or what was `asked_for` on stdout, one column a key of the first.

        Long text breaks between words. Values and words stay whole, so that a narrow terminal gets longer lines.
        """
        if not rows or self._quiet:
            return
        table = Table(box=box.SIMPLE, show_edge=False, padding=0)
        for i, key in enumerate(rows[0]):
            values = [str(row.get(key, "")) for row in rows]
            digits = [value.replace(",", "").replace(".", "") for value in values]
            numeric = any(digits) and all(value.isdigit() for value in filter(None, digits))
            widest = max(cell_len(line) for value in (key, *values) for line in value.split("\n"))
            keeps = i == 0 or widest <= VALUE_CELLS
            least = widest if keeps else max(map(cell_len, " ".join((key, *values)).split()))
            table.add_column(key, justify="right" if numeric else "left", no_wrap=keeps, min_width=least)
        for row in rows:
            table.add_row(*(Text(str(row.get(key, ""))) for key in rows[0]))
        to = RichConsole(markup=False, highlight=False, emoji=False) if asked_for else self._rich
        if (least := Measurement.get(to, to.options.update_width(MAX_CELLS), table).minimum) > to.width:
            table.width = least
        with _stdout() if asked_for else nullcontext():
            if title:
                to.print(Text(title, "bold"), soft_wrap=True)  # a table's own is no wider than the table
            to.print(table, crop=False)

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Callable[..., None]]:
        """Shows `total` steps of a stage; yields `advance(n=1, before=False)`, which any thread may call: `before` are
        those that an interrupted run did. Stages may overlap."""
        with self._bar(name, total) if self._interactive else self._lines(name, total) as advance:
            yield advance

    def _say(self, text: str) -> None:
        # `soft_wrap`: a terminal breaks lines by itself, and a log keeps one line a message.
        self._rich.print(Text(text), soft_wrap=True)

    @contextmanager
    def _bar(self, name: str, total: int) -> Iterator[Callable[..., None]]:
        with self._lock:
            # One live display for all stages: rich allows no second one on a terminal.
            if self._bars is None:
                columns = (TextColumn("{task.description:<8}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
                self._bars = Progress(*columns, _TimeLeft(), console=self._rich, get_time=time.monotonic)
                self._bars.start()
            bars = self._bars
            self._open += 1
        task = bars.add_task(name, total=total, before=0, at_last_step=0.0)
        start = time.monotonic()

        def advance(n: int = 1, before: bool = False) -> None:
            fields = {"before": n} if before else {"at_last_step": time.monotonic() - start}
            bars.update(task, advance=n, **fields)

        try:
            yield advance
        finally:
            with self._lock:
                self._open -= 1
                bars.stop_task(task)
                if not self._open:
                    bars.stop()
                    self._bars = None

    @contextmanager
    def _lines(self, name: str, total: int) -> Iterator[Callable[..., None]]:
        start = last = time.monotonic()
        done = earlier = 0
        lock = Lock()

        def advance(n: int = 1, before: bool = False) -> None:
            nonlocal done, earlier, last
            with lock:
                done += n
                earlier += n if before else 0
                now = time.monotonic()
                if before or now - last < PLAIN_INTERVAL_S or done >= total:
                    return
                last = now
                left = remaining(now - start, done - earlier, total - done)
                self._say(f"{name}: {done}/{total}, {duration(left)} left")

        yield advance
        self._say(f"{name}: {done}/{total} in {duration(time.monotonic() - start)}")
