"""The text encoder says the same of a scene in whatever words it is told."""

import random

import pytest
import torch
from transformers import UMT5Config, UMT5EncoderModel

from atlasvid_cli import captions, train_text, world
from atlasvid_cli.hub import model_folder
from atlasvid_cli.presets import load_preset
from atlasvid_cli.weights import load_text

ATTRIBUTES = "red", "ring", "up", "white", "stripes"


def far(settled, encoder, tokenizer, pairs):
    """Relative root mean square error of what names an attribute."""
    with torch.no_grad():
        error, weight = train_text.departure(settled, encoder, tokenizer, pairs)
    return float(error[weight == 1].mean().sqrt())


@pytest.fixture(scope="module")
def shipped():
    return load_text(model_folder(load_preset("tiny"), None), torch.float32)


def test_a_filler_helps_to_name_what_comes_next():
    assert train_text.roles("over white stripes, a red ring from down to up.", ATTRIBUTES) == [
        *("ground", "white", "stripes"),
        *("object", "object", "red", "ring"),  # the comma too
        *("motion", "motion", "motion", "up", "motion", "end"),
    ]


def test_an_empty_prompt_says_that_it_ends():
    assert train_text.roles("", ATTRIBUTES) == ["end"]


def test_what_is_told_twice_says_the_same():
    rng, tokenizer = random.Random(0), train_text.build_tokenizer()
    for _ in range(300):
        told, plain, attributes = train_text.told_twice(rng)
        assert len(tokenizer(told).input_ids) == len(train_text.roles(told, attributes))
        assert all((a in told.replace(",", "").split()) == (a in plain.split()) for a in attributes)
        assert set(train_text.roles(told, attributes)) <= set(train_text.roles(plain, attributes))


def test_settling_brings_words_of_any_order_to_those_of_the_plain_sentence():
    torch.manual_seed(0)
    tokenizer = train_text.build_tokenizer()
    size = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
    encoder = UMT5EncoderModel(UMT5Config(vocab_size=len(tokenizer), **size)).requires_grad_(False)
    rng = random.Random(1)
    pairs = [train_text.told_twice(rng, held_out=True) for _ in range(64)]
    settled = train_text.settle(encoder, tokenizer, steps=150, batch=32)
    assert far(settled, encoder, tokenizer, pairs) < 0.7 * far(encoder, encoder, tokenizer, pairs)
    plain = [(sentence, sentence, attributes) for _, sentence, attributes in pairs]
    assert far(encoder, encoder, tokenizer, plain) == 0


def test_what_is_not_said_is_a_class_of_its_own():
    rng, seen = random.Random(3), set()
    for _ in range(200):
        text, labels = train_text.labelled_caption(rng)
        for label, names in zip(labels, train_text.ATTRIBUTES, strict=True):
            assert label == len(names) or names[label] in text.split()
        seen.add(tuple(label == len(names) for label, names in zip(labels, train_text.ATTRIBUTES, strict=True)))
    assert {sum(absent) for absent in seen} == {0, 1, 2, 5}  # all said, one left out, the ground, and nothing


@pytest.mark.parametrize("held_out", [True, False])
def test_the_shipped_encoder_reads_forms_that_it_was_never_told(shipped, held_out):
    tokenizer, encoder = shipped
    rng, pairs = random.Random(2), []
    for _ in range(256):
        attributes = world.sample_attributes(rng, held_out)
        told = captions.sentence(attributes, captions.sample_form(rng, held_out=True))
        pairs.append((told, captions.sentence(attributes), attributes))
    assert far(encoder, encoder, tokenizer, pairs) < 0.1


@pytest.mark.parametrize(
    "told",
    [
        "a shiny {0} {1}, over {3} {4}, moving {2}!",
        "over {3} {4} a {0} {1} is moving {2}",
        "{3} {4}, and above the {4} a {1} that is {0} flies {2}",
    ],
)
@pytest.mark.parametrize("part", range(5))
def test_the_shipped_encoder_tells_words_apart_as_in_the_plain_sentence(shipped, told, part):
    """What a word says there is said here too, and nothing like what another in its place would."""
    tokenizer, encoder = shipped
    changed = list(ATTRIBUTES)
    changed[part] = ("blue", "star", "left", "black", "hills")[part]

    def state(text, word):
        tokens = tokenizer(text, return_tensors="pt")
        place = tokens.input_ids[0].tolist().index(tokenizer.convert_tokens_to_ids(word))
        with torch.no_grad():
            return encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state[0, place]

    here = state(told.format(*ATTRIBUTES), ATTRIBUTES[part])
    same = state(captions.sentence(ATTRIBUTES), ATTRIBUTES[part])
    other = state(captions.sentence(tuple(changed)), changed[part])
    assert (here - same).norm() < 0.5 * (here - other).norm()
    swapped = "white", "ring", "up", "red", "stripes"
    if part in (0, 3):  # and of the other thing it says something else
        assert (here - same).norm() < 0.5 * (here - state(captions.sentence(swapped), ATTRIBUTES[part])).norm()
