"""Training checkpoints: safetensors and JSON only."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import UMT5EncoderModel

from .errors import InputError, one_line
from .optim import Optimizer
from .store import sync
from .tensor_file import save_tensors


def save_folder(part: AutoencoderKLWan | WanTransformer3DModel | UMT5EncoderModel, path: Path) -> None:
    """`save_pretrained` that leaves no half-written folder, which would count as finished."""
    unfinished = path.with_name(path.name + ".unfinished")
    part.save_pretrained(unfinished)
    for file in (*unfinished.iterdir(), unfinished):
        sync(file)
    unfinished.rename(path)
    sync(path.parent)


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizer: Optimizer,
    step: int,
    average: EMAModel | None = None,
    losses: Sequence[float] = (),
) -> None:
    """Writes trainable weights and their `average`, optimiser state, the step and the `losses` that are not in the log
    yet into `folder/checkpoint.safetensors`.

    Frozen weights are the caller's to make again: the base of an adapter is far larger than the adapter.
    """
    folder.mkdir(parents=True, exist_ok=True)
    trained = [(k, v) for k, v in model.named_parameters() if v.requires_grad]
    tensors: dict[str, torch.Tensor] = {f"model.{k}": v for k, v in trained}
    if average:
        tensors |= {f"average.{k}": v for (k, _), v in zip(trained, average.shadow_params, strict=True)}
    scalars, groups = {}, []
    for i, state in enumerate(optimizer.state_dict()):
        for index, values in state["state"].items():
            for key, value in values.items():
                if torch.is_tensor(value):
                    tensors[f"optimizer.{i}.{index}.{key}"] = value
                else:
                    scalars[f"{i}.{index}.{key}"] = value
        groups.append([{k: v for k, v in g.items() if isinstance(v, int | float)} for g in state["param_groups"]])
    path = folder / "checkpoint.safetensors"
    texts = {"scalars": json.dumps(scalars), "groups": json.dumps(groups), "losses": json.dumps(list(losses))}
    save_tensors(path, tensors, {"step": str(step), **texts})


def load_checkpoint(
    folder: Path, model: nn.Module, optimizer: Optimizer, average: EMAModel | None = None
) -> tuple[int, list[float]]:
    """Restores what `save_checkpoint` wrote and returns its step and losses; 0 and none where there is none."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "checkpoint.safetensors"
    if not path.exists():
        return 0, []
    try:
        tensors = load_file(path)
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path} cannot be read ({one_line(str(error))}); delete it, and training starts over"
        ) from None
    weights = {k[6:]: v for k, v in tensors.items() if k.startswith("model.")}
    model.load_state_dict(weights, strict=False)
    trained = [(k, v) for k, v in model.named_parameters() if v.requires_grad]
    assert all(k in weights for k, _ in trained)
    if average:
        average.shadow_params = [tensors[f"average.{k}"].to(v.device) for k, v in trained]
        average.optimization_step = int(metadata["step"])
    states = optimizer.state_dict()
    scalars = json.loads(metadata["scalars"])
    for i, (state, groups) in enumerate(zip(states, json.loads(metadata["groups"]), strict=True)):
        entries: dict[int, dict] = {}
        for name, value in tensors.items():
            if name.startswith(f"optimizer.{i}."):
                index, key = name.split(".", 3)[2:]
                entries.setdefault(int(index), {})[key] = value
        for name, value in scalars.items():
            part, index, key = name.split(".", 2)
            if int(part) == i:
                entries.setdefault(int(index), {})[key] = value
        state["state"] = entries
        for group, saved in zip(state["param_groups"], groups, strict=True):
            group |= saved
    optimizer.load_state_dict(states)
    return int(metadata["step"]), json.loads(metadata.get("losses", "[]"))
