"""Short prompts of the embedded world said in full, as Wan's own scripts extend prompts.

`tiny` was trained on captions that leave out one part at most; of shorter ones it mixes up what colour is whose.
"""

import random
import re
from itertools import pairwise

from . import captions, world

JOINTS = {"above", "across", "and", "from", "in", "of", "on", "over", "that", "to", "towards", "under", "with"}


def extended(prompt: str, seed: int) -> str:
    """`prompt`, or where it leaves parts of a scene out the whole sentence, with these drawn by `seed` and words that
    name no part kept at its end, so that they are still said to be unknown."""
    words = re.findall(r"\w+", prompt.lower())
    found = parts_of(words)
    missing = [part for part in captions.PARTS if part not in found]
    if not missing or not found:
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
    rest = [word for word in words if word not in {*captions.FILLERS, *found.values()}]
    return " ".join([captions.SENTENCE.format(**drawn | found), *rest])


def parts_of(words: list[str]) -> dict[str, str]:
    """The parts of a scene that words name. A colour is that of the object or ground it stands before, with no
    word between that joins two phrases, else of the one it stands after, as it is where it follows "is" ("a ball that
    is red"); without either the first is the object's."""
    found: dict[str, str] = {}
    named = (("shape", world.SHAPES), ("direction", world.DIRECTIONS), ("ground", world.GROUNDS))
    for part, names in named:
        # "from left to right" is to the right
        if said := sorted(
            (last == "from", at) for at, (last, word) in enumerate(pairwise(["", *words])) if word in names
        ):
            found[part] = words[said[0][1]]
    nouns = {word: part for part, word in found.items() if part != "direction"}
    owners = {"shape": "colour", "ground": "ground_colour"}
    for at, word in enumerate(words):
        if word not in world.COLOURS:
            continue
        after = next((w for w in words[at + 1 :] if w in nouns or w in world.COLOURS or w in JOINTS), "")
        before = next((w for w in reversed(words[:at]) if w in nouns), "")
        said_after = bool(before) and words[at - 1] in ("is", "are")
        noun = after if after in nouns and not said_after else before
        part = owners[nouns[noun]] if noun else next((p for p in owners.values() if p not in found), "colour")
        found.setdefault(part, word)
    return found
