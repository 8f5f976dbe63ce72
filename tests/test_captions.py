"""Whatever the words and their order, a caption names the parts of its scene, and the command line reads them."""

import itertools
import random
import re

import pytest

from atlasvid_cli import captions, world
from atlasvid_cli.extend import parts_of

EVERY_FORM = [
    captions.Form(*form)
    for order in captions.ORDERS
    for form in itertools.product(
        [order],
        captions.OBJECTS,
        captions.MOTIONS,
        captions.GROUNDS if "{over}" in order else captions.NAMED_GROUNDS,
    )
]
ATTRIBUTES = "orange", "ring", "left", "white", "hills"


def words_of(text):
    return re.findall(r"\w+", text)


def test_a_tenth_of_the_forms_is_never_used_for_training():
    assert 0.08 < sum(map(world.is_held_out, EVERY_FORM)) / len(EVERY_FORM) < 0.12
    rng = random.Random(0)
    assert not any(world.is_held_out(captions.sample_form(rng)) for _ in range(300))
    assert all(world.is_held_out(captions.sample_form(rng, held_out=True)) for _ in range(100))


def test_every_form_names_every_part_of_a_scene():
    known = {*captions.FILLERS, *ATTRIBUTES, "right"}  # what it moves away from
    for form in EVERY_FORM:
        text = captions.sentence(ATTRIBUTES, form)
        assert set(words_of(text)) <= known and "{" not in text
        assert parts_of(words_of(text)) == dict(zip(captions.PARTS, ATTRIBUTES, strict=True)), text


@pytest.mark.parametrize("form", [None, *random.Random(1).sample(EVERY_FORM, 20)])
@pytest.mark.parametrize(("without", "left"), [("colour", {0}), ("direction", {2}), ("ground", {3, 4})])
def test_what_is_left_out_is_not_said(form, without, left):
    text = captions.sentence(ATTRIBUTES, form, without)
    assert {i for i, a in enumerate(ATTRIBUTES) if a not in words_of(text)} == left
    assert not re.search(r"^[ ,]|[ ,]$| ,|  |,,", text)


def test_captions_are_the_plain_sentence_or_one_in_other_words():
    scene = world.sample_scene(random.Random(4), 1.6, 4.0)
    plain = captions.sentence(scene.attributes)
    assert (
        captions.caption(scene)
        == plain
        == captions.SENTENCE.format(**dict(zip(captions.PARTS, scene.attributes, strict=True)))
    )
    told = [captions.caption(scene, random.Random(i)) for i in range(200)]
    assert 70 < told.count(plain) < 130 and len(set(told)) > 60
