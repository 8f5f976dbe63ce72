"""What can go wrong, as one sentence and one exit code each."""

import errno
from enum import IntEnum

stop_signals: list[int] = []
"""Signals by which the process was asked to stop. Libraries turn the KeyboardInterrupt into errors of their own."""

traced: list[bool] = []
"""Whether every error shows its traceback (--debug)."""


class ExitCode(IntEnum):
    """Exit status of `atlasvid`."""

    OK = 0
    RENDER = 1
    USAGE = 2
    INPUT = 3
    RESOURCE = 4
    INTERRUPTED = 130


class AtlasError(Exception):
    """A failure to show without traceback: `message` is one sentence (what, why, remedy)."""

    exit_code: ExitCode = ExitCode.RENDER


class RenderError(AtlasError):
    """Sampling, decoding or encoding failed."""


class UsageError(AtlasError):
    """An option, argument or prompt cannot be used."""

    exit_code = ExitCode.USAGE


class InputError(AtlasError):
    """An input file is missing, damaged, or made for something else."""

    exit_code = ExitCode.INPUT


class ResourceError(AtlasError):
    """Memory or disk does not suffice, or a place cannot be written."""

    exit_code = ExitCode.RESOURCE


def explain(error: BaseException) -> tuple[str, ExitCode]:
    """The sentence and the exit code for any failure; torch says in its own ways that memory ran out."""
    if isinstance(error, AtlasError):
        return str(error), error.exit_code
    out_of_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if out_of_memory or "can't allocate memory" in str(error):
        return (
            "memory ran out: choose a smaller --res, fewer --seconds or a smaller --chunk, on a GPU --offload host or"
            " --weight-dtype fp8, in training a smaller --rank or [training] batch",
            ExitCode.RESOURCE,
        )
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG) and error.filename:
        return f"{error.filename} cannot be read ({error.strerror}); check the path and who may read it", ExitCode.INPUT
    return f"{type(error).__name__}: {error} (--debug shows where)", ExitCode.RENDER


def one_line(text: str) -> str:
    """`text` on one line without control characters: file names and library messages may hold either."""
    return "".join(c if c.isprintable() else " " for c in " ".join(text.split()))
