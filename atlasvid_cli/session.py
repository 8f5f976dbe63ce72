"""The model of a preset, loaded part by part."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from .attention import check_backend, default_backend
from .block import EAGER, Kernels
from .console import Console
from .digests import file_digest, unread
from .embeddings import Embedding, EmbeddingCache
from .errors import ResourceError, UsageError
from .half import HalfEncoder
from .hub import folder_here, model_folder
from .lora import check_lora, config_beside, merge_lora
from .machine import check_compiler, compute_device, decode_dtype, release_gpu
from .memory import Offload, WeightDtype, encodes_text, model_bytes
from .offload import check_weight_dtype, narrow, place
from .parse import Lora
from .plan import Request
from .presets import Preset, load_preset
from .store import cache_folder
from .text import encode_prompts, left_out, unknown_words
from .weights import (
    check_adapter,
    check_config,
    check_entry,
    load_half_encoder,
    load_skeleton,
    load_text,
    load_transformer,
    load_vae,
    merge_adapter,
    model_hash,
    weight_files,
)

SMALL = 64 << 20  # bytes of a transformer that a batch keeps beside the next one: no plan notices

# What a stage costs without an adapter of its own, as stock weights have none.
UNTRAINED = {
    "proxy": "preset {preset} has no proxy adapter: beyond the length that its model was trained on, motion may repeat"
    " or stand still",
    "detail": "preset {preset} has no detail adapter: detail follows the proxy only through what it starts from, so"
    " fine structure may drift or repeat",
}


def check_options(preset: Preset, kernels: Kernels, loras: tuple[Lora, ...], weight_dtype: WeightDtype) -> None:
    """Raises for what cannot be had here, before a model is looked for."""
    check_weight_dtype(weight_dtype)
    for lora in loras:
        check_lora(lora.path)
        if lora.expert and not preset.experts:
            raise UsageError(
                f"preset {preset.name} has one transformer; give --lora {lora.path} without @{lora.expert}"
            )
    if kernels.attention:
        check_backend(kernels.attention, *_where())
    if kernels.compiled and weight_dtype == "fp8":
        raise UsageError("--compile has no gain with --weight-dtype fp8, whose casts split its graphs; take int8")
    if kernels.compiled:
        check_compiler(_where()[0])


def check_session(request: Request, console: Console) -> "Session | None":
    """Raises what the session of a request would, as far as that is known without fetching a model, and returns the
    session where there is nothing to fetch."""
    preset = load_preset(request.preset)
    if folder_here(preset, request.model_path):
        return Session.of(request, console, identified=False)
    check_options(preset, Kernels(request.attention_backend, request.compiled), request.loras, request.weight_dtype)
    return None


def _where() -> tuple[torch.device, torch.dtype]:
    return torch.device(compute_device().kind), getattr(torch, compute_device().dtype)


class Session:
    """The model of a preset, `only` its VAE where nothing is sampled, loaded part by part when first needed and kept
    for the batch where it fits.

    The text encoder encodes the whole batch and is let go. On a GPU one stage's models are in its memory at a time.
    """

    def __init__(
        self,
        preset: str | Preset,
        model_path: str | None = None,
        kernels: Kernels = EAGER,
        loras: tuple[Lora, ...] = (),
        strict: bool = False,
        weight_dtype: WeightDtype = "auto",
        cache: Path | None = None,
        only: Literal["vae"] | None = None,
    ):
        self.preset = load_preset(preset) if isinstance(preset, str) else preset
        self.kernels, self.loras, self.strict, self.weight_dtype = kernels, loras, strict, weight_dtype
        check_options(self.preset, kernels, loras, weight_dtype)
        self.folder = model_folder(self.preset, model_path, only)
        check_config(self.folder, self.preset, only)
        self.device, self.dtype = _where()
        self._parts: dict[tuple[str, ...], Any] = {}
        self._hashes: dict[str, str] = {}
        self._told: set[str] = set()
        self._embeddings: dict[str, Embedding] = {}
        self._expected: dict[str, None] = {}  # an ordered set
        self._cache_folder = cache or cache_folder()

    @classmethod
    def of(cls, request: Request, console: Console, identified: bool = True) -> "Session":
        """What a request asks for, its adapters checked; its weights are `identified` unless nothing will be made."""
        session = cls(
            request.preset,
            request.model_path,
            Kernels(request.attention_backend, request.compiled),
            request.loras,
            request.strict,
            request.weight_dtype,
        )
        session.check_loras()
        if identified:
            session.identify(console, *session.parts)
        session.check_adapters(identified)
        return session

    @property
    def parts(self) -> list[str]:
        """The weights of all stages, by the names of their folders or files."""
        stages = (name for stage in ("proxy", "detail") for pair in self._weights(stage) for name in pair if name)
        return [*stages, "text_encoder", "vae"]

    def identify(self, console: Console, *names: str | None) -> None:
        """Reads the large ones of the named weights whose digests nothing keeps yet, and shows it: identities are made
        of them."""
        if large := unread(weight_files(self.folder, *names)):
            with console.stage("checksums", len(large)) as advance:
                for file in large:
                    file_digest(file)
                    advance()

    def check_adapters(self, identified: bool = True) -> None:
        """Raises InputError for an adapter of another stage, or trained otherwise than the preset says, and where
        weights are `identified` of another base, and for an entry of another VAE: the detail would find it out after
        hours of the proxy."""
        proxy, detail = self.preset.proxy, self.preset.detail
        windows = json.dumps(detail.windows)
        trained_for = {
            "proxy": proxy.trained_for,
            "detail": {"time_ratio": f"{proxy.time_ratio},1", "windows": windows, "streams": detail.streams},
        }
        for stage, figures in trained_for.items():
            largest = self.preset.training_ratios[-1] if stage == "detail" else None
            for part, adapter in self._weights(stage):
                if adapter:
                    check_adapter(self.folder, adapter, stage, part if identified else None, figures, largest)
        for level in (detail.first, detail.upper):
            if level.entry:
                check_entry(self.folder, level.entry, identified)
        skeleton = load_skeleton(self.folder)
        for adapter in {adapter for stage in trained_for for _, adapter in self._weights(stage) if adapter}:
            merge_adapter(skeleton, self.folder, adapter)

    def check_loras(self) -> None:
        """Raises InputError for a LoRA of another model."""
        for lora in self.loras:
            merge_lora(load_skeleton(self.folder), lora, self.strict, warn=lambda text: None)

    @property
    def arithmetic(self) -> dict[str, str]:
        """How values are computed, beside what they are computed from: the same job elsewhere differs by rounding."""
        attention = self.kernels.attention or default_backend(self.device, self.dtype)
        attention += "+compiled" if self.kernels.compiled else ""
        dtype = str(self.dtype).removeprefix("torch.")
        kept = dtype if self.weight_dtype == "auto" else f"{dtype}+{self.weight_dtype}"
        return {"dtype": kept, "attention": attention}

    def model_hash(self, stage: str) -> str:
        """Identity of the preset's weights of a stage, which its latents are bound to."""
        if stage not in self._hashes:
            parts, adapters = zip(*self._weights(stage), strict=True)
            self._hashes[stage] = model_hash(self.folder, *parts, "text_encoder", *adapters)
        return self._hashes[stage]

    def hash(self, stage: str) -> str:
        """Identity of all weights that make a stage's latents: those of `--lora` too."""
        made = self.model_hash(stage)
        for lora in self.loras:
            files = (lora.path, config_beside(lora.path))
            file = model_hash(Path(), *(str(path.absolute()) for path in files if path))
            made = hashlib.sha256(f"{made} {file} {lora.weight} {lora.expert}".encode()).hexdigest()[:16]
        return made

    @property
    def vae_hash(self) -> str:
        """Identity of the weights that decode latents."""
        if "vae" not in self._hashes:
            self._hashes["vae"] = model_hash(self.folder, "vae")
        return self._hashes["vae"]

    def pixels_hash(self, tile: int | None, entry: str | None = None) -> str:
        """Identity of what makes pixels of latents, and with an `entry` what a level starts from of those: weights,
        dtype, and tiles, which are blended."""
        weights = model_hash(self.folder, "vae", entry) if entry else self.vae_hash
        return f"{weights} {decode_dtype(self.preset.decode_dtype)}" + (f" {tile}" if tile else "")

    def transformer(self, stage: str, offload: Offload, console: Console, second: bool = False) -> Any:
        """The model with the adapter of stage `proxy` or `detail`, on the compute device as far as `offload` says;
        of the proxy's two experts, if it has two, the `second` on demand."""
        part, adapter = self._weights(stage)[-1 if second else 0]
        key = "transformer", part, adapter or "", offload
        if key not in self._parts:
            self._make_room("transformer")
            self._parts[key] = self._load(part, adapter, stage, offload, console)
        if adapter is None and self._is_new(stage):
            console.warn(UNTRAINED[stage].format(preset=self.preset.name))
        return self._parts[key]

    def detail_models(self, offload: Offload, console: Console) -> tuple[Any, Any]:
        """(detail stream, proxy stream): one model where the adapter acts on both, or where there is none."""
        proxy_stream = self.transformer("detail", offload, console)
        if self.preset.detail.streams == "both" or self.preset.detail.lora is None:
            return proxy_stream, proxy_stream
        return self.without_adapter("detail", offload, console), proxy_stream

    def without_adapter(self, stage: str, offload: Offload, console: Console) -> Any:
        """The model of a stage without its adapter but with what `--lora` adds, beside the one that `transformer` gave
        until they make room. ValueError for a stage of two experts."""
        [(part, _)] = self._weights(stage)
        key = "bare transformer", part, offload
        if key not in self._parts:
            self._parts[key] = self._load(part, None, stage, offload, console)
        return self._parts[key]

    def _load(self, part: str, adapter: str | None, stage: str, offload: Offload, console: Console) -> Any:
        model = load_transformer(self.folder, adapter, stage, self.dtype, part)
        for lora in self.loras:
            if lora.expert not in (None, "low" if part == "transformer_2" else "high"):
                continue
            if self.preset.experts and lora.expert is None and self._is_new(f"{lora.path} of both"):
                console.note(f"{lora.path} changes both experts; one of a pair ends in @high or @low")
            is_new = self._is_new(f"{lora.path} {lora.expert} {part} {stage}")  # a stage may have two models
            matched = merge_lora(model, lora, self.strict, console.warn if is_new else lambda text: None)
            if is_new:
                console.note(f"{lora.path}: {matched} layers changed in the {stage} stage")
        return place(narrow(model, self.weight_dtype), self.device, offload)

    def vae(self) -> Any:
        key = ("vae",)
        if key not in self._parts:
            self._make_room("vae")
            dtype, vae = decode_dtype(self.preset.decode_dtype), self.preset.vae
            self._parts[key] = load_vae(self.folder, dtype, vae.still, vae.idle).to(self.device)
        return self._parts[key]

    def half_encoder(self, entry: str) -> HalfEncoder:
        """The VAE's encoder for frames half as large, by the first level in the file `entry` of the model's folder."""
        return load_half_encoder(self.folder, entry, self.vae())

    def expect(self, prompts: Iterable[str]) -> None:
        """Prompts that `embeddings` will be asked for later, so that one loading of the text encoder serves all."""
        self._expected |= dict.fromkeys(prompts)

    def embeddings(self, prompts: tuple[str, ...], console: Console) -> list[torch.Tensor]:
        """Embeddings (tokens, text_dim) fp32 of prompts: from the cache, or made together with those expected."""
        found = {p: embedding for p in prompts if (embedding := self._kept(p))}
        if not all(p in found for p in prompts):
            missing = [p for p in dict.fromkeys((*prompts, *self._expected)) if self._kept(p) is None]
            for prompt, made in zip(missing, self.encode(missing, console), strict=True):
                self._keep(prompt, made, console)
                found[prompt] = made
        known = [found[p] for p in prompts]
        self.tell_ignored(known, console)
        return [embedding.states for embedding in known]

    def tell_ignored(self, known: list[Embedding], console: Console) -> None:
        """Warns, once, of words that the model does not know and of what is longer than it reads."""
        for word in dict.fromkeys(word for embedding in known for word in embedding.unknown):
            if self._is_new(f"word {word}"):
                console.warn(f"the model of preset {self.preset.name} does not know the word {word!r} and ignores it")
        for text in dict.fromkeys(embedding.left_out for embedding in known if embedding.left_out):
            if self._is_new(f"text {text}"):
                length, begins = self.preset.transformer.text_length, " ".join(text.split()[:6])
                console.warn(f"a prompt is longer than the {length} tokens that are read; left out from {begins!r} on")

    def _is_new(self, subject: str) -> bool:
        """Whether this is the first time that there is something to say of a subject; a batch hears it once."""
        is_new = subject not in self._told
        self._told.add(subject)
        return is_new

    @cached_property
    def _cache(self) -> EmbeddingCache:
        """Read for the first prompt: its name takes the text encoder's hash, of gigabytes that `decode` never needs."""
        return EmbeddingCache(self._cache_folder / self.text_name)

    @property
    def text_name(self) -> str:
        """Names a cache of embeddings by all that decides their values: the encoder, its dtype and how far it reads."""
        encoder, read = model_hash(self.folder, "text_encoder"), self.preset.transformer.text_length
        return f"text-{encoder}-{self._text_device.type}-{read}"

    @cached_property
    def _text_device(self) -> torch.device:
        """Where prompts are encoded: a GPU without room leaves it to the CPU, in fp32."""
        return self.device if encodes_text(self.preset, compute_device()) else torch.device("cpu")

    def _kept(self, prompt: str) -> Embedding | None:
        return self._embeddings.get(prompt) or self._cache.read(prompt)

    def _keep(self, prompt: str, embedding: Embedding, console: Console) -> None:
        """In the cache, or where that cannot be written in memory."""
        try:
            self._cache.write(prompt, embedding)
        except ResourceError as error:
            self._embeddings[prompt] = embedding
            if self._is_new("cache"):
                console.note(f"{error}; embeddings are not kept")

    def encode(self, prompts: list[str], console: Console) -> Iterator[Embedding]:
        """What the text encoder makes of prompts, one by one, so that an interruption loses none that was kept. It is
        loaded for them, which is a step of its stage, and let go."""
        self._make_room("text")
        where, length = self._text_device, self.preset.transformer.text_length
        with console.stage("text", 1 + len(prompts)) as advance:
            tokenizer, encoder = load_text(self.folder, torch.float32 if where.type == "cpu" else self.dtype)
            encoder = encoder.to(where)
            advance()
            for prompt in prompts:
                [states] = encode_prompts([prompt], tokenizer, encoder, length)
                rest = left_out(prompt, tokenizer, length)
                advance()
                yield Embedding(states.cpu(), tuple(unknown_words(prompt, tokenizer)), rest)

    def _weights(self, stage: str) -> list[tuple[str, str | None]]:
        """The folders of the weights that work in a stage, each with its adapter: of two experts both in the proxy, and
        in the detail the second alone."""
        preset, experts = self.preset, self.preset.experts
        if stage == "detail":
            return [("transformer_2" if experts else "transformer", preset.detail.lora)]
        return [("transformer", preset.proxy.lora), *([("transformer_2", experts.lora)] if experts else [])]

    def _make_room(self, kind: str) -> None:
        """Lets go of what a `kind` of part replaces and of a second model, unless they are small, and on a GPU of
        everything: 4K leaves no room for another stage's."""
        on_gpu, size = self.device.type == "cuda", model_bytes(self.preset, compute_device())
        for key in list(self._parts):
            if on_gpu or (key[0] in (kind, "bare transformer") and size > SMALL):
                del self._parts[key]
        if on_gpu:
            release_gpu()
