"""The text encoder says the same of a scene in whatever words it is told."""

import random

import pytest
import torch
from transformers import UMT5Config, UMT5EncoderModel

from atlasvid_cli import captions, train_text, world
from atlasvid_cli.presets import load_preset
from atlasvid_cli.weights import load_text, model_folder

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


def test_what_is_told_twice_says_the_same():
    rng, tokenizer = random.Random(0), train_text.build_tokenizer()
    for _ in range(300):
        told, plain, attributes = train_text.told_twice(rng)
        assert len(tokenizer(told).input_ids) == len(train_text.roles(told, attributes))
        assert {a in told.split() for a in attributes} and all(
            (a in told.replace(",", "").split()) == (a in plain.split()) for a in attributes
        )
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


@pytest.mark.parametrize("combinations", ["held out", "every"])
def test_the_shipped_encoder_reads_forms_that_it_was_never_told(shipped, combinations):
    tokenizer, encoder = shipped
    rng, pairs = random.Random(2), []
    for _ in range(256):
        attributes = world.sample_attributes(rng, held_out=combinations == "held out")
        told = captions.sentence(attributes, captions.sample_form(rng, held_out=True))
        pairs.append((told, captions.sentence(attributes), attributes))
    assert far(encoder, encoder, tokenizer, pairs) < 0.1


@pytest.mark.parametrize(
    "told", ["A shiny red ring, over white stripes, moving up!", "over white stripes a red ring is moving up"]
)
def test_the_shipped_encoder_leaves_colours_where_they_belong(shipped, told):
    """Against what it gives the same words with the colours changed over."""
    tokenizer, encoder = shipped
    swapped = "white", "ring", "up", "red", "stripes"
    right, wrong = (
        far(encoder, encoder, tokenizer, [(told.lower(), captions.sentence(a), a)]) for a in (ATTRIBUTES, swapped)
    )
    assert right < 0.15 and wrong > 3 * right
