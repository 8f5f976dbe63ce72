"""Prompts to embeddings, exactly as WanPipeline makes them, without the padding that it appends."""

import re

import torch
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel


@torch.no_grad()
def encode_prompts(
    prompts: list[str], tokenizer: PreTrainedTokenizerBase, encoder: UMT5EncoderModel, length: int = 512
) -> list[torch.Tensor]:
    """Embeddings (tokens, text_dim) fp32 of each prompt; `length` is where Wan truncates."""
    result = []
    for prompt in prompts:
        ids = tokenizer(prompt_clean(prompt), truncation=True, max_length=length, return_tensors="pt")
        states = encoder(ids.input_ids.to(encoder.device), ids.attention_mask.to(encoder.device)).last_hidden_state
        result.append(states[0].float())
    return result


def left_out(prompt: str, tokenizer: PreTrainedTokenizerBase, length: int = 512) -> str:
    """What of a prompt lies beyond the `length` tokens that Wan reads; empty where it reads all."""
    ids = _ids(prompt_clean(prompt), tokenizer)[length - 1 :]  # the last one ends it
    return tokenizer.decode(ids)


def unknown_words(prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Words of the prompt that the tokenizer has no token for (a subword tokenizer has none)."""
    unknown = tokenizer.unk_token_id
    return [w for w in re.findall(r"\w+", prompt) if unknown in _ids(w, tokenizer)]


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """All tokens of a text; not `verbose`, which warns of more than a model reads."""
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids
