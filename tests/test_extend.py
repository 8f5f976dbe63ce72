"""Short prompts in full: what they say stays, whatever their order."""

import re

import pytest

from atlasvid_cli import world
from atlasvid_cli.captions import PARTS, SENTENCE
from atlasvid_cli.extend import extended, parts_of


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("a red ball", {"colour": "red", "shape": "ball"}),
        ("Blue HILLS", {"ground_colour": "blue", "ground": "hills"}),
        ("a ball that is red on hills", {"colour": "red", "shape": "ball", "ground": "hills"}),
        (
            "stripes that are green, white star",
            dict(zip(PARTS, ("white", "star", None, "green", "stripes"), strict=True)),
        ),
        (
            "over a green gradient a ring going up",
            dict(zip(PARTS, (None, "ring", "up", "green", "gradient"), strict=True)),
        ),
        ("red moving left", {"colour": "red", "direction": "left"}),
        ("red on blue", {"colour": "red", "ground_colour": "blue"}),
        ("a ring moving from left to right", {"shape": "ring", "direction": "right"}),
        ("a ring moving from the left to the right", {"shape": "ring", "direction": "right"}),
        ("a star from the left", {"shape": "star", "direction": "right"}),
        (
            "over white stripes is red ball",
            dict(zip(PARTS, ("red", "ball", None, "white", "stripes"), strict=True)),
        ),
        (
            "a blue star moving left over a white floor",
            dict(zip(PARTS, ("blue", "star", "left", "white", None), strict=True)),
        ),
        ("a red ball and a blue ball", {"colour": "red", "shape": "ball"}),
        ("a red ball, bright red", {"colour": "red", "shape": "ball"}),
        ("a zebra", {}),
    ],
)
def test_a_colour_is_of_what_it_stands_by(prompt, parts):
    assert parts_of(re.findall(r"\w+", prompt.lower())) == {k: v for k, v in parts.items() if v}


@pytest.mark.parametrize(
    "template", [SENTENCE, "{ground_colour} {ground}, a {shape} that is {colour} goes {direction}"]
)
def test_whole_sentences_stay_as_they_are(template):
    prompt = template.format(colour="red", shape="ball", direction="up", ground_colour="green", ground="hills")
    assert extended(prompt, 3) == prompt


def test_nothing_known_is_left_alone():
    assert extended("a zebra", 0) == "a zebra" and extended("", 0) == ""


@pytest.mark.parametrize("seed", range(20))
def test_what_is_drawn_completes_a_scene_of_two_colours_and_is_the_seeds(seed):
    prompt = "a white star over stripes"
    made = extended(prompt, seed)
    parts = parts_of(made.split())
    assert set(parts) == set(PARTS) and made == SENTENCE.format(**parts)
    assert (parts["colour"], parts["shape"], parts["ground"]) == ("white", "star", "stripes")
    assert parts["ground_colour"] in set(world.COLOURS) - {"white"}
    assert extended(prompt, seed) == made


def test_seeds_draw_different_scenes_and_unknown_words_are_kept():
    assert len({extended("a red ball", seed) for seed in range(10)}) > 5
    assert extended("a red zebra on the moon", 0).endswith(" zebra moon")


def test_where_it_moves_from_is_not_said_again():
    made = extended("a ring moving from left to right", 0)
    assert "left" not in made.split() and "moving right" in made
    whole = "a red ring from the left over white stripes"
    assert extended(whole, 0) == "a red ring moving right over a white stripes"
    both = "a red ring from left to right over white stripes"
    assert extended(both, 0) == both
