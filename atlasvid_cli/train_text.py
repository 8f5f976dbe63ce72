"""Trains the embedded model's tokenizer and text encoder: recover every attribute, and its absence, from a caption."""

import random
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from . import world
from .checkpoint import save_folder

ATTRIBUTES: tuple[list[str], ...] = (
    sorted(world.COLOURS),
    list(world.SHAPES),
    sorted(world.DIRECTIONS),
    sorted(world.COLOURS),
    list(world.GROUNDS),
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A lowercasing word tokenizer over the world's vocabulary, with T5's special tokens."""
    words = ["<pad>", "</s>", "<unk>", ",", ".", *dict.fromkeys(word for a in ATTRIBUTES for word in a), *world.FILLERS]
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
    """A caption of a training combination and the class of each attribute in it."""
    scene = world.sample_scene(rng, 1.6, 4.0)
    if rng.random() < 0.1:
        return "", [len(a) for a in ATTRIBUTES]
    text = world.caption(scene, rng)
    words = text.replace(",", " ").split()
    labels = []
    for i, (value, names) in enumerate(zip(scene.attributes, ATTRIBUTES, strict=True)):
        # the ground's colour is said exactly when the ground is; the object's colour is the other colour word
        said = scene.ground in words if i == 3 else value in words
        labels.append(names.index(value) if said else len(names))
    if rng.random() < 0.3:  # filler words anywhere change nothing
        words = text.split()
        words.insert(rng.randrange(len(words) + 1), rng.choice(world.FILLERS))
        text = " ".join(words)
    return text, labels


def train(folder: Path, steps: int = 700, batch: int = 64, seed: int = 0) -> float:
    """Trains and saves `folder/tokenizer` and `folder/text_encoder`; returns the accuracy on the last 50 batches."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    tokenizer = build_tokenizer()
    encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(tokenizer), d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4, dropout_rate=0.0
        )
    )
    heads = AttributeHeads(128)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *heads.parameters()], lr=2e-3, weight_decay=0.01)
    right = total = 0
    for step in range(steps):
        texts, labels = zip(*(labelled_caption(rng) for _ in range(batch)), strict=True)
        tokens = tokenizer(list(texts), padding=True, return_tensors="pt")
        states = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
        target = torch.tensor(labels)
        logits = heads(states, tokens.attention_mask)
        loss = torch.stack([F.cross_entropy(part, target[:, i]) for i, part in enumerate(logits)]).sum()
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1.0, (step + 1) / 50) * (1 - step / steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step >= steps - 50:
            right += sum((part.argmax(1) == target[:, i]).sum().item() for i, part in enumerate(logits))
            total += target.numel()
    tokenizer.save_pretrained(folder / "tokenizer")
    save_folder(encoder, folder / "text_encoder")  # last: it counts as finished
    return right / total
