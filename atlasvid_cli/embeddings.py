"""Embeddings of prompts on disk, so that a text encoder of gigabytes is loaded only for prompts not seen before."""

import json
from pathlib import Path
from typing import NamedTuple

import torch

from . import store, tensor_file
from .errors import AtlasError


class Embedding(NamedTuple):
    """A prompt's states (tokens, text_dim) fp32, the words in it that the tokenizer does not know, and what of it is
    beyond the model's length."""

    states: torch.Tensor
    unknown: tuple[str, ...]
    left_out: str = ""


class EmbeddingCache:
    """A folder of embeddings, a file a prompt, made by one text encoder in one dtype."""

    def __init__(self, folder: Path):
        self.folder = folder

    def has(self, prompt: str) -> bool:
        """Whether there is an embedding of `prompt`, as far as its file's header says."""
        try:
            return "embedding" in tensor_file.read_header(self._path(prompt))[1]
        except AtlasError:
            return False

    def read(self, prompt: str) -> Embedding | None:
        """The embedding of `prompt`; None where it cannot be read or is damaged, and so has to be made again."""
        try:
            tensors, metadata = tensor_file.open_tensors(self._path(prompt))
            return Embedding(tensors["embedding"], tuple(json.loads(metadata["unknown"])), metadata["left_out"])
        except (AtlasError, KeyError, ValueError):
            return None

    def write(self, prompt: str, embedding: Embedding) -> None:
        """Keeps an embedding; ResourceError where the folder cannot take it."""
        store.run_directory(self.folder.parent, self.folder.name)
        said = {"unknown": json.dumps(embedding.unknown), "left_out": embedding.left_out}
        tensor_file.save_tensors(self._path(prompt), {"embedding": embedding.states}, said)

    def _path(self, prompt: str) -> Path:
        return self.folder / f"{store.artefact_hash({'prompt': prompt})}.safetensors"
