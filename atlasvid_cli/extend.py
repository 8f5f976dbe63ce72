"""Short prompts of the embedded world said in full, as Wan's own scripts extend prompts.

`tiny` was trained on captions that leave out one part at most; of shorter ones it mixes up what colour is whose.
"""

import random
import re
from itertools import pairwise

from . import captions, world

JOINTS = {"above", "across", "and", "from", "in", "of", "on", "over", "that", "to", "towards", "under", "with"}


def extended(prompt: str, seed: int) -> str:
    """`prompt`, or where it does not name all parts of a scene the whole sentence, with what is missing drawn by `seed`
    and words that the world does not have kept at its end, so that they are still said to be unknown."""
    words = re.findall(r"\w+", prompt.lower())
    found = parts_of(words)
    missing = [part for part in captions.PARTS if part not in found]
    if not found or not (missing or set(found.values()) - set(words)):
        return prompt
    rng = random.Random(f"extend/{seed}/{prompt}")
    colours = sorted(set(world.COLOURS) - set(found.values()))
    drawn = {
        "colour": rng.choice(colours),
        "shape": rng.choice(world.SHAPES),
        "direction": rng.choice(sorted(world.DIRECTIONS)),
        "ground": rng.choice(world.GROUNDS),
    }
    drawn["ground_colour"] = rng.choice([c for c in colours if c != drawn["colour"]])
    known = {*world.COLOURS, *world.SHAPES, *world.DIRECTIONS, *world.GROUNDS, *captions.FILLERS}
    rest = [word for word in words if word not in known]
    return " ".join([captions.SENTENCE.format(**drawn | found), *rest])


def parts_of(words: list[str]) -> dict[str, str]:
    """The parts of a scene that words name, each by its first word.

    "from left to right" and "from the left" are both to the right. A colour is that of the object or ground it stands
    before, with no word between that joins two phrases, else of the one it stands after, as it is where it follows "is"
    ("a ball that is red"); without either the first is the object's. One that stands before neither ("a red ball over a
    white floor") is of the other where the one it stands after has another colour already.
    """
    found: dict[str, str] = {}
    for part, names in (("shape", world.SHAPES), ("ground", world.GROUNDS)):
        if (word := next((word for word in words if word in names), None)) is not None:
            found[part] = word
    nouns = {word: part for part, word in found.items()}
    if direction := _direction([word for word in words if word not in ("a", "an", "the")]):
        found["direction"] = direction
    owners = {"shape": "colour", "ground": "ground_colour"}
    for at, word in enumerate(words):
        if word not in world.COLOURS:
            continue
        after = next((w for w in words[at + 1 :] if w in nouns or w in world.COLOURS or w in JOINTS), "")
        before = next((w for w in reversed(words[:at]) if w in nouns), "")
        is_before = bool(before) and owners[nouns[before]] not in found and words[at - 1] in ("is", "are")
        noun = after if after in nouns and not is_before else before
        free = next((part for part in owners.values() if part not in found), "colour")
        part = owners[nouns[noun]] if noun else free
        elsewhere = part in found and after not in nouns and word not in found.values()
        found.setdefault(free if elsewhere else part, word)
    return found


def _direction(words: list[str]) -> str | None:
    said = [(last, word) for last, word in pairwise(["", *words]) if word in world.DIRECTIONS]
    if towards := [word for last, word in said if last != "from"]:
        return towards[0]
    return captions.BEHIND[said[0][1]] if said else None
