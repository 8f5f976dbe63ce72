"""Rotary positions and the one seam to attention kernels (diffusers' dispatcher)."""

import torch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _check_attention_backend_requirements,
    _maybe_download_kernel_for_backend,
    dispatch_attention_fn,
)

from .errors import UsageError, one_line

SCORES = 1 << 22  # attention scores computed together: 8 MiB of bf16, which a cache may hold


def rope_axis(positions: torch.Tensor, dim: int, theta: float = 10000.0) -> torch.Tensor:
    """Rotations (..., dim/2, 2) of one axis as cosine and sine, fp32; positions may be fractional. Angles are computed
    in fp64."""
    frequencies = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = positions.double()[..., None] * frequencies
    return torch.stack((angles.cos(), angles.sin()), dim=-1).float()


def rope_dims(head_dim: int) -> tuple[int, int, int]:
    """How Wan splits a head between t, h and w."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


def rope(
    t: torch.Tensor, h: torch.Tensor, w: torch.Tensor, head_dim: int, device: torch.device | None = None
) -> torch.Tensor:
    """Rotations (n, T*H*W, 1, head_dim/2, 2), on `device`, of boxes at t (n, T), h (n, H), w (n, W)."""
    n, shape = len(t), (t.shape[1], h.shape[1], w.shape[1])
    dt, dh, dw = rope_dims(head_dim)
    parts = (
        rope_axis(t, dt)[:, :, None, None],
        rope_axis(h, dh)[:, None, :, None],
        rope_axis(w, dw)[:, None, None, :],
    )
    # a tensor of its own: a view's base has sizes that compiled blocks would be bound to
    return torch.cat([p.to(device).expand(n, *shape, -1, 2).reshape(n, -1, 1, p.shape[-2], 2) for p in parts], dim=-2)


def rotate(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Applies rotations to x (n, L, heads, head_dim), whose channels are interleaved (real, imaginary) pairs."""
    pairs = x.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # which makes no kernels of complex numbers
        (a, b), (cos, sin) = pairs.unbind(-1), rotation.unbind(-1)
        return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).to(x.dtype)
    turned = torch.view_as_complex(pairs) * torch.view_as_complex(rotation)
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


def check_backend(name: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raises UsageError for an attention backend that diffusers does not know or that cannot run here, as a little
    attention on the device shows; the kernel of a hub backend is fetched."""
    try:
        backend = AttentionBackendName(name)
    except ValueError:
        known = ", ".join(b.value for b in AttentionBackendName)
        raise UsageError(f"there is no attention backend {name!r}; choose one of {known}") from None
    try:
        _check_attention_backend_requirements(backend)
        _maybe_download_kernel_for_backend(backend)
        x = torch.zeros(1, 128, 2, 64, device=device, dtype=dtype)
        dispatch_attention_fn(x, x, x, backend=backend)
    except Exception as error:  # kernels fail in ways of their own
        raise UsageError(
            f"the attention backend {name!r} cannot run here ({one_line(str(error))}); leave --attention-backend out to"
            " use PyTorch's own"
        ) from None


def default_backend(device: torch.device, dtype: torch.dtype) -> str:
    """What attends where no backend is named: PyTorch's kernels (`native`), or in bf16 on a CPU plain `products`."""
    return "products" if (device.type, dtype) == ("cpu", torch.bfloat16) else "native"


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None = None, backend: str | None = None
) -> torch.Tensor:
    """Softmax attention of q (n, L, heads, d) on k, v (n, K, heads, d); `bias` (n or 1, 1, 1, K) adds to the logits.

    `backend` is a name of diffusers' dispatcher. Few backends take a bias, so attention with one, to the two dozen
    keys of a prompt, always runs on PyTorch's. In bf16 on a CPU, two products with a softmax between are the default:
    PyTorch's kernel is no faster there than in fp32, at less than half of the products' rate.
    """
    row = q.shape[1] * q.shape[2] * k.shape[1]
    together = row if bias is None else row * len(q)
    if backend is None and default_backend(q.device, q.dtype) == "products" and together <= SCORES:
        if bias is not None:
            return _products(q, k, v, bias)
        parts = zip(*(x.split(SCORES // row) for x in (q, k, v)), strict=True)
        return torch.cat([_products(*part) for part in parts])
    # by name: without one diffusers takes what $DIFFUSERS_ATTN_BACKEND says, and metadata would tell another
    backend = "native" if backend is None or bias is not None else backend
    return dispatch_attention_fn(q, k, v, attn_mask=bias, dropout_p=0.0, is_causal=False, backend=backend)


def _products(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`attend` as it is written, with all scores in memory."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if bias is not None:
        scores += bias
    return (torch.softmax(scores, dim=-1).type_as(v) @ v).transpose(1, 2)
