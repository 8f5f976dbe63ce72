"""Loads the parts of a diffusers model folder, in fp32, each alone; adapters are merged into their own copy."""

import hashlib
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from safetensors import safe_open
from transformers import AutoTokenizer, PreTrainedTokenizerBase, UMT5EncoderModel
from transformers.utils.logging import disable_progress_bar

from .errors import InputError
from .presets import Preset

disable_progress_bar()  # ours are the only bars on stderr


def model_folder(preset: Preset, model_path: str | None) -> Path:
    """The folder that holds the weights; raises InputError where it is not a diffusers folder."""
    folder = Path(model_path) if model_path else preset.folder
    if not (folder / "model_index.json").is_file():
        raise InputError(f"{folder} is not a diffusers model folder (no model_index.json); give one with --model-path")
    return folder


def model_hash(folder: Path, *names: str | None) -> str:
    """sha256 over the named weights (16 hex digits): what saved latents are bound to."""
    digest = hashlib.sha256()
    for name in filter(None, names):
        path = folder / name
        files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        for file in files:
            if not file.is_file():
                raise InputError(f"{file} does not exist: mend the preset's lora, or give another --model-path")
            with file.open("rb") as data:
                digest.update(hashlib.file_digest(data, "sha256").digest())
    return digest.hexdigest()[:16]


def check_config(folder: Path, preset: Preset) -> None:
    """Raises InputError where the transformer in `folder` is not the one that the preset plans with."""
    try:
        config = json.loads((folder / "transformer" / "config.json").read_text(encoding="utf-8"))
        found = {
            "dim": config["num_attention_heads"] * config["attention_head_dim"],
            "ffn": config["ffn_dim"],
            "layers": config["num_layers"],
            "heads": config["num_attention_heads"],
            "channels": config["in_channels"],
        }
    except (OSError, ValueError, KeyError):
        raise InputError(f"{folder} holds no readable transformer/config.json; give a diffusers model folder") from None
    for name, value in found.items():
        if value != getattr(preset.transformer, name):
            expected = getattr(preset.transformer, name)
            raise InputError(f"{folder} has {name} = {value} and preset {preset.name} says {expected}; use its preset")


def check_adapter(folder: Path, lora: str, stage: str) -> None:
    """Raises InputError for an adapter that says it belongs to another stage or another base."""
    with safe_open(folder / lora, "pt") as file:
        metadata = file.metadata() or {}
    for name, found in (("stage", stage), ("base", model_hash(folder, "transformer"))):
        if metadata.get(name, found) != found:
            raise InputError(
                f"{folder / lora} was trained for {name} {metadata[name]} and this is {name} {found};"
                f" give the preset's {stage} stage the adapter that was trained for it"
            )


def load_transformer(folder: Path, lora: str | None = None, stage: str = "") -> WanTransformer3DModel:
    """The transformer, with the adapter `lora` of a stage (a file in the folder) merged into this copy of the weights.

    InputError where the adapter says that it is for another stage or base.
    """
    if lora:
        check_adapter(folder, lora, stage)
    model = WanTransformer3DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float32)
    if lora:
        model.load_lora_adapter(folder / lora, prefix="transformer")
        model.fuse_lora()
        model.unload_lora()
    return model.eval().requires_grad_(False)


def load_vae(folder: Path) -> AutoencoderKLWan:
    vae = AutoencoderKLWan.from_pretrained(folder / "vae", torch_dtype=torch.float32)
    return vae.eval().requires_grad_(False)


def load_text(folder: Path) -> tuple[PreTrainedTokenizerBase, UMT5EncoderModel]:
    encoder = UMT5EncoderModel.from_pretrained(folder / "text_encoder", torch_dtype=torch.float32)
    return AutoTokenizer.from_pretrained(folder / "tokenizer"), encoder.eval().requires_grad_(False)


def load_scheduler(folder: Path, flow_shift: float) -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler.from_pretrained(folder / "scheduler", flow_shift=flow_shift)
