"""The model of a preset, loaded part by part."""

from typing import Any

import torch

from .console import Console
from .presets import load_preset
from .text import encode_prompts, unknown_words
from .weights import check_config, load_text, load_transformer, load_vae, model_folder, model_hash


class Session:
    """The model of a preset, loaded part by part when first needed and kept for the batch."""

    def __init__(self, preset: str, model_path: str | None = None):
        self.preset = load_preset(preset)
        self.folder = model_folder(self.preset, model_path)
        check_config(self.folder, self.preset)
        self._parts: dict[str, Any] = {}

    def hash(self, stage: str) -> str:
        """Identity of the weights that make a stage's latents."""
        lora = self.preset.proxy.lora if stage == "proxy" else self.preset.detail.lora
        key = f"hash {stage}"
        if key not in self._parts:
            self._parts[key] = model_hash(self.folder, "transformer", "text_encoder", lora)
        return self._parts[key]

    def transformer(self, stage: str) -> Any:
        """The model with the adapter of stage `proxy` or `detail`."""
        lora = self.preset.proxy.lora if stage == "proxy" else self.preset.detail.lora
        key = f"transformer {stage}"
        if key not in self._parts:
            for other in [k for k in self._parts if k.startswith("transformer ")]:
                del self._parts[other]  # one stage's weights at a time
            self._parts[key] = load_transformer(self.folder, lora, stage)
        return self._parts[key]

    def detail_models(self) -> tuple[Any, Any]:
        """(detail stream, proxy stream): one model where the adapter acts on both."""
        proxy_stream = self.transformer("detail")
        if self.preset.detail.streams == "both":
            return proxy_stream, proxy_stream
        bare = load_transformer(self.folder)
        return bare, proxy_stream

    def vae(self) -> Any:
        if "vae" not in self._parts:
            self._parts["vae"] = load_vae(self.folder)
        return self._parts["vae"]

    def embeddings(self, prompts: tuple[str, ...], console: Console) -> list[torch.Tensor]:
        if "text" not in self._parts:
            self._parts["text"] = load_text(self.folder)
        tokenizer, encoder = self._parts["text"]
        for word in dict.fromkeys(w for p in prompts for w in unknown_words(p, tokenizer)):
            console.warn(f"the model of preset {self.preset.name} does not know the word {word!r} and ignores it")
        return encode_prompts(list(prompts), tokenizer, encoder, self.preset.transformer.text_length)
