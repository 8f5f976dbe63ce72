"""Optimisers for training: Muon on matrices (convolutions flattened to 2D) with AdamW on the rest, or others."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .errors import UsageError
from .machine import has_bfloat16
from .presets import OptimizerName


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by five Newton-Schulz steps (Keller Jordan), scaled to AdamW's update size.

    torch.optim.Muon takes 2D parameters only and iterates in bfloat16 anywhere; this one flattens convolutions to
    (out, rest), takes equal shapes together, and iterates in fp32 on CPUs that only emulate bf16.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95):
        super().__init__(list(params), {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[tuple[nn.Parameter, torch.Tensor]]] = {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                buffer = state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(buffer, group["momentum"]).flatten(1)
                by_shape.setdefault(tuple(update.shape), []).append((p, update))
            for shape, pairs in by_shape.items():
                scale = group["lr"] * 0.2 * math.sqrt(max(shape))
                for (p, _), update in zip(pairs, orthogonalise(torch.stack([u for _, u in pairs])), strict=True):
                    p.sub_(update.view_as(p), alpha=scale)


def orthogonalise(matrices: torch.Tensor) -> torch.Tensor:
    """The nearest semi-orthogonal matrices to (n, a, b) ones, approximately: singular values end in about 0.7..1.2."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    if matrices.device.type != "cpu" or has_bfloat16():
        x = x.bfloat16()
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if tall else x).type_as(matrices)


class Optimizer:
    """What updates the trained weights, behind one interface.

    `muon` takes every weight of two or more axes and AdamW the rest; `adamw` takes all; `prodigy` is AdamW that finds
    its own step size (Mishchenko & Defazio, arXiv 2306.06101), of which `lr` is a multiple. `adamw_names` are
    substrings of parameter names that Muon leaves although they are matrices (embeddings, heads).
    """

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        lr: float,
        adamw_names: tuple[str, ...] = (),
        kind: OptimizerName = "muon",
    ):
        matrices: list[nn.Parameter] = []
        rest: list[nn.Parameter] = []
        for name, p in named:
            if p.requires_grad:
                is_matrix = p.ndim >= 2 and min(p.flatten(1).shape) > 1
                of_muon = kind == "muon" and is_matrix and not any(s in name for s in adamw_names)
                (matrices if of_muon else rest).append(p)
        self.parts: list[torch.optim.Optimizer] = []
        if matrices:
            self.parts.append(Muon(matrices, lr))
        if rest and kind == "prodigy":
            self.parts.append(_prodigy()(rest, lr=lr, safeguard_warmup=True, use_bias_correction=True))
        elif rest:
            self.parts.append(torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.0))

    def step(self, lr: float) -> None:
        """One update at learning rate `lr`, then gradients are cleared."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = lr
            part.step()
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict]:
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict]) -> None:
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)


def check_optimizer(name: str) -> None:
    """Raises UsageError for an optimizer whose package is not installed."""
    if name == "prodigy":
        _prodigy()


def _prodigy() -> Any:
    try:
        from prodigyopt import Prodigy
    except ImportError:
        raise UsageError(
            "the optimizer prodigy is not installed; run `pip install prodigyopt`, or choose muon or adamw"
        ) from None
    return Prodigy


def learning_rate(step: int, total: int, peak: float, warmup: int = 50) -> float:
    """Linear warm-up, then a cosine to 2 % of `peak` at `total` steps."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
