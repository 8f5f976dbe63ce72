"""Where results go, and whether they can."""

from pathlib import Path

from .errors import ResourceError


def target_of(output: Path | None, default: Path, suffix: str) -> Path:
    """The absolute path to write: `output`, with `suffix` where its name has none, or `default`, which needs it.

    In an `output` that is a folder the file has its default name.
    """
    named = default.with_name(default.name + suffix)
    if output is None:
        return named.absolute()
    if output.is_dir():
        return (output / named.name).absolute()
    return (output if output.suffix else output.with_name(output.name + suffix)).absolute()


def check_writable(target: Path, option: str = "--output") -> None:
    """Raises ResourceError for a file that cannot be written, before hours of work; `option` says where it goes."""
    from .store import temporary

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        probe = temporary(target, ".probe")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ResourceError(f"{target.parent} cannot be written ({error.strerror}); choose another {option}") from None
