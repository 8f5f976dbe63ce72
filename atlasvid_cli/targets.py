"""Where results go, and whether they can."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import ResourceError, UsageError


@contextmanager
def usable(path: Path, option: str = "--output") -> Iterator[None]:
    """ResourceError where a place cannot even be looked at: no permission, or too long a name."""
    try:
        yield
    except OSError as error:
        raise ResourceError(f"{path} cannot be written ({error.strerror}); choose another {option}") from None


def is_folder(output: str | Path) -> bool:
    """Whether results go into `output` under names of their own: it is a folder, or ends as one that will be made.
    UsageError for standard output."""
    if str(output) == "-":
        raise UsageError("a result is moved into its place when it is whole, so that --output cannot be -; name a file")
    with usable(Path(output)):
        return str(output).endswith(os.sep) or Path(output).is_dir()


def target_of(output: str | Path | None, default: Path, suffix: str) -> Path:
    """The absolute path to write: `output`, with `suffix` where its name has none, or `default`, which needs it.

    In an `output` that is a folder the file has its default name. Behind a link to a file lies what is written.
    UsageError for what is there and no file.
    """
    named = default.with_name(default.name + suffix)
    if output is None:
        path = named
    elif is_folder(output):
        path = Path(output, named.name)
    else:
        path = Path(output)
        _check_regular(path, "--output")  # a device, say, whose name would get a suffix
        path = path if path.suffix else path.with_name(path.name + suffix)
    return Path(os.path.realpath(path)) if os.path.islink(path) else path.absolute()


def _check_regular(path: Path, option: str) -> None:
    with usable(path, option):
        if path.exists() and not path.is_file():
            raise UsageError(f"{path} is no regular file; choose another {option}")


def sheet_of(video: Path) -> Path:
    """The contact sheet beside a video."""
    return video.with_name(f"{video.name}.sheet.png")


def is_made(target: Path) -> bool:
    """Whether a result is there. ResourceError for a name that it or its contact sheet could not have."""
    with usable(target):
        sheet_of(target).exists()
        return target.exists()


def may_write(folder: Path) -> bool:
    """Whether by its permissions things can be made in `folder`, or where that is to be: nothing is tried."""
    with usable(folder):
        place = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
        return place.is_dir() and os.access(place, os.W_OK | os.X_OK)


def check_apart(target: Path, run_dir: Path | None) -> None:
    """UsageError where a result would take the name of its run's preview, which is made before it."""
    if run_dir and os.path.realpath(target) == os.path.realpath(run_dir / "proxy.mp4"):
        raise UsageError(f"{target} will be the preview of the run; choose another --output or --run-dir")


def check_writable(target: Path, option: str = "--output") -> None:
    """Raises ResourceError for a file that cannot be written and UsageError for what is none, a pipe say, before hours
    of work; `option` says where it goes."""
    from .store import temporary

    _check_regular(target, option)
    with usable(target.parent, option):
        target.parent.mkdir(parents=True, exist_ok=True)
        probe = temporary(target, ".probe")
        probe.touch()
        probe.unlink()
