"""One forward of a Wan block over diffusers' own parameters, eager or compiled (DESIGN §4).

Shapes: n windows (or clips), L tokens a window, D channels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from torch.utils.checkpoint import checkpoint

from .attention import attend, rotate
from .layers import affine, feed_forward, linear, modulated, root_mean_square

KeyValue = tuple[torch.Tensor, torch.Tensor]
Made = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # a block's output, its own keys and its values


@dataclass(frozen=True)
class Kernels:
    """How blocks compute: the attention backend, a name of diffusers' dispatcher (None: PyTorch's own), and whether
    what surrounds attention is compiled: one set of graphs serves all blocks and window shapes."""

    attention: str | None = None
    compiled: bool = False

    def run(
        self,
        model: WanTransformer3DModel,
        block: WanTransformerBlock,
        x: torch.Tensor,
        modulations: torch.Tensor,
        rotation: torch.Tensor,
        text: KeyValue,
        text_bias: torch.Tensor,
        proxy: KeyValue | None,
    ) -> Made:
        """`block_forward`; in training with diffusers' `enable_gradient_checkpointing` it is computed again
        backwards."""
        arguments = block, x, modulations, rotation, text, text_bias, proxy
        if self.compiled:
            forward = _compiled_block(self.attention)
        else:
            forward = partial(block_forward, attend=partial(attend, backend=self.attention))
        if model.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(forward, *arguments, use_reentrant=False)
        return forward(*arguments)


EAGER = Kernels()


@cache
def _compiled_block(backend: str | None) -> Callable[..., Made]:
    # attention stays as it is: its kernels are those of many packages, chosen by size
    attention = torch.compiler.disable(partial(attend, backend=backend))
    return partial(torch.compile(block_forward, dynamic=True), attend=attention)


def block_forward(
    block: WanTransformerBlock,
    x: torch.Tensor,
    modulations: torch.Tensor,
    rotation: torch.Tensor,
    text: KeyValue,
    text_bias: torch.Tensor,
    proxy: KeyValue | None,
    attend: Callable[..., torch.Tensor],
) -> Made:
    """A Wan block on x (n, L, D): each window attends to itself and, in the same softmax, to `proxy` (n, K, heads, d).

    `modulations` (n or 1, 6, D), `rotation` (n or 1, L, 1, d/2, 2), `text` (n or 1, tokens, heads, d). Returns the
    block's output and, for those who guide others, its own unrotated keys and its values (n, L, heads, d).
    """
    shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (block.scale_shift_table + modulations.float()).chunk(6, dim=1)

    attn = block.attn1
    normed = modulated(block.norm1, x, scale, shift)
    q = rotate(root_mean_square(attn.norm_q, linear(attn.to_q, normed)).unflatten(-1, (attn.heads, -1)), rotation)
    k = root_mean_square(attn.norm_k, linear(attn.to_k, normed)).unflatten(-1, (attn.heads, -1))
    v = linear(attn.to_v, normed).unflatten(-1, (attn.heads, -1))
    keys, values = rotate(k, rotation), v
    if proxy is not None:
        keys = torch.cat((keys, proxy[0].type_as(keys)), dim=1)
        values = torch.cat((values, proxy[1].type_as(values)), dim=1)
    attended = linear(attn.to_out[0], attend(q, keys, values).flatten(2))
    x = torch.addcmul(x, attended.type_as(x), gate.type_as(x))

    attn = block.attn2
    q = linear(attn.to_q, affine(block.norm2, x))
    q = root_mean_square(attn.norm_q, q).unflatten(-1, (attn.heads, -1))
    if len(text[0]) == 1:  # one prompt for all windows: one long row of queries
        attended = attend(q.flatten(0, 1)[None], *text, text_bias).view_as(q)
    else:
        attended = attend(q, *text, text_bias)
    x = x + linear(attn.to_out[0], attended.flatten(2))

    out = feed_forward(block.ffn, modulated(block.norm3, x, ffn_scale, ffn_shift))
    return torch.addcmul(x, out.type_as(x), ffn_gate.type_as(x)), k, v
