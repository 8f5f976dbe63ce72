"""What can go wrong, as one sentence and one exit code each."""

from enum import IntEnum


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


def one_line(text: str) -> str:
    """`text` on one line without control characters: file names and library messages may hold either."""
    return "".join(c if c.isprintable() else " " for c in " ".join(text.split()))
