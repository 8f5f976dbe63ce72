"""One frame at a time through the modules of diffusers' Wan VAE: what its decoder and its encoder have in common.

The VAE is causal in time, so a frame needs each convolution's last two inputs and nothing else. A 3x3x3 convolution is
a sum of three 2D ones over time. PyTorch's conv3d at batch 1 is slow on CPU; its channels-last conv2d is not, and with
frames apart nothing has to be concatenated or copied for it.
"""

from typing import Any

import torch
import torch.nn.functional as F

Module = Any  # diffusers' modules, whose attributes are not typed

# What a convolution's next output needs of its last inputs (n, C, h, w), newest last, by module.
History = dict[Module, list[torch.Tensor]]


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
    h = causal(block.conv1, norm_silu(block.norm1, x), history)
    h = causal(block.conv2, norm_silu(block.norm2, h), history)
    return h.add_(x if isinstance(block.conv_shortcut, torch.nn.Identity) else causal(block.conv_shortcut, x, history))


def norm_silu(norm: Module, x: torch.Tensor) -> torch.Tensor:
    """SiLU of WanRMS_norm of (n, C, h, w), in three passes over memory where the modules take seven."""
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min_(1e-12)
    y = (x * length.reciprocal_()).mul_(norm.gamma.view(1, -1, 1, 1) * norm.scale)
    if torch.is_tensor(norm.bias):
        y.add_(norm.bias.view(1, -1, 1, 1))
    return F.silu(y, inplace=True)


def causal(conv: Module, x: torch.Tensor, history: History) -> torch.Tensor:
    """WanCausalConv3d at frame `x` (n, C, h, w), after the frames in `history`, which it joins. Stride 1."""
    past = history.get(conv, [])
    weights = conv.weight.unbind(2)  # oldest frame first
    padding = (conv.kernel_size[1] // 2, conv.kernel_size[2] // 2)
    y = F.conv2d(x, weights[-1], conv.bias, padding=padding)
    for frame, weight in zip(reversed(past), reversed(weights[:-1]), strict=False):  # before the video there is zero
        y += F.conv2d(frame, weight, padding=padding)
    if len(weights) > 1:
        history[conv] = [*past, x][1 - len(weights) :]
    return y


def is_live(attention: Module) -> bool:
    """Whether a middle attention adds anything: the embedded VAE's does not, which makes its tiles exact."""
    return bool(attention.proj.weight.any()) or bool(attention.proj.bias.any())
