"""One frame at a time through the modules of diffusers' Wan VAE: what its decoder and its encoder have in common.

The VAE is causal in time, so a frame needs each convolution's last two inputs and nothing else. They lie beside it in
the channels of one tensor, so that a 3x3x3 convolution is a single 2D one, which on CPU, channels last, is several
times as fast as PyTorch's conv3d at batch 1.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from .vae_cost import BAND

Module = Any  # diffusers' modules, whose attributes are not typed

# What the next output needs of a module's last inputs: a `Ring` of a convolution's, frames that wait to be merged
History = dict[Module, Any]


class Ring:
    """The last inputs (n, C, h, w) of a convolution over `taps` frames: `frames` (n, taps * C, h, w), zero before the
    video, of which the newest overwrites the oldest."""

    def __init__(self, conv: Module, like: torch.Tensor) -> None:
        self.taps, (n, c, h, w) = conv.kernel_size[0], like.shape
        self.frames = like.new_zeros(n, h, w, self.taps * c).permute(0, 3, 1, 2)  # channels last
        self.newest = -1

    def room(self) -> torch.Tensor:
        """A view (n, C, h, w), to be filled with the next frame."""
        self.newest = (self.newest + 1) % self.taps
        return self.frames.chunk(self.taps, dim=1)[self.newest]

    def weight(self, conv: Module) -> torch.Tensor:
        """`conv`'s weight (O, taps * C, kh, kw), each tap where its frame lies."""
        oldest_first = conv.weight.unbind(2)
        return torch.cat([oldest_first[(i - self.newest - 1) % self.taps] for i in range(self.taps)], dim=1)


def middle(block: Module, x: torch.Tensor, history: History) -> torch.Tensor:
    """The middle block of decoder or encoder on one frame (n, C, h, w)."""
    x = resnet(block.resnets[0], x, history)
    for attention, last in zip(block.attentions, block.resnets[1:], strict=True):
        if is_live(attention):  # a quadratic cost in h*w, for nothing where the projection is zero
            x = attention(x.unsqueeze(2)).squeeze(2).contiguous(memory_format=torch.channels_last)
        x = resnet(last, x, history)
    return x


def resnet(block: Module, x: torch.Tensor, history: History) -> torch.Tensor:
    """diffusers' WanResidualBlock on one frame (n, C, h, w)."""
    h = activated(block.norm1, block.conv1, x, history)
    h = activated(block.norm2, block.conv2, h, history)
    return h.add_(x if isinstance(block.conv_shortcut, torch.nn.Identity) else causal(block.conv_shortcut, x, history))


def activated(norm: Module, conv: Module, x: torch.Tensor, history: History) -> torch.Tensor:
    """`causal` at SiLU of WanRMS_norm of frame `x` (n, C, h, w)."""

    def write(room: torch.Tensor) -> None:
        for part, into in zip(bands(x), bands(room), strict=True):
            length = torch.linalg.vector_norm(part, dim=1, keepdim=True).clamp_min_(1e-12)
            y = (part * length.reciprocal_()).mul_(norm.gamma.view(1, -1, 1, 1) * norm.scale)
            if torch.is_tensor(norm.bias):
                y.add_(norm.bias.view(1, -1, 1, 1))
            into.copy_(F.silu(y, inplace=True))

    return _convolved(conv, x, write, history)


def causal(conv: Module, x: torch.Tensor, history: History) -> torch.Tensor:
    """WanCausalConv3d at frame `x` (n, C, h, w), after the frames in `history`, which it joins. Stride 1."""
    if conv.kernel_size[0] == 1:
        return F.conv2d(x, conv.weight.squeeze(2), conv.bias)
    return _convolved(conv, x, lambda room: room.copy_(x), history)


def _convolved(
    conv: Module, like: torch.Tensor, write: Callable[[torch.Tensor], Any], history: History
) -> torch.Tensor:
    """A convolution over time and space at the frame that `write` puts where it is told, as large as `like`."""
    ring = history.get(conv) or history.setdefault(conv, Ring(conv, like))
    write(ring.room())
    return F.conv2d(ring.frames, ring.weight(conv), conv.bias, padding=conv.kernel_size[1] // 2)


def bands(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Views of the rows of (..., h, w), as many at a time as `BAND` allows on a CPU; elsewhere all."""
    height = x.shape[-2]
    return x.split(height if x.is_cuda else max(1, BAND * height // x.numel()), dim=-2)


def is_live(attention: Module) -> bool:
    """Whether a middle attention adds anything: the embedded VAE's does not, which makes its tiles exact."""
    return bool(attention.proj.weight.any()) or bool(attention.proj.bias.any())
