"""One frame at a time through the modules of diffusers' Wan VAE: what its decoder and its encoder have in common.

The VAE is causal in time, so a frame needs each convolution's last two inputs and nothing else. They lie side by side
in the channels of one tensor, so that a 3x3x3 convolution is the sum of two 2D ones, over the past and over the frame.
PyTorch's conv3d at batch 1 is slow on CPU; its channels-last conv2d is not.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from . import banded
from .banded import Bands, Module, bands, joined


class Past:
    """The last inputs (n, C, h, w) of a convolution over time: `frames` (n, length * C, h, w), zero before the video,
    of which the next one overwrites the oldest."""

    def __init__(self, conv: Module, like: torch.Tensor) -> None:
        self.length, (n, c, h, w) = conv.kernel_size[0] - 1, like.shape
        self.frames = like.new_zeros(n, h, w, self.length * c).permute(0, 3, 1, 2)  # channels last
        self.taken = 0

    def convolved(self, conv: Module, x: torch.Tensor) -> torch.Tensor:
        """`conv` at frame `x`, which becomes the newest."""
        *older, own = conv.weight.unbind(2)  # oldest frame first
        padding = conv.kernel_size[1] // 2
        y = F.conv2d(x, own, conv.bias, padding=padding)
        if self.taken:  # stills need no more
            placed = torch.cat([older[(i - self.taken) % self.length] for i in range(self.length)], dim=1)
            y = y.add_(F.conv2d(self.frames, placed, padding=padding)) if padding else plus(y, self.frames, placed)
        self.frames.chunk(self.length, dim=1)[self.taken % self.length].copy_(x)
        self.taken += 1
        return y


@dataclass
class History:
    """What modules keep of a video for its next frames, and what was found out of their weights."""

    pasts: dict[Module, Past] = field(default_factory=dict)  # of convolutions that are not still
    waiting: dict[Module, list[torch.Tensor]] = field(default_factory=dict)  # frames to be merged with the next one
    still: dict[Module, bool] = field(default_factory=dict)
    working: dict[Module, list[Module]] = field(default_factory=dict)  # those of a level's blocks that are not idle


def plus(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`y` (n, C, h, w) plus the 1x1 convolution of `x`, as a product into `y`: a convolution's own result would be as
    large again."""
    into, rows = (frame.permute(0, 2, 3, 1).flatten(0, 2) for frame in (y, x))
    return into.addmm_(rows, weight.flatten(1).t()).view(len(y), *y.shape[2:], -1).permute(0, 3, 1, 2)


def middle(block: Module, x: torch.Tensor, history: History) -> torch.Tensor:
    """The middle block of decoder or encoder on one frame (n, C, h, w)."""
    x = resnet(block.resnets[0], x, history)
    for attention, last in zip(block.attentions, block.resnets[1:], strict=True):
        if is_live(attention):  # a quadratic cost in h*w, for nothing where the projection is zero
            x = attention(x.unsqueeze(2)).squeeze(2).contiguous(memory_format=torch.channels_last)
        x = resnet(last, x, history)
    return x


def resnets(blocks: Module, parts: Bands, height: int, history: History) -> Bands:
    """diffusers' WanResidualBlocks, one after the other, on one frame in bands: whole where they are not all still."""
    if blocks not in history.working:
        history.working[blocks] = [block for block in blocks if not is_idle(block)]
    working = history.working[blocks]
    if still(blocks, history):
        for block in working:
            parts = banded.resnet(block, parts, height)
        return parts
    x = joined(parts, height)
    for block in working:
        x = resnet(block, x, history)
    return [x]


def resnet(block: Module, x: torch.Tensor, history: History) -> torch.Tensor:
    """diffusers' WanResidualBlock on one frame (n, C, h, w)."""
    h = activated(block.norm1, block.conv1, x, history)
    h = activated(block.norm2, block.conv2, h, history)
    return h.add_(x if isinstance(block.conv_shortcut, torch.nn.Identity) else causal(block.conv_shortcut, x, history))


def activated(norm: Module, conv: Module, x: torch.Tensor, history: History) -> torch.Tensor:
    """`causal` at SiLU of WanRMS_norm of frame `x` (n, C, h, w)."""
    made = torch.empty_like(x)
    for part, into in zip(bands(x), bands(made), strict=True):
        banded.normed(norm, part, into)
    return causal(conv, made, history)


def causal(conv: Module, x: torch.Tensor, history: History) -> torch.Tensor:
    """WanCausalConv3d at frame `x` (n, C, h, w), after the frames in `history`, which it joins. Stride 1."""
    if still(conv, history):
        return F.conv2d(x, conv.weight[:, :, -1], conv.bias, padding=conv.kernel_size[1] // 2)
    if conv not in history.pasts:
        history.pasts[conv] = Past(conv, x)
    return history.pasts[conv].convolved(conv, x)


def is_still(conv: Module) -> bool:
    """Whether a convolution over time sees one frame alone, its weights for the past being zero."""
    return not bool(conv.weight[:, :, :-1].any())


def still(part: Module, history: History) -> bool:
    """Whether all convolutions over time in `part` see one frame alone, found out once a video."""
    if part not in history.still:
        convs = (module for module in part.modules() if isinstance(module, torch.nn.Conv3d))
        history.still[part] = all(map(is_still, convs))
    return history.still[part]


def near_pixels(vae: Module, levels: int) -> list[Module]:
    """The 3x3x3 convolutions of the `levels` next to the pixels, of encoder and decoder: where most of the work is.

    `vae` is one of Wan 2.2's kind, whose blocks are levels.
    """
    if not levels:
        return []
    blocks = [*vae.encoder.down_blocks[:levels], *vae.decoder.up_blocks[-levels:]]
    convs = [conv for block in blocks for part in block.resnets for conv in (part.conv1, part.conv2)]
    return [vae.encoder.conv_in, *convs, vae.decoder.conv_out]


@torch.no_grad()
def hold_still(vae: Module, levels: int) -> None:
    """Adds the weights for the past to those for the present in `near_pixels`, which changes nothing where nothing
    moves."""
    for conv in near_pixels(vae, levels):
        conv.weight[:, :, -1] = conv.weight.sum(dim=2)
        conv.weight[:, :, :-1] = 0


def last_blocks(vae: Module, count: int) -> list[Module]:
    """The decoder's `count` residual blocks next to the pixels."""
    return list(vae.decoder.up_blocks[-1].resnets)[-count:] if count else []


@torch.no_grad()
def make_idle(vae: Module, count: int) -> None:
    """Lets the `last_blocks` pass on what they get: their part is for the others to learn, their work is saved."""
    for block in last_blocks(vae, count):
        block.conv2.weight.zero_()
        block.conv2.bias.zero_()


def is_idle(block: Module) -> bool:
    """Whether a residual block adds nothing to what it gets."""
    silent = not (bool(block.conv2.weight.any()) or bool(block.conv2.bias.any()))
    return silent and isinstance(block.conv_shortcut, torch.nn.Identity)


def is_live(attention: Module) -> bool:
    """Whether a middle attention adds anything: the embedded VAE's does not, which makes its tiles exact."""
    return bool(attention.proj.weight.any()) or bool(attention.proj.bias.any())
