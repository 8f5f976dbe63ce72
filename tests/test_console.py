"""stdout is data and nothing else; stderr is for people; errors are one line with their exit code."""

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from atlasvid_cli import console as console_module
from atlasvid_cli import errors
from atlasvid_cli.console import Console, duration, remaining


def test_each_error_has_its_exit_code() -> None:
    codes = {
        errors.RenderError: 1,
        errors.UsageError: 2,
        errors.InputError: 3,
        errors.ResourceError: 4,
    }
    assert {kind: int(kind("x").exit_code) for kind in codes} == codes
    assert errors.ExitCode.INTERRUPTED == 130 and errors.ExitCode.OK == 0


def test_messages_are_one_printable_line() -> None:
    assert errors.one_line("a\nb\x1b[31m  c") == "a b [31m c"


def test_data_goes_to_stdout_and_words_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    Console().emit({"video": "a"}, "a.mp4")
    Console(json_lines=True).emit({"video": None, "prompt": "é\n[bold]"}, "unused")
    console = Console()
    console.warn("[bold]odd\nname[/bold] " + "long " * 60)
    console.error("bad")
    console.table("Plan", [{"stage": "proxy", "tokens": 5}, {"stage": "[red]", "tokens": 7}])
    out, err = capsys.readouterr()
    first, second = out.splitlines()
    assert first == "a.mp4" and json.loads(second) == {"video": None, "prompt": "é\n[bold]"}
    assert err.startswith("warning: [bold]odd name[/bold] long") and "error: bad\n" in err and "[red]" in err
    assert err.splitlines()[1] == "error: bad"  # one line a message, however long


def test_plain_progress_is_a_few_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console_module, "PLAIN_INTERVAL_S", 0.0)
    with Console(interactive=False).stage("proxy", 4) as advance:
        advance()
        advance(2)
        advance()
    out, err = capsys.readouterr()
    assert out == "" and [line.split(",")[0] for line in err.splitlines()] == [
        "proxy: 1/4", "proxy: 3/4", "proxy: 4/4 in 0 s",
    ]  # fmt: skip


def test_bars_of_overlapping_stages_and_threads(capsys: pytest.CaptureFixture[str]) -> None:
    def twenty(advance: Callable[..., None]) -> None:
        for _ in range(20):
            advance()

    console = Console(interactive=True)
    with console.stage("decode", 40) as decoded, console.stage("encode", 40) as encoded:
        threads = [threading.Thread(target=twenty, args=(advance,)) for advance in (decoded, encoded) * 2]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    with pytest.raises(ZeroDivisionError), console.stage("proxy", 2) as advance:
        advance()
        raise ZeroDivisionError
    out, err = capsys.readouterr()
    assert out == "" and err.count("40/40") >= 2 and "1/2" in err


def test_durations() -> None:
    assert [duration(s) for s in (0.4, 59, 61, 3700)] == ["0 s", "59 s", "1 min 01 s", "1 h 01 min"]
    assert remaining(10, 1, 9) == 90


@pytest.mark.parametrize("interactive", [False, True])
def test_what_an_earlier_run_did_does_not_shorten_the_rest(
    interactive: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """15 of 20 steps were there, and one took a minute: four minutes are left."""
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    console = Console(interactive=interactive)
    with console.stage("proxy", 20) as advance:
        advance(15, before=True)
        now += 60
        advance()
        said = console_module._TimeLeft().render(console._bars.tasks[0]).plain if console._bars else ""
        now += 240
        advance(4)
    assert "4 min 00 s left" in said + capsys.readouterr().err


def test_a_reader_that_leaves_is_no_traceback() -> None:
    code = (
        "from atlasvid_cli.console import Console\n"
        "console = Console(json_lines=True)\n"
        "for i in range(100000): console.emit({'i': i}, '')"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=30) == 1 and process.stderr.read() == b""
    process.stderr.close()


@pytest.mark.parametrize("interactive", [True, False])
def test_a_log_whose_reader_leaves_does_not_end_the_work(interactive: bool) -> None:
    code = (
        "import sys\n"
        "from atlasvid_cli.console import Console\n"
        f"console = Console(interactive={interactive})\n"
        "console.note('begun')\n"
        "sys.stdin.readline()\n"
        "with console.stage('proxy', 2) as advance:\n"
        "    for _ in range(2): console.note('step'), advance()\n"
        "console.warn('odd'), console.table('t', [{'a': 1}])\n"
        "console.emit({}, 'made')"
    )
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    assert process.stdin and process.stdout and process.stderr
    process.stderr.readline()
    process.stderr.close()
    process.stdin.write("\n")
    process.stdin.close()
    assert process.stdout.read() == "made\n" and process.wait(timeout=30) == 0
    process.stdout.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_behind_stdout_is_told_with_its_remedy() -> None:
    command = [sys.executable, "-m", "atlasvid_cli", "presets", "--json"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 4 and "standard output" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("columns", [10, 40, 72])
def test_a_narrow_terminal_breaks_no_number(
    columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    row = {
        "stage": "detail 2/2",
        "grid": "2401x270x480",
        "tokens": "1,587,600",
        "FLOP": "4,264 P",
        "VRAM\nGiB": "25.19",
    }
    Console().table("", [row, row | {"tokens": "5"}], asked_for=True)
    Console().table("", [row | {"value": "native +2.1 % at 12,345,678 tokens of many"}])
    out, err = capsys.readouterr()
    assert all(value in out.splitlines()[-2] for value in row.values())
    assert all(value in err.splitlines()[3] for value in row.values())
    assert "12,345,678" in err and "12,345,678 tokens of many" not in err  # prose breaks, between words


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_table_for_a_full_disk_is_told_too() -> None:
    code = "from atlasvid_cli.console import Console; Console().table('t', [{'a': 1}], asked_for=True)"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True)
    assert "ResourceError: standard output cannot take more" in done.stderr
