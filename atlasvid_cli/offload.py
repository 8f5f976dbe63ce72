"""Where weights and states live, and blocks brought to the compute device one at a time (DESIGN §4).

A block is a map over all windows, so its weights are loaded once a forward however many chunks run through it.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import nn

from .memory import Offload


def compute_device(model: WanTransformer3DModel) -> torch.device:
    """Where the model computes: its embeddings are never offloaded."""
    return model.patch_embedding.weight.device


def place(model: WanTransformer3DModel, device: torch.device, offload: Offload) -> WanTransformer3DModel:
    """Moves the model to `device`, or all but its blocks, which stay in (pinned) host memory."""
    if offload == "none":
        return model.to(device)
    for name, part in model.named_children():
        if name != "blocks":
            part.to(device)
    for name, parameter in model.named_parameters(recurse=False):
        setattr(model, name, nn.Parameter(parameter.to(device), requires_grad=False))
    if device.type == "cuda":
        for parameter in model.blocks.parameters():
            parameter.data = parameter.data.pin_memory()  # only from pinned memory does a copy overlap with compute
    return model


def on_device(blocks: nn.ModuleList, device: torch.device) -> Iterator[Any]:
    """Each block with its weights on `device`. Those that live elsewhere are copied while the block before computes."""
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def fetch(block: nn.Module) -> list[torch.Tensor]:
        with torch.cuda.stream(stream) if stream else nullcontext():
            return [p.data.to(device, non_blocking=True) for p in block.parameters()]

    if all(p.device == device for block in blocks for p in block.parameters()):
        yield from blocks
        return
    fetched = fetch(blocks[0])
    for i, block in enumerate(blocks):
        parameters = list(block.parameters())
        home = [p.data for p in parameters]
        if stream:
            torch.cuda.current_stream(device).wait_stream(stream)
        for parameter, weight in zip(parameters, fetched, strict=True):
            parameter.data = weight
            if stream:
                weight.record_stream(torch.cuda.current_stream(device))
        fetched = fetch(blocks[i + 1]) if i + 1 < len(blocks) else []
        try:
            yield block
        finally:
            for parameter, weight in zip(parameters, home, strict=True):
                parameter.data = weight
