"""Prompt files: one prompt a line, or one JSON object a line."""

import hashlib
import json
import re
import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from .errors import InputError, UsageError
from .parse import MAX_SEED, parse_shard

SLUG_CHARACTERS = 40
KEYS = ("prompt", "id", "seed", "negative_prompt", "output")
T = TypeVar("T")


@dataclass(frozen=True)
class Item:
    """One video to make. `output` is a path inside the output directory; None derives it from id and seed."""

    id: str
    prompt: str
    negative_prompt: str | None
    seed: int
    output: str | None = None


def slug(text: str) -> str:
    """The first words of `text` as a file name of at most 40 letters, digits and hyphens, in any script; where they are
    not all, four digits of a hash of all tell it from others that begin alike."""
    words = re.sub(r"[\W_]+", "-", unicodedata.normalize("NFKC", text).lower()).strip("-")
    if len(words) <= SLUG_CHARACTERS:
        return words or "prompt"
    digits = hashlib.sha256(words.encode(errors="surrogatepass")).hexdigest()[:4]
    return f"{words[: SLUG_CHARACTERS - 5].rstrip('-')}-{digits}"


def shard_of(text: str | None, prompt_file: str | None) -> tuple[int, int] | None:
    """The part of a prompt file that is this job's: `i, n` of --shard."""
    if text is None:
        return None
    if prompt_file is None:
        raise UsageError("--shard divides the prompts of a --prompt-file; leave it out, or give the file")
    return parse_shard(text)


def items_of(
    prompt: str | None, prompt_file: str | None, negative_prompt: str | None, seed: int, clip: Path | None = None
) -> list[Item]:
    """The items of a command: its prompt's, its prompt file's, or that of a `clip`, which needs no prompt."""
    if not (is_text(prompt or "") and is_text(negative_prompt or "")):
        raise UsageError("the prompt holds bytes that are no text; give it in UTF-8")
    if clip is not None:
        name = slug(clip.stem)
        return [Item(name, (prompt or "").strip(), negative_prompt, seed, f"{name}-{seed}")]
    if (prompt is None) == (prompt_file is None):
        raise UsageError('give either a prompt, as in atlasvid render "a red ball moving right", or --prompt-file')
    if prompt_file is not None:
        return read_prompts(prompt_file, negative_prompt, seed)
    return [single(prompt or "", negative_prompt, seed)]


def single(prompt: str, negative_prompt: str | None, seed: int) -> Item:
    """The item of a prompt given on the command line."""
    if not prompt.strip():
        raise UsageError('the prompt is empty: say what to show, as in atlasvid render "a red ball moving right"')
    return Item(slug(prompt), prompt.strip(), negative_prompt, seed)


def is_text(prompt: str) -> bool:
    """Whether files can hold it: Python passes on undecodable bytes as lone surrogates, and metadata ends at a zero."""
    return "\0" not in prompt and not any(0xD800 <= ord(c) < 0xE000 for c in prompt)


def read_prompts(source: str, negative_prompt: str | None, seed: int) -> list[Item]:
    """Items of a prompt file ("-" = stdin); what an item leaves out comes from the arguments.

    An item without a seed gets `seed` + its index, so that a batch never repeats one noise.
    """
    name = "stdin" if source == "-" else source
    text = _text_of(source, name)
    # Not splitlines: JSON strings may hold U+2028 and its like.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise InputError(f"prompt file {name} holds no prompts: write one prompt a line")
    json_lines = text.lstrip().startswith("{")
    if not json_lines and _is_json(text):
        raise InputError(f"prompt file {name} is a JSON array; write one object a line (jq -c '.[]' does)")
    if not json_lines and (objects := [number for number, line in lines if line.lstrip().startswith('{"')]):
        raise InputError(
            f"{name} line {objects[0]} is a JSON object and line {lines[0][0]} is not: write all of them as objects, or"
            " none"
        )
    digits = max(4, len(str(len(lines) - 1)))
    items: list[Item] = []
    seen_ids: dict[str, int] = {}
    seen_outputs: dict[str, int] = {}
    for index, (number, line) in enumerate(lines):
        place = f"{name} line {number}"
        fields: dict[str, Any] = _fields(line, place) if json_lines else {"prompt": line}
        if not is_text(line):
            raise InputError(f"{place} holds characters that are no text; leave them out")
        prompt = fields["prompt"].strip()
        item = Item(
            id=str(fields.get("id", f"{index:0{digits}d}-{slug(prompt)}")),
            prompt=prompt,
            negative_prompt=fields.get("negative_prompt", negative_prompt),
            seed=fields.get("seed", min(seed + index, MAX_SEED)),
            output=fields.get("output"),
        )
        if (first := seen_ids.setdefault(item.id, number)) != number:
            raise InputError(f"{place}: id {item.id!r} is taken by line {first}: give each item its own id")
        if item.output is not None and (first := seen_outputs.setdefault(item.output, number)) != number:
            raise InputError(f"{place}: output {item.output!r} is taken by line {first}: give each item its own output")
        items.append(item)
    return items


def _text_of(source: str, name: str) -> str:
    """The text of a prompt file, its lines ended by newlines alone."""
    if source == "-" and sys.stdin is None:
        raise InputError("stdin is closed: pipe the prompts in, or give the path of a prompt file")
    try:
        data = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
    except OSError as error:
        raise InputError(f"prompt file {name} cannot be read ({error.strerror}): check the path") from error
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        encoding = "utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "latin1"
        remedy = f"convert it with iconv -f {encoding} -t utf-8"
        raise InputError(f"prompt file {name} is not UTF-8 text: {remedy}") from error


def _is_json(text: str) -> bool:
    """Whether all of it is one JSON array, which as lines of text would be prompts."""
    try:
        return isinstance(json.loads(text), list)
    except (ValueError, RecursionError):
        return False


def select(items: Sequence[T], shard: tuple[int, int] | None) -> list[T]:
    """Every n-th item from the i-th (1-based) on; all of them without a shard."""
    return list(items) if shard is None else list(items[shard[0] - 1 :: shard[1]])


def _fields(line: str, place: str) -> dict:
    """The checked fields of one JSON Lines object; null counts as left out."""
    try:
        parsed = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place} is not JSON ({error}): write one object a line") from error
    if not isinstance(parsed, dict):
        raise InputError(f'{place} is not a JSON object: write {{"prompt": "..."}}')
    fields = {key: value for key, value in parsed.items() if value is not None}
    if unknown := sorted(set(fields) - set(KEYS)):
        raise InputError(f"{place}: unknown key {unknown[0]!r}: the keys are {', '.join(KEYS)}")
    for key in ("prompt", "negative_prompt", "output"):
        if key in fields and not isinstance(fields[key], str):
            raise InputError(f"{place}: {key} must be a string")
        if not is_text(fields.get(key, "")):
            raise InputError(f"{place}: {key} holds characters that are no text; leave them out")
    if not fields.get("prompt", "").strip():
        raise InputError(f"{place}: the prompt is empty: say what to show")
    seed = fields.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed <= MAX_SEED:
        raise InputError(f"{place}: seed must be a whole number from 0 to {MAX_SEED}")
    # An id names files.
    if isinstance(fields.get("id"), bool):
        raise InputError(f"{place}: id must be a string or a number")
    if "id" in fields and not re.fullmatch(r"\w[\w.-]{0,99}", str(fields["id"])):
        raise InputError(f"{place}: id {fields['id']!r} must be 1 to 100 letters, digits, '.', '_' or '-'")
    path = Path(fields.get("output", "x").strip())
    if not path.parts or path.is_absolute() or ".." in path.parts:
        raise InputError(f"{place}: output must name a file in the folder of --output")
    return fields
