"""LoRAs that users bring, merged into the weights, in the key layouts that are about.

diffusers (`transformer.blocks.0.attn1.to_q.lora_A.weight`), peft (`base_model.model.` before it), ComfyUI and Kijai
(`diffusion_model.blocks.0.self_attn.q.lora_down.weight`), musubi (`lora_unet_blocks_0_self_attn_q.lora_down.weight`).
diffusers' own loader wants full sets of keys and drops those that it does not know; here every key is accounted for.
A factor's scale is in the file's tensors, else what diffusers' header or peft's config beside the file says.
"""

import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from .errors import InputError
from .parse import Lora

PREFIXES = (
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "lora_unet__",  # VideoX-Fun's
    "lora_unet_",
)
# What a key says of its layer: the two factors of a low-rank change, its bias's beside them, their scale, or the whole
# change of weight, bias or modulation.
ROLES = {
    ".lora_A.weight": "down",
    ".lora_A.default.weight": "down",
    ".lora_down.weight": "down",
    ".lora_B.weight": "up",
    ".lora_B.default.weight": "up",
    ".lora_up.weight": "up",
    ".lora_B.bias": "up bias",
    ".alpha": "alpha",
    ".diff": "weight",
    ".diff_b": "bias",
    ".diff_m": "modulation",
    ".modulation.diff": "modulation",
}
MODULATION = "scale_shift_table"
# keys of changes that are more than a product of two factors: DoRA's magnitudes, Tucker's core
MORE = (".dora_scale", ".lora_magnitude_vector", ".lora_magnitude_vector.weight", ".lora_mid.weight")
# diffusers' names of Wan's layers -> those of the original checkpoints
ORIGINAL = (
    ("attn1", "self_attn"),
    ("attn2", "cross_attn"),
    ("to_out.0", "o"),
    ("to_q", "q"),
    ("to_k", "k"),
    ("to_v", "v"),
    ("ffn.net.0.proj", "ffn.0"),
    ("ffn.net.2", "ffn.2"),
    ("norm2", "norm3"),
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("condition_embedder.time_proj", "time_projection.1"),
    ("proj_out", "head.head"),
)


def check_lora(path: Path) -> None:
    """Raises InputError, from the header alone, for a file that is no LoRA in safetensors."""
    try:
        with safe_open(path, "pt") as file:
            keys = list(file.keys())
    except (OSError, SafetensorError):
        raise InputError(f"{path} cannot be read as safetensors; give --lora a .safetensors file") from None
    if not any(k.endswith(tuple(ROLES)) for k in keys):
        raise InputError(f"{path} holds no LoRA (no lora_A, lora_down or diff keys); give --lora another file")
    if more := next((k for k in keys if k.replace(".default", "").endswith(MORE)), None):
        raise InputError(f"{path} is a DoRA or a Tucker LoRA ({more}), which cannot be merged; give --lora a plain one")


def merge_lora(model: WanTransformer3DModel, lora: Lora, strict: bool, warn: Callable[[str], None]) -> int:
    """Adds `weight * alpha / rank * up @ down` to each layer that the file names; returns how many layers matched.

    Keys without a layer of theirs, and layers of another shape, are named in a warning, or with `strict` in an
    InputError, as is a file of which nothing matches. A `model` on the meta device only checks.
    """
    layers, config = layers_by_name(model), _config(lora.path)
    changes: dict[str, dict[str, torch.Tensor]] = {}
    unmatched = []
    for key, tensor in load_file(lora.path).items():
        name, role = _split(key)
        if role and name in layers:
            changes.setdefault(name, {})[role] = tensor
        else:
            unmatched.append(key)
    for name in [name for name, change in changes.items() if not _fits(layers[name], change)]:
        unmatched += [f"{name} ({role})" for role in changes.pop(name)]
    if unmatched:
        message = f"{lora.path}: {len(unmatched)} keys fit no layer ({_some(unmatched)})"
        if strict or not changes:
            raise InputError(f"{message}; give a LoRA that was made for this model")
        warn(f"{message} and are left out")
    for name, change in changes.items():
        _apply(layers[name], change, lora, name, config)
    return sum(change.keys() != {"alpha"} for change in changes.values())


def layers_by_name(model: WanTransformer3DModel) -> dict[str, Any]:
    """Every layer with a weight or a modulation, by each name that LoRA files use for it."""
    layers: dict[str, Any] = {"head": model}
    for name, module in model.named_modules():
        if any(isinstance(getattr(module, own, None), torch.nn.Parameter) for own in ("weight", MODULATION)):
            original = name
            for ours, theirs in ORIGINAL:
                original = original.replace(ours, theirs)
            for spelling in (name, original):
                layers[spelling] = layers[spelling.replace(".", "_")] = module
    return layers


def config_beside(path: Path) -> Path | None:
    """peft's config of the adapter in `path`, where there is one."""
    beside = path.with_name("adapter_config.json")
    return beside if path.name == "adapter_model.safetensors" and beside.is_file() else None


def _config(path: Path) -> dict[str, Any]:
    """What diffusers writes into a LoRA's header, or peft beside it, of its scales; empty where neither did."""
    beside = config_beside(path)
    try:
        with safe_open(path, "pt") as file:
            said = (file.metadata() or {}).get("lora_adapter_metadata", "{}")
        if said == "{}" and beside:
            said = beside.read_text(encoding="utf-8")
        return {key.removeprefix("transformer."): value for key, value in json.loads(said).items()}
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"what {path} says of its alpha cannot be read ({error}); fetch the file again") from None


def _scale(config: dict[str, Any], name: str, rank: int) -> float:
    """The scale that a config gives the factors of a layer (peft's `lora_alpha`, `alpha_pattern`, `use_rslora`)."""
    patterns = config.get("alpha_pattern") or {}
    try:
        matching = (alpha for pattern, alpha in patterns.items() if re.match(rf"(.*\.)?({pattern})$", name))
        alpha = next(matching, config.get("lora_alpha"))
        return 1.0 if alpha is None else alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    except (TypeError, AttributeError, re.error):  # no numbers, no patterns
        return math.nan


def _split(key: str) -> tuple[str, str | None]:
    """A key's layer, without the layout's prefixes, and its role."""
    ending = next((e for e in sorted(ROLES, key=len, reverse=True) if key.endswith(e)), None)
    if ending is None:
        return key, None
    name = key.removesuffix(ending)
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name, ROLES[ending]


def _fits(layer: Any, change: dict[str, torch.Tensor]) -> bool:
    """Whether a change has as many values as what it changes; that its factors fit each other is `_apply`'s matter."""
    sizes = {role: tensor.numel() for role, tensor in change.items()}
    down, up = change.get("down"), change.get("up")
    if down is not None and up is not None and min(down.ndim, up.ndim) > 1:
        sizes["product"] = len(up) * down[0].numel()
    parameters = {
        "product": "weight",
        "up bias": "bias",
        "weight": "weight",
        "bias": "bias",
        "modulation": MODULATION,
    }
    own = {role: getattr(layer, parameters[role], None) for role in parameters.keys() & sizes.keys()}
    return all(parameter is not None and parameter.numel() == sizes[role] for role, parameter in own.items())


@torch.no_grad()
def _apply(layer: Any, change: dict[str, torch.Tensor], lora: Lora, name: str, config: dict[str, Any]) -> None:
    device = next(layer.parameters()).device
    change = {role: tensor if role == "alpha" else tensor.to(device) for role, tensor in change.items()}

    def own(parameter: str) -> torch.Tensor | None:
        return getattr(layer, parameter, None)

    def add(parameter: torch.Tensor | None, delta: torch.Tensor) -> None:
        assert parameter is not None  # it fits
        parameter.copy_(parameter.float() + lora.weight * delta.float().view_as(parameter))

    halves = {"down", "up", "up bias"} & change.keys()
    if halves and not {"down", "up"} <= halves:
        raise InputError(f"{lora.path} has half a LoRA for layer {name}; fetch the file again")
    if "down" in change:
        down, up = (change[part].float().flatten(min(1, change[part].ndim - 1)) for part in ("down", "up"))
        rank, alpha = max(1, len(down)), change.get("alpha")
        scale = _scale(config, name, rank) if alpha is None else alpha.item() / rank if alpha.numel() == 1 else math.nan
        if down.ndim != 2 or up.ndim != 2 or up.shape[1] != len(down) or not math.isfinite(scale):
            raise InputError(f"{lora.path} has factors that do not fit each other for layer {name}; fetch it again")
        add(own("weight"), scale * up @ down)
        if "up bias" in change:
            add(own("bias"), scale * change["up bias"])
    for role, parameter in (("weight", "weight"), ("bias", "bias"), ("modulation", MODULATION)):
        if role in change:
            add(own(parameter), change[role])


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
