"""The entry point: commands, and the one place where errors become sentences and exit codes."""

import io
import logging
import os
import signal
import sys
import traceback
from types import FrameType
from typing import Annotated, NoReturn

import typer

from . import __version__
from .cli_make import decode, proxy, refine, render
from .cli_tell import bench, doctor, info, plan, presets
from .cli_train import train
from .errors import ExitCode, explain, one_line, stop_signals, traced

INTERRUPTED = "interrupted: run the same command again; it goes on from what is saved, if anything is"

HELP = {"help_option_names": ["-h", "--help"]}
app = typer.Typer(
    context_settings=HELP,
    help="Text to video, at 4K and beyond, up to ten minutes: a global proxy, then jointly denoised detail.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # half the time of --help
)


def _tell_version(asked: bool) -> None:
    if asked:
        from .console import Console

        Console().emit({}, __version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None: ...


COMMANDS = {c.__name__: c for c in (render, proxy, refine, decode, plan, bench, train, presets, info, doctor)}
for command in COMMANDS.values():
    app.command(context_settings=HELP)(command)


def main() -> NoReturn:
    """Runs the command that sys.argv names."""
    debug = "--debug" in sys.argv
    stop_signals.clear()
    traced[:] = [True] if debug else []
    if sys.stderr is None:  # closed: print would take stdout for it
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115

    def interrupt(number: int, frame: FrameType | None) -> None:
        stop_signals.append(number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a background shell has it ignored
        signal.signal(signal.SIGINT, interrupt)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # paths come out as they went in, whatever their bytes
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads starve the encoder's
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    for library in ("torchao", "torch.utils._pytree"):  # warn of kernels and versions that are not in use
        logging.getLogger(library).setLevel(logging.ERROR)
    try:
        code = app(standalone_mode=False)
        if code == ExitCode.INTERRUPTED:  # typer turns Ctrl-C into its own exit code
            raise KeyboardInterrupt
        sys.exit(code if isinstance(code, int) else ExitCode.OK)
    except (KeyboardInterrupt, typer.Abort):
        _fail(INTERRUPTED, ExitCode.INTERRUPTED, debug)
    except Exception as error:
        if stop_signals:
            _fail(INTERRUPTED, ExitCode.INTERRUPTED, debug)
        # typer brings its own Click, whose usage errors are only known by what they carry
        if type(error).__name__ == "NoArgsIsHelpError":
            _say(error.format_message())  # type: ignore[attr-defined]
            sys.exit(ExitCode.USAGE)
        usage = getattr(error, "exit_code", None) == 2 and hasattr(error, "format_message")
        if usage:
            message = error.format_message()  # type: ignore[attr-defined]
            named = [name for name in sys.argv[1:2] if name in COMMANDS]  # the error does not always know it
            extra = "unexpected extra argument" in message and named in (["render"], ["proxy"])
            hint = "; put a prompt in quotes" if extra else ""
            _fail(f"{message}{hint} (see {' '.join(['atlasvid', *named])} --help)", ExitCode.USAGE, debug)
        _fail(*explain(error), debug)


def _fail(message: str, code: ExitCode, debug: bool) -> NoReturn:
    if debug:
        _say(traceback.format_exc().rstrip())
    _say(f"error: {one_line(message)}")
    sys.exit(code)


def _say(text: str) -> None:
    """Prints on stderr. Where that takes nothing more, a log on a full disk say, the exit code has to do."""
    try:
        print(text, file=sys.stderr)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())  # what the interpreter flushes at its end


if __name__ == "__main__":
    main()
