"""What is said of a scene of the procedural world: one plain sentence, or the same in other words and another order."""

import random
from typing import NamedTuple

from . import world

SENTENCE = "a {colour} {shape} moving {direction} over a {ground_colour} {ground}"  # which names all parts of a scene
PARTS = ("colour", "shape", "direction", "ground_colour", "ground")  # in the order of `Scene.attributes`
# words of captions that name no part of a scene
FILLERS = tuple(
    "a an the is that over under on across with in of and moving moves goes slides going sliding rolling rolls flying"  # noqa: SIM905
    " flies drifting drifts to towards from its one single big small video clip background ground pattern patterned"
    " above colored coloured color colour motion object slowly it travels travelling".split()
)
OBJECTS = (
    "a {colour} {shape}",
    "the {colour} {shape}",
    "{colour} {shape}",
    "one {colour} {shape}",
    "a small {colour} {shape}",
    "a {colour} colored {shape}",
    "a {shape} that is {colour}",
    "the {shape}, {colour} in color",
)
MOTIONS = (
    "moving {direction}",
    "moves {direction}",
    "is moving {direction}",
    "that goes {direction}",
    "slides slowly {direction}",
    "drifting to the {direction}",
    "flies towards the {direction}",
    "rolling from {behind} to {direction}",
    "in motion {direction}",
    "{direction}",
)
GROUNDS = (
    "over a {ground_colour} {ground}",
    "over {ground_colour} {ground}",
    "across the {ground_colour} {ground}",
    "on a {ground} that is {ground_colour}",
    "above {ground_colour} colored {ground}",
    "with {ground_colour} {ground} in the background",
    "on a background of {ground_colour} {ground}",
    "and under it a {ground_colour} {ground}",
)
NAMED_GROUNDS = (
    "a {ground_colour} {ground}",
    "the {ground_colour} {ground}",
    "{ground_colour} {ground}",
    "a {ground} that is {ground_colour}",
    "background {ground_colour} {ground}",
)
ORDERS = (
    "{object} {motion} {over}",
    "{object} {over} {motion}",
    "{over} {object} {motion}",
    "{over} {motion} {object}",
    "{motion} {object} {over}",
    "{motion} {over}, {object}",
    "{named} with {object} {motion}",
    "{named}, {object} {motion}",
    "{named}, {motion}, {object}",
    "{object} {motion}, {named}",
    "{motion}, {named}, {object}",
)
BEHIND = {"left": "right", "right": "left", "up": "down", "down": "up"}


class Form(NamedTuple):
    """How a scene is told: the order of its phrases, and each of them."""

    order: str
    object: str
    motion: str
    ground: str


def sample_form(rng: random.Random, held_out: bool = False) -> Form:
    """A random form of those that training draws, or of the tenth that it does not."""
    while True:
        order = rng.choice(ORDERS)
        ground = rng.choice(GROUNDS if "{over}" in order else NAMED_GROUNDS)
        form = Form(order, rng.choice(OBJECTS), rng.choice(MOTIONS), ground)
        if world.is_held_out(form) == held_out:
            return form


def sentence(attributes: world.Attributes, form: Form | None = None, without: str | None = None) -> str:
    """A scene with these attributes as the plain sentence or in the words of `form`; `without` its "colour",
    "direction" or "ground"."""
    named = dict(zip(PARTS, attributes, strict=True))
    named["behind"] = BEHIND[named["direction"]]
    plain = form is None
    form = form or Form("{object} {motion} {over}", OBJECTS[0], MOTIONS[0], GROUNDS[0])
    phrases = {"object": form.object, "motion": form.motion, "over": form.ground, "named": form.ground}
    if without == "colour":
        phrases["object"] = "a {shape}"
    elif without == "direction":
        phrases["motion"] = ""
    elif without == "ground":
        phrases["over"] = phrases["named"] = ""
    said = form.order.format(**phrases).format(**named)
    if not plain:  # that stays "a orange ball", as the shipped model was trained on it
        said = said.replace("a orange", "an orange")
    return ", ".join(" ".join(part.split()) for part in said.split(",") if part.strip())


def caption(scene: world.Scene, rng: random.Random | None = None) -> str:
    """A caption of the scene: the plain sentence, or with `rng` half the time one in other words, of which three in
    eight leave a part out."""
    if rng is None or rng.random() < 0.5:
        return sentence(scene.attributes)
    without = rng.choice((None,) * 5 + ("colour", "direction", "ground"))
    return sentence(scene.attributes, sample_form(rng), without)
