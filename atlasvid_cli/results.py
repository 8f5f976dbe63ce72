"""What stages leave on disk: latents when they are done, states while they are not, neither with values that are not
finite."""

from pathlib import Path

import torch

from . import tensor_file
from .console import Console
from .errors import RenderError


def save_latents(path: Path, latents: torch.Tensor, metadata: dict[str, str]) -> None:
    """Latents (C, T, H, W) of a finished stage. Raises RenderError for values that are not finite."""
    _check_finite({"latents": latents}, metadata["kind"])
    tensor_file.save_tensors(path, {"latents": latents}, metadata)


def save_state(path: Path, step: int, tensors: dict[str, torch.Tensor], key: str, kind: str) -> None:
    """What a `kind` of stage goes on from after `step`. Raises RenderError for values that are not finite."""
    _check_finite(tensors, kind)
    tensor_file.save_state(path, step, tensors, key)


def _check_finite(tensors: dict[str, torch.Tensor], kind: str) -> None:
    """Raises RenderError where values are not, after any step: the steps that follow would be spent for nothing."""
    if not all(map(tensor_file.is_finite, tensors.values())):
        raise RenderError(
            f"the {kind} came out with values that are not finite; leave out --lora or --compile, or give another"
            " --attention-backend or --weight-dtype"
        )


def resume_from(path: Path, key: str, console: Console) -> tensor_file.StepState | None:
    """The state that an interrupted run of the same stage left, with a word about one that cannot be used."""
    state, warning = tensor_file.load_state(path, key)
    if warning:
        console.warn(warning)
    return state


def state_of(latents: Path) -> Path:
    """Where the stage that makes a file of latents keeps what it goes on from."""
    return latents.with_suffix(".state.safetensors")
