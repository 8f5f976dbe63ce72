"""Trains the embedded model's tokenizer and text encoder.

First to recover every attribute, and its absence, from the plain sentence (of all forms at once it does not learn whose
a colour is, docs/LOG.md); then to say the same of a scene in whatever words and order it is told (`settle`), so that a
transformer which has learnt what one sentence looks like follows all of them.
"""

import random
import re
from copy import deepcopy
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from . import captions, world
from .checkpoint import save_folder
from .optim import Optimizer, learning_rate

ATTRIBUTES: tuple[list[str], ...] = (
    sorted(world.COLOURS),
    list(world.SHAPES),
    sorted(world.DIRECTIONS),
    sorted(world.COLOURS),
    list(world.GROUNDS),
)
THINGS = "object", "object", "motion", "ground", "ground"  # that attributes are of
OTHER_WORDS = *captions.FILLERS, ".", "!", "shiny"  # the last two are in no vocabulary
RATE, SETTLING_RATE = 2e-3, 5e-3
FILLER_WEIGHT = 0.3  # of an attribute's in what `settle` mends

Pair = tuple[str, str, world.Attributes]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A lowercasing word tokenizer over the world's vocabulary, with T5's special tokens."""
    names = dict.fromkeys(word for a in ATTRIBUTES for word in a)
    words = ["<pad>", "</s>", "<unk>", ",", ".", *names, *captions.FILLERS]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


class AttributeHeads(nn.Module):
    """Reads each attribute from the token states by its own attention query; the last class is 'not said'."""

    def __init__(self, dim: int):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(len(ATTRIBUTES), dim) / dim**0.5)
        self.heads = nn.ModuleList(nn.Linear(dim, len(a) + 1) for a in ATTRIBUTES)

    def forward(self, states: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
        logits = states @ self.queries.T + torch.where(mask[..., None] > 0, 0.0, -1e9)
        pooled = logits.softmax(dim=1).transpose(1, 2) @ states
        return [head(pooled[:, i]) for i, head in enumerate(self.heads)]


def labelled_caption(rng: random.Random) -> tuple[str, list[int]]:
    """A plain sentence of a training combination, or what is left of it, and the class of each attribute in it."""
    _, plain, attributes = told_twice(rng)
    words, found = plain.split(), zip(attributes, ATTRIBUTES, strict=True)
    return plain, [names.index(value) if value in words else len(names) for value, names in found]


def told_twice(rng: random.Random, held_out: bool = False) -> Pair:
    """A caption in some words and order, the plain sentence that says the same, and the scene's attributes.

    One in ten is the empty prompt, that guidance leads away from. Of the others, in three of ten both leave a part out;
    in three of ten the first has one to six words more, that say nothing (which now and then make a held-out form of
    another). Held-out captions are whole, and in held-out forms.
    """
    attributes = world.sample_attributes(rng, held_out)
    if held_out:
        return captions.sentence(attributes, captions.sample_form(rng, True)), captions.sentence(attributes), attributes
    if rng.random() < 0.1:
        return "", "", attributes
    without = rng.choice((None,) * 7 + ("colour", "direction", "ground"))
    form = captions.sample_form(rng) if rng.random() < 0.75 else None
    words = captions.sentence(attributes, form, without).split()
    for _ in range(rng.choice((0, 0, 0, 0, 0, 0, 0, 1, 2, 6))):
        words.insert(rng.randrange(len(words) + 1), rng.choice(OTHER_WORDS))
    return " ".join(words), captions.sentence(attributes, without=without), attributes


def roles(text: str, attributes: world.Attributes) -> list[str]:
    """What each token of a caption says: its attribute, or of fillers the thing of the next attribute, of those at the
    end the last one's, and "end" of what closes it. A caption that is not empty names an attribute."""
    words = re.findall(r"\w+|[^\w\s]", text)
    thing_of = dict(zip(attributes, THINGS, strict=True))
    near, found = next((thing_of[w] for w in reversed(words) if w in thing_of), ""), []
    for word in reversed(words):
        near = thing_of.get(word, near)
        found.append(word if word in thing_of else near)
    return [*reversed(found), "end"]


def recover(
    tokenizer: PreTrainedTokenizerBase, steps: int = 700, batch: int = 64, seed: int = 0
) -> tuple[UMT5EncoderModel, float]:
    """An encoder from whose states small heads read the attributes, and in how many they do on the last 50 batches."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(tokenizer), d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4, dropout_rate=0.0
        )
    )
    heads = AttributeHeads(128)
    optimizer = Optimizer([*encoder.named_parameters(), *heads.named_parameters()], RATE, kind="adamw")
    right = total = 0
    for step in range(steps):
        texts, labels = zip(*(labelled_caption(rng) for _ in range(batch)), strict=True)
        tokens = tokenizer(list(texts), padding=True, return_tensors="pt")
        states = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
        target = torch.tensor(labels)
        logits = heads(states, tokens.attention_mask)
        torch.stack([F.cross_entropy(part, target[:, i]) for i, part in enumerate(logits)]).sum().backward()
        optimizer.step(learning_rate(step, steps, RATE))
        if step >= steps - 50:
            right += sum((part.argmax(1) == target[:, i]).sum().item() for i, part in enumerate(logits))
            total += target.numel()
    return encoder, right / total


def settle(
    encoder: UMT5EncoderModel, tokenizer: PreTrainedTokenizerBase, steps: int, batch: int = 64, seed: int = 0
) -> UMT5EncoderModel:
    """An encoder that gives each word of a caption, in whatever form, the state that `encoder` gives the word that says
    the same in the plain sentence."""
    torch.manual_seed(seed)
    rng, settled = random.Random(seed), deepcopy(encoder).requires_grad_(True)
    optimizer = Optimizer(settled.named_parameters(), SETTLING_RATE, ("shared", "relative_attention_bias"))
    for step in range(steps):
        error, weight = departure(settled, encoder, tokenizer, [told_twice(rng) for _ in range(batch)])
        ((error * weight).sum() / weight.sum()).backward()
        optimizer.step(learning_rate(step, steps, SETTLING_RATE))
    return settled


def departure(
    settled: UMT5EncoderModel, encoder: UMT5EncoderModel, tokenizer: PreTrainedTokenizerBase, pairs: list[Pair]
) -> tuple[torch.Tensor, torch.Tensor]:
    """How far the states that `settled` gives what is told are from those that `encoder` gives the plain sentences:
    squared, as a part of the mean square, and what each weighs, both (tokens,)."""
    told, plain = (
        tokenizer(list(texts), padding=True, return_tensors="pt")
        for texts in zip(*(pair[:2] for pair in pairs), strict=True)
    )
    with torch.no_grad():
        wanted = encoder(plain.input_ids, plain.attention_mask).last_hidden_state
    states = settled(told.input_ids, told.attention_mask).last_hidden_state
    rows, places, targets, weights = [], [], [], []
    for row, (text, sentence, attributes) in enumerate(pairs):
        target_of = {role: place for place, role in enumerate(roles(sentence, attributes))}
        for place, role in enumerate(roles(text, attributes)):
            rows.append(row)
            places.append(place)
            targets.append(target_of[role])
            weights.append(FILLER_WEIGHT if role in THINGS else 1.0)
    aims = wanted[rows, targets]
    return (states[rows, places] - aims).square().mean(-1) / aims.square().mean(), torch.tensor(weights)


def train(folder: Path, steps: int = 700, settling_steps: int = 10000) -> dict[str, float]:
    """Trains and saves `folder/tokenizer` and `folder/text_encoder`. Returns the accuracy with which attributes are
    recovered, and how far held-out forms are from the plain sentence (root mean square, relative)."""
    tokenizer = build_tokenizer()
    encoder, accuracy = recover(tokenizer, steps)
    settled = settle(encoder, tokenizer, settling_steps)
    rng = random.Random("held out")
    with torch.no_grad():
        error, weight = departure(settled, encoder, tokenizer, [told_twice(rng, held_out=True) for _ in range(256)])
    tokenizer.save_pretrained(folder / "tokenizer")
    save_folder(settled, folder / "text_encoder")  # last: it counts as finished
    return {"accuracy": accuracy, "departure": error[weight == 1].mean().sqrt().item()}
