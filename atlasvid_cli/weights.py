"""Loads the parts of a model folder, each alone; adapters are merged into their own copy of the weights.

A folder is in diffusers' layout, or one of Wan's original checkpoints (`original`). A file in it (an adapter, an entry)
may be named by an absolute path instead: it then lies beside the preset.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer, PreTrainedTokenizerBase, UMT5EncoderModel
from transformers.utils.logging import disable_progress_bar

from . import original
from .causal import is_idle, is_still, last_blocks, near_pixels
from .digests import file_digest
from .errors import InputError, one_line
from .half import HalfEncoder
from .lora import merge_lora
from .parse import Lora
from .presets import Preset, Sampler
from .tensor_file import check_header, open_tensors, read_header

Read = Callable[[Path, str], dict[str, Any]]  # gives the config of a folder's part
# what reading damaged weights raises
UNREADABLE = (OSError, ValueError, KeyError, RuntimeError, UnpicklingError, SafetensorError)

# ours are the only bars on stderr
disable_progress_bar()
diffusers_logging.disable_progress_bar()


def model_hash(folder: Path, *names: str | None) -> str:
    """sha256 over the named weights (16 hex digits): what saved latents are bound to."""
    digest = hashlib.sha256()
    for file in weight_files(folder, *names):
        digest.update(bytes.fromhex(file_digest(file)))
    return digest.hexdigest()[:16]


def weight_files(folder: Path, *names: str | None) -> Iterator[Path]:
    """The files of the named weights, in their order. Raises InputError where there are none."""
    for name in filter(None, names):
        path = folder / name
        if name in original.PARTS and original.is_original(folder):
            files = original.files(folder, name)
        else:
            files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        if not files:
            raise InputError(f"{path} holds no safetensors: convert its weights, or give another --model-path")
        for file in files:
            if not file.is_file():
                raise InputError(f"{file} does not exist: mend its name in the preset, or give another --model-path")
            yield file


def check_config(folder: Path, preset: Preset, only: Literal["vae"] | None = None) -> None:
    """Raises InputError where the transformer or VAE in `folder`, or the VAE where `only` that is needed, is not the
    one that the preset plans with."""
    if not only:
        check_transformers(folder, preset, _reader(folder))
    config = _config(folder, "vae")
    factors = {"temporal": ("scale_factor_temporal", 4), "spatial": ("scale_factor_spatial", 8)}
    found = {name: config.get(key, default) for name, (key, default) in factors.items()}
    _check_same("vae", found, preset.geometry, folder, preset)
    defaults = {"is_residual": False, "out_channels": 3, "patch_size": None}
    found = {f.name: config.get(f.name, defaults.get(f.name)) for f in dataclasses.fields(preset.vae)}
    del found["still"], found["idle"]  # the weights say that (`load_vae`)
    found["decoder_base_dim"] = found["decoder_base_dim"] or found["base_dim"]
    wanted = dataclasses.replace(preset.vae, decoder_base_dim=preset.vae.decoder_base_dim or preset.vae.base_dim)
    _check_same("vae", found, wanted, folder, preset)


def check_transformers(folder: Path, preset: Preset, read: Read) -> None:
    """`check_config` of the transformers alone, as far as `read` tells of them."""
    if not preset.experts and ((folder / "transformer_2").is_dir() or original.has_experts(folder)):
        raise InputError(
            f"the model in {folder} has two experts, and preset {preset.name} knows of one transformer; choose another"
            " --preset or another --model-path"
        )
    for part in ("transformer", "transformer_2") if preset.experts else ("transformer",):
        config = _config(folder, part, read)
        heads = config.get("num_attention_heads", 0)
        found = {
            "dim": heads * config.get("attention_head_dim", 0),
            "ffn": config.get("ffn_dim"),
            "layers": config.get("num_layers"),
            "heads": heads,
            "channels": config.get("in_channels"),
            "text_dim": config.get("text_dim", preset.transformer.text_dim),
        }
        _check_same(part, found, preset.transformer, folder, preset)
        patch = config.get("patch_size", (1, 2, 2))
        _check_same(part, {"patch": patch[-1]}, preset.geometry, folder, preset)


def _reader(folder: Path) -> Read:
    return original.config if original.is_original(folder) else _diffusers_config


def _diffusers_config(folder: Path, part: str) -> dict[str, Any]:
    return json.loads((folder / part / "config.json").read_text(encoding="utf-8"))


def _config(folder: Path, part: str, read: Read | None = None) -> dict[str, Any]:
    try:
        return (read or _reader(folder))(folder, part)
    except UNREADABLE as error:
        raise InputError(
            f"the config of the {part} in {folder} cannot be read ({one_line(str(error))}); give another --model-path"
        ) from None


def _check_same(part: str, found: dict[str, Any], wanted: Any, folder: Path, preset: Preset) -> None:
    for name, value in found.items():
        expected = getattr(wanted, name)
        if (tuple(value) if isinstance(value, list) else value) != expected:
            raise InputError(
                f"the {part} in {folder} has {name} = {value} and preset {preset.name} says {expected}; use its preset"
            )


def check_adapter(
    folder: Path,
    lora: str,
    stage: str,
    part: str | None = "transformer",
    trained_for: Mapping[str, str] | None = None,
    ratio: Fraction | None = None,
) -> None:
    """Raises InputError for an adapter that says it belongs to another stage or another base, the one in `part` (whose
    weights are read, if it is given), that it was trained otherwise than `trained_for` says (`train.adapter_metadata`),
    or for no ratio r_s as large as `ratio`."""
    try:
        with safe_open(folder / lora, "pt") as file:
            metadata = file.metadata() or {}
        if metadata.get("stage") == "proxy":
            metadata = {"position_scale": "1.0"} | metadata  # of ours that are older
    except UNREADABLE as error:
        raise InputError(
            f"the adapter {folder / lora} cannot be read ({one_line(str(error))}); make it again"
        ) from None
    expected = {"stage": stage, **(trained_for or {})}
    if part and "base" in metadata:
        expected["base"] = model_hash(folder, part)
    for name, found in expected.items():
        if metadata.get(name, found) != found:
            raise InputError(
                f"{folder / lora} was trained for {name} {metadata[name]} and this is {name} {found};"
                f" give the preset's {stage} stage the adapter that was trained for it"
            )
    try:
        largest = max(Fraction(each) for each in metadata["ratio"].split(",")) if "ratio" in metadata else None
    except (ValueError, ZeroDivisionError):
        raise InputError(
            f"the adapter {folder / lora} says that its ratio is {metadata['ratio']!r}, which are no numbers; make it"
            " again"
        ) from None
    if ratio is not None and largest is not None and ratio > largest:
        raise InputError(
            f"{folder / lora} was trained for ratios up to {float(largest):g} and this preset climbs by up to"
            f" {float(ratio):g}; set max_ratio = {float(largest):g} in the preset's [detail]"
        )


def load_transformer(
    folder: Path,
    lora: str | None = None,
    stage: str = "",
    dtype: torch.dtype = torch.float32,
    part: str = "transformer",
) -> WanTransformer3DModel:
    """The transformer in `part`, with the adapter `lora` of a stage (a file in the folder) merged into this copy.

    InputError where the adapter says that it is for another stage or base, or where weights are missing or unknown.
    """
    if lora:
        check_adapter(folder, lora, stage, part)
    model = _load(WanTransformer3DModel, folder, part, dtype)
    if lora:
        merge_adapter(model, folder, lora)
    return model


def merge_adapter(model: WanTransformer3DModel, folder: Path, lora: str) -> None:
    """Merges the adapter `lora` in `folder`, in any layout that `merge_lora` knows; every key must fit."""
    merge_lora(model, Lora(folder / lora), strict=True, warn=lambda text: None)


def load_skeleton(folder: Path) -> WanTransformer3DModel:
    """The transformer's layers on the meta device: shapes without weights."""
    with torch.device("meta"):
        return WanTransformer3DModel.from_config(_config(folder, "transformer"))


def load_vae(folder: Path, dtype: torch.dtype = torch.float32, still: int = 0, idle: int = 0) -> AutoencoderKLWan:
    """The VAE. Raises InputError where it looks at the past in the `still` levels that are said not to, or works in
    the `idle` blocks."""
    vae = _load(AutoencoderKLWan, folder, "vae", dtype)
    if not all(map(is_still, near_pixels(vae, still))):
        raise InputError(
            f"the vae in {folder} looks at past frames in the {still} levels that the preset calls still;"
            " leave `still` out in a preset of your own, or give another --model-path"
        )
    if not all(map(is_idle, last_blocks(vae, idle))):
        raise InputError(
            f"the vae in {folder} works in the {idle} blocks that the preset calls idle;"
            " leave `idle` out in a preset of your own, or give another --model-path"
        )
    return vae


def check_entry(folder: Path, entry: str, identified: bool = True) -> None:
    """Raises InputError where the file `entry` in `folder` is not there, or is no first level for the VAE's encoder
    (`half`), whose weights are read for it where they are `identified`."""
    path, remedy = folder / entry, "leave `entry` out in a preset of your own, or give another --model-path"
    if not path.is_file():
        raise InputError(f"{path} does not exist; {remedy}")
    metadata, _ = read_header(path)
    if metadata.get("stage") != "entry" or (identified and metadata.get("base") != model_hash(folder, "vae")):
        raise InputError(f"{path} is no first level for the vae in {folder}; {remedy}")
    with torch.device("meta"):
        vae = AutoencoderKLWan.from_config(_config(folder, "vae"))
        check_header(path, _entries(HalfEncoder(vae.encoder)))


def load_half_encoder(folder: Path, entry: str, vae: AutoencoderKLWan) -> HalfEncoder:
    """The encoder for frames half as large of a VAE from `folder`, by the first level in the file `entry` there
    (`check_entry`)."""
    encoder = HalfEncoder(vae.encoder)
    tensors, _ = open_tensors(folder / entry, _entries(encoder))
    for name, parameter in encoder.own().items():
        parameter.data.copy_(tensors[name])
    return encoder.requires_grad_(False)


def _entries(encoder: HalfEncoder) -> dict[str, tuple[str, tuple[int, ...] | None]]:
    return {name: ("F16", tuple(parameter.shape)) for name, parameter in encoder.own().items()}


def load_text(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedTokenizerBase, UMT5EncoderModel]:
    try:
        if original.is_original(folder):
            encoder, tokenizer = original.load_text(folder, dtype), folder / original.TOKENIZER
        else:
            encoder, tokenizer = _load(UMT5EncoderModel, folder, "text_encoder", dtype), folder / "tokenizer"
        return AutoTokenizer.from_pretrained(tokenizer), encoder.eval().requires_grad_(False)
    except UNREADABLE as error:
        raise InputError(
            f"the text encoder or tokenizer in {folder} cannot be read ({one_line(str(error))}); fetch it again"
        ) from None


def load_scheduler(folder: Path, flow_shift: float, sampler: Sampler) -> UniPCMultistepScheduler:
    """The model's own scheduler with a shift; of another class only what UniPC shares with it. `euler` is UniPC of the
    first order without its corrector, on flow sigmas x - (sigma - next sigma) v exactly."""
    settings: dict[str, Any] = {"flow_shift": flow_shift, "prediction_type": "flow_prediction", "use_flow_sigmas": True}
    if sampler == "euler":
        settings |= {"solver_order": 1, "disable_corrector": list(range(1000))}
    if original.is_original(folder):  # what diffusers' converted repositories say
        return UniPCMultistepScheduler(**settings)
    try:
        return UniPCMultistepScheduler.from_pretrained(folder / "scheduler", **settings)
    except UNREADABLE as error:
        raise InputError(
            f"the scheduler in {folder} cannot be read ({one_line(str(error))}); give another --model-path"
        ) from None


def _load(kind: Any, folder: Path, part: str, dtype: torch.dtype) -> Any:
    """A part of a folder, unpickling nothing but tensors; diffusers itself only warns of keys that do not match."""
    try:
        if original.is_original(folder):
            model, found = original.load(kind, folder, part, dtype)
        else:
            model, found = kind.from_pretrained(
                folder / part, torch_dtype=dtype, use_safetensors=True, output_loading_info=True
            )
    except UNREADABLE as error:
        raise InputError(f"the {part} in {folder} cannot be read ({one_line(str(error))}); fetch it again") from None
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := sorted(str(k) for k in found[what]):
            shown = ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
            raise InputError(
                f"the {part} in {folder} has {what.replace('_', ' ')}: {shown}; fetch it again, or use its preset"
            )
    return model.eval().requires_grad_(False)
