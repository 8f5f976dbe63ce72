"""Wan's original checkpoints, as its authors publish them, read as the parts of a diffusers folder.

Wan2.1 T2V: `diffusion_pytorch_model*.safetensors` beside `config.json`, `Wan2.1_VAE.pth`, UMT5 in
`models_t5_umt5-xxl-enc-bf16.pth` and its tokenizer in `google/umt5-xxl/`. Wan2.2 T2V-A14B has its two transformers in
`high_noise_model/` and `low_noise_model/`; Wan2.2 TI2V-5B has a VAE of another structure, `Wan2.2_VAE.pth`.
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

VAE, VAE22 = "Wan2.1_VAE.pth", "Wan2.2_VAE.pth"
TEXT, TOKENIZER = "models_t5_umt5-xxl-enc-bf16.pth", "google/umt5-xxl"
EXPERTS = {"transformer": "high_noise_model", "transformer_2": "low_noise_model"}
PARTS = ("vae", "text_encoder", *EXPERTS)
# what a folder of either layout needs, in all and for its VAE alone
LIST_OF_FILES = ["*.json", "*.safetensors", "*.model", VAE, VAE22, TEXT]
LIST_FOR_VAE = ["*.json", "vae/*.safetensors", VAE, VAE22]

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

# what a layer of Wan2.2's VAE is called by Wan -> by diffusers; a level's resampling is its last layer
VAE22_NAMES = (
    (r"^conv1\.", "quant_conv."),
    (r"^conv2\.", "post_quant_conv."),
    (r"^(en|de)coder\.conv1\.", r"\1coder.conv_in."),
    (r"\.head\.0\.", ".norm_out."),
    (r"\.head\.2\.", ".conv_out."),
    (r"\.middle\.1\.", ".mid_block.attentions.0."),
    (r"\.middle\.0\.", ".mid_block.resnets.0."),
    (r"\.middle\.2\.", ".mid_block.resnets.1."),
    (r"\.(down|up)samples\.(\d+)\.\1samples\.\d+\.(resample|time_conv)\.", r".\1_blocks.\2.\1sampler.\3."),
    (r"\.(down|up)samples\.(\d+)\.\1samples\.(\d+)\.", r".\1_blocks.\2.resnets.\3."),
    (r"\.residual\.0\.", ".norm1."),
    (r"\.residual\.2\.", ".conv1."),
    (r"\.residual\.3\.", ".norm2."),
    (r"\.residual\.6\.", ".conv2."),
    (r"\.shortcut\.", ".conv_shortcut."),
)
# of its latents, a channel each, as its authors state them (wan/modules/vae2_2.py); Wan2.1's are diffusers' defaults
# fmt: off
MEAN22 = [
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
    0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
    -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
]
STD22 = [
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
    0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
    0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
]
# fmt: on


def is_original(folder: Path) -> bool:
    return _vae(folder).is_file()


def has_experts(folder: Path) -> bool:
    return any((folder / name).is_dir() for name in EXPERTS.values())


def files(folder: Path, part: str) -> list[Path]:
    """The files that hold the weights of a part, named as diffusers names it."""
    if part in ("vae", "text_encoder"):
        return [_vae(folder) if part == "vae" else folder / TEXT]
    return sorted(_home(folder, part).glob("*.safetensors"))


def homes(folder: Path) -> list[Path]:
    """The folders of its transformers: both experts' where there is one of them."""
    return [_home(folder, part) for part in (EXPERTS if has_experts(folder) else ("transformer",))]


def is_whole(folder: Path) -> bool:
    """Whether every part has a file at least: VAE, text encoder, tokenizer, and all transformers."""
    own = all(any(home.glob("*.safetensors")) and (home / "config.json").is_file() for home in homes(folder))
    tokenizer = (folder / TOKENIZER).is_dir() and any((folder / TOKENIZER).glob("*.json"))
    return own and tokenizer and all(file.is_file() for part in ("vae", "text_encoder") for file in files(folder, part))


def config(folder: Path, part: str) -> dict[str, Any]:
    """diffusers' config of the `vae` or of a transformer. OSError, ValueError or KeyError where it is not readable."""
    if part == "vae":
        weights = _pickled(_vae(folder))
        found: dict[str, Any] = {
            "base_dim": len(weights["encoder.conv1.weight"]),
            "z_dim": len(weights["conv2.weight"]),
            "dim_mult": [1, 2, 4, 4],
            "num_res_blocks": 2,
            "temperal_downsample": [False, True, True],
        }
        if not _is_22(folder):
            return found
        return found | {
            "decoder_base_dim": len(weights["decoder.conv1.weight"]) // found["dim_mult"][-1],
            "is_residual": True,
            "in_channels": 12,
            "out_channels": 12,
            "patch_size": 2,
            "scale_factor_temporal": 4,
            "scale_factor_spatial": 16,
            "latents_mean": MEAN22,
            "latents_std": STD22,
        }
    return sizes(folder, part) | {"text_dim": _shape(files(folder, part), "text_embedding.0.weight")[1]}


def sizes(folder: Path, part: str) -> dict[str, Any]:
    """What of a transformer's `config` its config.json says: all but `text_dim`, which its weights do."""
    said = json.loads((_home(folder, part) / "config.json").read_text(encoding="utf-8"))
    return {
        "num_attention_heads": said["num_heads"],
        "attention_head_dim": said["dim"] // said["num_heads"],
        "in_channels": said["in_dim"],
        "out_channels": said["out_dim"],
        "freq_dim": said["freq_dim"],
        "ffn_dim": said["ffn_dim"],
        "num_layers": said["num_layers"],
        "eps": said["eps"],
    }


def load(kind: Any, folder: Path, part: str, dtype: torch.dtype) -> tuple[Any, dict[str, list[str]]]:
    """A diffusers model of `kind` with a part's weights, and which keys are missing, unexpected and mismatched."""
    if part == "vae":
        weights = _pickled(_vae(folder))
        state = _renamed(weights, VAE22_NAMES) if _is_22(folder) else convert_wan_vae_to_diffusers(weights)
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
    state = {name: value.to(dtype) for name, value in _renamed(weights, TEXT_NAMES).items()}
    state["encoder.embed_tokens.weight"] = state["shared.weight"]
    model.load_state_dict(state, assign=True)
    return model


def _renamed(weights: dict[str, torch.Tensor], names: tuple[tuple[str, str], ...]) -> dict[str, torch.Tensor]:
    state = {}
    for name, value in weights.items():
        for theirs, ours in names:
            name = re.sub(theirs, ours, name)
        state[name] = value
    return state


def _is_22(folder: Path) -> bool:
    return (folder / VAE22).is_file()


def _vae(folder: Path) -> Path:
    return folder / (VAE22 if _is_22(folder) else VAE)


def _home(folder: Path, part: str) -> Path:
    """Where the weights and the config of a transformer lie: in the folder itself where there is one only."""
    return folder if part == "transformer" and not has_experts(folder) else folder / EXPERTS[part]


def _pickled(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a `.pth` file, mapped and not read; no other object is made from it."""
    return torch.load(path, map_location="cpu", mmap=True, weights_only=True)


def _shape(paths: list[Path], name: str) -> list[int]:
    for path in paths:
        with safe_open(path, "pt") as file:
            if name in file.keys():  # noqa: SIM118
                return file.get_slice(name).get_shape()
    raise ValueError(f"there is no {name}")
