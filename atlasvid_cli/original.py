"""Wan's original checkpoints, as its authors publish them, read as the parts of a diffusers folder.

Wan2.1 T2V: `diffusion_pytorch_model*.safetensors` beside `config.json`, `Wan2.1_VAE.pth`, UMT5 in
`models_t5_umt5-xxl-enc-bf16.pth` and its tokenizer in `google/umt5-xxl/`. Wan2.2 T2V-A14B has its two transformers in
`high_noise_model/` and `low_noise_model/`. The VAE of Wan2.2 5B has another structure, for which there is no converter.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers, convert_wan_vae_to_diffusers
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import UMT5Config, UMT5EncoderModel

VAE, TEXT, TOKENIZER = "Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth", "google/umt5-xxl"
EXPERTS = {"transformer": "high_noise_model", "transformer_2": "low_noise_model"}
PARTS = ("vae", "text_encoder", *EXPERTS)
LIST_OF_FILES = ["*.json", "*.safetensors", "*.model", VAE, TEXT]  # all that a folder of either layout needs

# what a layer of UMT5 is called by Wan -> by transformers
TEXT_NAMES = (
    (r"^token_embedding\.", "shared."),
    (r"^norm\.", "encoder.final_layer_norm."),
    (r"^blocks\.(\d+)\.norm1\.", r"encoder.block.\1.layer.0.layer_norm."),
    (r"^blocks\.(\d+)\.attn\.", r"encoder.block.\1.layer.0.SelfAttention."),
    (r"^blocks\.(\d+)\.pos_embedding\.embedding\.", r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias."),
    (r"^blocks\.(\d+)\.norm2\.", r"encoder.block.\1.layer.1.layer_norm."),
    (r"^blocks\.(\d+)\.ffn\.gate\.0\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_0."),
    (r"^blocks\.(\d+)\.ffn\.fc1\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_1."),
    (r"^blocks\.(\d+)\.ffn\.fc2\.", r"encoder.block.\1.layer.1.DenseReluDense.wo."),
)


def is_original(folder: Path) -> bool:
    return (folder / VAE).is_file()


def files(folder: Path, part: str) -> list[Path]:
    """The files that hold the weights of a part, named as diffusers names it."""
    if part in ("vae", "text_encoder"):
        return [folder / (VAE if part == "vae" else TEXT)]
    return sorted(_home(folder, part).glob("*.safetensors"))


def config(folder: Path, part: str) -> dict[str, Any]:
    """diffusers' config of the `vae` or of a transformer. OSError and ValueError where it cannot be read."""
    if part == "vae":
        weights = _pickled(folder / VAE)
        return {
            "base_dim": len(weights["encoder.conv1.weight"]),
            "z_dim": len(weights["conv2.weight"]),
            "dim_mult": [1, 2, 4, 4],
            "num_res_blocks": 2,
            "temperal_downsample": [False, True, True],
        }
    home = _home(folder, part)
    said = json.loads((home / "config.json").read_text(encoding="utf-8"))
    return {
        "num_attention_heads": said["num_heads"],
        "attention_head_dim": said["dim"] // said["num_heads"],
        "in_channels": said["in_dim"],
        "out_channels": said["out_dim"],
        "text_dim": _shape(files(folder, part), "text_embedding.0.weight")[1],
        "freq_dim": said["freq_dim"],
        "ffn_dim": said["ffn_dim"],
        "num_layers": said["num_layers"],
        "eps": said["eps"],
    }


def load(kind: Any, folder: Path, part: str, dtype: torch.dtype) -> tuple[Any, dict[str, list[str]]]:
    """A diffusers model of `kind` with a part's weights, and which keys are missing, unexpected and mismatched."""
    if part == "vae":
        state = convert_wan_vae_to_diffusers(_pickled(folder / VAE))
    else:
        state = {k: v for file in files(folder, part) for k, v in load_file(file).items()}
        state = convert_wan_transformer_to_diffusers(state)
    with init_empty_weights():
        model = kind.from_config(config(folder, part))
    wanted = model.state_dict()
    found = {
        "missing_keys": [k for k in wanted if k not in state],
        "unexpected_keys": [k for k in state if k not in wanted],
        "mismatched_keys": [k for k in wanted if k in state and wanted[k].shape != state[k].shape],
    }
    if not any(found.values()):
        kept = model._keep_in_fp32_modules or []
        for name, value in state.items():
            state[name] = value.to(torch.float32 if any(k in name.split(".") for k in kept) else dtype)
        model.load_state_dict(state, assign=True)
    return model, found


def load_text(folder: Path, dtype: torch.dtype) -> UMT5EncoderModel:
    """UMT5's encoder; its sizes are those of its weights. KeyError or RuntimeError name what is missing."""
    weights = _pickled(folder / TEXT)
    heads = weights["blocks.0.pos_embedding.embedding.weight"].shape[1]
    sizes = UMT5Config(
        vocab_size=len(weights["token_embedding.weight"]),
        d_model=weights["token_embedding.weight"].shape[1],
        d_kv=len(weights["blocks.0.attn.q.weight"]) // heads,
        d_ff=len(weights["blocks.0.ffn.fc1.weight"]),
        num_layers=1 + max(int(k.split(".")[1]) for k in weights if k.startswith("blocks.")),
        num_heads=heads,
        relative_attention_num_buckets=len(weights["blocks.0.pos_embedding.embedding.weight"]),
        feed_forward_proj="gated-gelu",
    )
    with init_empty_weights():
        model = UMT5EncoderModel(sizes)
    state = {}
    for name, value in weights.items():
        for theirs, ours in TEXT_NAMES:
            name = re.sub(theirs, ours, name)
        state[name] = value.to(dtype)
    state["encoder.embed_tokens.weight"] = state["shared.weight"]
    model.load_state_dict(state, assign=True)
    return model


def _home(folder: Path, part: str) -> Path:
    """Where the weights and the config of a transformer lie."""
    expert = folder / EXPERTS.get(part, "")
    return expert if expert.is_dir() else folder


def _pickled(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a `.pth` file, mapped and not read; no other object is made from it."""
    return torch.load(path, map_location="cpu", mmap=True, weights_only=True)


def _shape(paths: list[Path], name: str) -> list[int]:
    for path in paths:
        with safe_open(path, "pt") as file:
            if name in file.keys():  # noqa: SIM118
                return file.get_slice(name).get_shape()
    raise ValueError(f"there is no {name}")
