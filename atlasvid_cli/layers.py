"""Linear layers and norms of a Wan block, in as few passes over memory as PyTorch allows.

x (..., D) of one of the weights' dtypes; results are those of the modules, to rounding.
"""

from typing import Any

import torch
from diffusers.models.activations import GELU
from diffusers.models.attention import FeedForward
from torch.nn.functional import layer_norm, rms_norm

# product, bias and GELU in one pass, by oneDNN; what torch.compile makes of linear layers on a CPU
_FUSED: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


def _runs_plain(x: torch.Tensor) -> bool:
    """Whether x is on a CPU, where nothing learns, converts or compiles what is computed from it."""
    watched = torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu")
    return x.device.type == "cpu" and not watched


def _can_fuse(layer: torch.nn.Module, x: torch.Tensor) -> bool:
    if _FUSED is None or not _runs_plain(x):  # first: what follows cannot be compiled
        return False
    if type(layer) is not torch.nn.Linear or type(layer.weight) is not torch.nn.Parameter:
        return False  # an adapter's or a quantised layer
    known = x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return known and layer.weight.dtype == x.dtype


def linear(layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """`layer` of x. On a CPU PyTorch's own would write the bias first and then add the product to it."""
    return _FUSED(x, layer.weight, layer.bias, "none", [], "") if _can_fuse(layer, x) else layer(x)


def feed_forward(ffn: FeedForward, x: torch.Tensor) -> torch.Tensor:
    """`ffn` of x. On a CPU PyTorch's own GELU takes as long as the product before it."""
    first, _, last = ffn.net
    if isinstance(first, GELU) and first.approximate == "tanh" and _can_fuse(first.proj, x):
        return linear(last, _FUSED(x, first.proj.weight, first.proj.bias, "gelu", [], "tanh"))
    return ffn(x)


def root_mean_square(norm: torch.nn.RMSNorm, x: torch.Tensor) -> torch.Tensor:
    """`norm` of x in x's dtype, in which alone it is one kernel: under autocast the weight's is another."""
    weight = norm.weight.type_as(x)
    if x.dtype != torch.float32 or not _runs_plain(x):
        return rms_norm(x, norm.normalized_shape, weight, norm.eps)
    # PyTorch has no such kernel for CPUs and takes twice as many passes
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    scale = length.square_().div_(x.shape[-1]).add_(norm.eps).rsqrt_()
    return (x * scale).mul_(weight)


def modulated(norm: torch.nn.LayerNorm, x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """`norm` of x (n, L, D) times 1 + `scale` plus `shift` (n or 1, 1, D), in one kernel where all of x shares them."""
    if len(scale) > 1:
        return torch.addcmul(shift, norm(x.float()), 1 + scale).type_as(x)
    weight, bias = (1 + scale).flatten().type_as(x), shift.flatten().type_as(x)
    return layer_norm(x, norm.normalized_shape, weight, bias, norm.eps)


def affine(norm: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """`norm` of x in x's dtype, in which alone it is one kernel; it is none where the model has no such norm."""
    if not isinstance(norm, torch.nn.LayerNorm):
        return norm(x)
    weight, bias = norm.weight.type_as(x), norm.bias.type_as(x)
    return layer_norm(x, norm.normalized_shape, weight, bias, norm.eps)
