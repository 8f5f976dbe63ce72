"""Prompt files and option values: what is understood, and what is refused by line and name."""

import io
import json
import sys
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atlasvid_cli import parse
from atlasvid_cli.errors import InputError, UsageError
from atlasvid_cli.parse import MAX_SEED
from atlasvid_cli.prompts import items_of, read_prompts, select, shard_of, single, slug

QUICK = settings(max_examples=60, deadline=None)


def read(tmp_path: Path, text: str | bytes, seed: int = 5) -> list:
    path = tmp_path / "prompts"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_prompts(str(path), "blur", seed)


def test_text_lines_keep_hashes_and_get_their_own_seeds(tmp_path: Path) -> None:
    items = read(tmp_path, "\ufeffa red ball\r\n\n  # two  \n")
    assert [(i.id, i.prompt, i.seed) for i in items] == [("0000-a-red-ball", "a red ball", 5), ("0001-two", "# two", 6)]
    assert {i.negative_prompt for i in items} == {"blur"}


def test_json_lines_override_what_the_flags_give(tmp_path: Path) -> None:
    lines = [
        {"prompt": "one\u2028two", "id": "x.1", "seed": 9, "negative_prompt": "", "output": "a/b.mp4"},
        {"prompt": "three", "seed": None, "id": 7},
    ]
    first, second = read(tmp_path, "\n".join(json.dumps(line, ensure_ascii=False) for line in lines))
    assert (first.id, first.seed, first.negative_prompt, first.output) == ("x.1", 9, "", "a/b.mp4")
    assert (second.id, second.seed, second.negative_prompt, second.output) == ("7", 6, "blur", None)


def test_stdin_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\nb\n")))
    assert [i.prompt for i in read_prompts("-", None, 0)] == ["a", "b"]


def test_a_closed_stdin_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(InputError, match="stdin is closed"):
        read_prompts("-", None, 0)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "latin1"])
def test_the_remedy_for_another_encoding_is_a_command_that_helps(tmp_path: Path, encoding: str) -> None:
    mark = "" if encoding == "latin1" else "\ufeff"
    with pytest.raises(InputError, match=rf"iconv -f {encoding.removesuffix('-le').removesuffix('-be')} -t utf-8"):
        read(tmp_path, f"{mark}a café\n".encode(encoding))


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_end_as_on_any_system(tmp_path: Path, end: str) -> None:
    assert [item.prompt for item in read(tmp_path, end.join(["one", "", "# two", ""]))] == ["one", "# two"]
    with pytest.raises(InputError, match="line 3"):
        read(tmp_path, end.join(["one", "", "t\0o"]))


@pytest.mark.parametrize(
    "line, words",
    [
        ('{"prompt": ""}', "line 2: the prompt is empty"),
        ("{}", "line 2: the prompt is empty"),
        ("plain", "line 2 is not JSON"),
        ("[1]", "line 2 is not a JSON object"),
        ("[" * 100_000, "line 2 is not JSON"),
        ('{"prompt": 3}', "line 2: prompt must be a string"),
        ('{"prompt": "a \\ud800 ball"}', "line 2: prompt holds characters"),
        ('{"prompt": "x", "negative_prompt": "a \\u0000 ball"}', "line 2: negative_prompt holds characters"),
        ('{"prompt": "x", "output": "a\\u0000.mp4"}', "line 2: output holds characters"),
        ('{"prompt": "x", "sed": 1}', "line 2: unknown key 'sed'"),
        ('{"prompt": "x", "seed": -1}', "line 2: seed"),
        ('{"prompt": "x", "seed": true}', "line 2: seed"),
        ('{"prompt": "x", "seed": 1e99}', "line 2: seed"),
        ('{"prompt": "x", "id": "../x"}', "line 2: id"),
        ('{"prompt": "x", "id": ".x"}', "line 2: id"),
        ('{"prompt": "x", "id": true}', "line 2: id"),
        ('{"prompt": "x", "id": "a"}', "line 2: id 'a' is taken by line 1"),
        ('{"prompt": "x", "output": "o.mp4"}', r"line 2: output 'o\.mp4' is taken by line 1"),
        ('{"prompt": "x", "output": ""}', "line 2: output"),
        ('{"prompt": "x", "output": "/tmp/a.mp4"}', "line 2: output must name a file in the folder"),
        ('{"prompt": "x", "output": "a/../../b.mp4"}', "line 2: output must name a file in the folder"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        read(tmp_path, '{"prompt": "p", "id": "a", "output": "o.mp4"}\n' + line)


def test_files_without_prompts(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no prompts"):
        read(tmp_path, " \n\n")
    with pytest.raises(InputError, match="not UTF-8"):
        read(tmp_path, b"caf\xe9")
    for name in ("absent", "."):
        with pytest.raises(InputError, match="cannot be read"):
            read_prompts(str(tmp_path / name), None, 0)
    with pytest.raises(UsageError, match="empty"):
        single(" \t", None, 0)


def test_seeds_stay_in_range(tmp_path: Path) -> None:
    assert [i.seed for i in read(tmp_path, "a\nb", seed=MAX_SEED)] == [MAX_SEED, MAX_SEED]


@QUICK
@given(st.text(max_size=200))
def test_slugs_are_file_names(text: str) -> None:
    name = slug(text)
    assert name and "/" not in name and not name.startswith((".", "-")) and name == name.strip()
    assert len(name.encode()) <= 160


def test_prompts_that_begin_alike_have_names_of_their_own() -> None:
    names = [slug(f"an orange triangle moving right over a purple {ground}") for ground in ("stripes", "hills")]
    assert len(set(names)) == 2 and all(name.startswith("an-orange-triangle-") and len(name) <= 40 for name in names)
    assert slug("A red, red ball!") == "a-red-red-ball" and slug("x" * 40) == "x" * 40


@QUICK
@given(count=st.integers(0, 40), n=st.integers(1, 9))
def test_shards_partition_the_items(count: int, n: int) -> None:
    items = [single(f"p{i}", None, i) for i in range(count)]
    parts = [select(items, parse.parse_shard(f"{i}/{n}")) for i in range(1, n + 1)]
    assert sorted(item.seed for part in parts for item in part) == list(range(count))
    assert select(items, None) == items


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "1/0", "-1/2", ""])
def test_bad_shards(text: str) -> None:
    with pytest.raises(UsageError, match="--shard 1/4"):
        parse.parse_shard(text)


@pytest.mark.parametrize(
    "text, size",
    [("3840x2160", (3840, 2160)), ("3840*2160", (3840, 2160)), (" 333 X 777 ", (333, 777)), ("4K", (3840, 2160)),
     ("1080p", (1920, 1080)), ("16x16384", (16, 16384))],
)  # fmt: skip
def test_sizes(text: str, size: tuple[int, int]) -> None:
    assert parse.parse_resolution(text) == size


@pytest.mark.parametrize(
    "text", ["0x0", "banana", "4001x3", "15x64", "64x16385", "", "-64x64", "64", "1e3x64", "٦٤x64"]
)
def test_bad_sizes(text: str) -> None:
    with pytest.raises(UsageError, match=r"try --res|--res 3840x2160"):
        parse.parse_resolution(text)


def test_seconds() -> None:
    assert [parse.parse_seconds(t) for t in ("12", "2.5", "25/2", ".5")] == [12, Fraction(5, 2), Fraction(25, 2), 0.5]


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "601", "1/0", "1e999999999", "", "12s"])
def test_bad_seconds(text: str) -> None:
    with pytest.raises(UsageError, match="--seconds 12"):
        parse.parse_seconds(text)


def test_regions_and_frames() -> None:
    assert parse.parse_region("0, 8,64,56", 64, 64) == (0, 8, 64, 56)
    for text in ("0,0,65,1", "0,0,0,1", "1,2,3", "-1,0,4,4", "64,0,1,1"):
        with pytest.raises(UsageError, match="--region"):
            parse.parse_region(text, 64, 64)
    assert parse.parse_frames("0:48") == (0, 48)
    for text in ("4:4", "5:4", ":4", "4:", "-1:4"):
        with pytest.raises(UsageError, match="--frames 0:48"):
            parse.parse_frames(text)


def test_numbers_are_finite() -> None:
    assert parse.check_finite("--x", None, 0) is None and parse.check_finite("--x", 1.5, 0) == 1.5
    assert parse.check_finite("--x", 0) == 0
    with pytest.raises(UsageError, match=r"--x 0 .* above 0"):
        parse.check_finite("--x", 0, zero=False)
    for value in (float("nan"), float("inf"), -0.1):
        with pytest.raises(UsageError, match="--x"):
            parse.check_finite("--x", value, 0)


def test_a_file_is_of_text_or_of_objects_not_of_both(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="line 2 is a JSON object and line 1 is not"):
        read(tmp_path, '# mine\n{"prompt": "a red ball"}\n')
    assert len(read(tmp_path, "a red ball\n{blue} star")) == 2


def test_what_would_be_taken_for_prompts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="JSON array"):
        read(tmp_path, '[{"prompt": "a red ball"},\n {"prompt": "a blue star"}]')
    assert read(tmp_path, "[closing scene] a red ball")[0].prompt == "[closing scene] a red ball"
    with pytest.raises(InputError, match="line 2"):
        read(tmp_path, "a red ball\na blue\0star")


def test_a_clips_prompt_is_checked_too() -> None:
    with pytest.raises(UsageError, match="UTF-8"):
        items_of("a \udcff ball", None, None, 0, Path("a.mp4"))


def test_a_shard_is_of_a_prompt_file() -> None:
    assert shard_of("2/8", "-") == (2, 8) and shard_of(None, None) is None
    with pytest.raises(UsageError, match="--shard divides"):
        shard_of("1/2", None)
