"""RGB frames as planes of Y, Cb and Cr: converted here, from float, where swscale would start from 8 bits."""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

RED, BLUE = 0.2126, 0.0722
# codes of Y, Cb and Cr above black, or grey, that full red, green and blue make at 8 bits
YCBCR = (
    (219 * RED, 219 * (1 - RED - BLUE), 219 * BLUE),
    (-112 * RED / (1 - BLUE), -112 * (1 - RED - BLUE) / (1 - BLUE), 112.0),
    (112.0, -112 * (1 - RED - BLUE) / (1 - RED), -112 * BLUE / (1 - RED)),
)
BAND_ROWS = 64  # converted at a time, an even number: what it takes at 4K then stays in the cache


def to_planes(rgb: "torch.Tensor", pixels: str) -> list[np.ndarray]:
    """Y, Cb and Cr of a frame (3, H, W) in 0..1: BT.709 limited range, in `pixels` such as yuv420p or yuv422p10le.

    Chroma sits where H.264 and its successors expect it: on the left pixel of a pair, between the two rows.
    """
    import torch

    step, kind = (4, torch.int16) if pixels.endswith("10le") else (1, torch.uint8)  # 10 bits: four codes an 8-bit one
    black = rgb.new_tensor([[16.0], [128.0], [128.0]], dtype=torch.float32) * step
    weights = rgb.new_tensor(YCBCR, dtype=torch.float32) * step
    _, height, width = rgb.shape
    down, across = 1 + ("420" in pixels), 1 + ("444" not in pixels)
    luma = rgb.new_empty(height, width, dtype=kind)
    chroma = rgb.new_empty(2, -(-height // down), -(-width // across), dtype=kind)
    for top in range(0, height, BAND_ROWS):
        band = rgb[:, top : top + BAND_ROWS].float().clamp(0, 1)
        made = torch.addmm(black[:1], weights[:1], band.flatten(1))
        luma[top : top + BAND_ROWS] = made.round_().view(-1, width)
        seen = _between_rows(band) if down == 2 else band
        made = torch.addmm(black[1:], weights[1:], seen.flatten(1)).view(2, -1, width)
        made = _at_left_of_pairs(made) if across == 2 else made
        chroma[:, top // down : top // down + made.shape[1]] = made.round_()
    whole = np.uint16 if kind == torch.int16 else np.uint8
    return [plane.cpu().numpy().view(whole) for plane in (luma, *chroma)]


def _between_rows(x: "torch.Tensor") -> "torch.Tensor":
    """Means of pairs of rows of x (c, h, w); a last row without another stands for both."""
    import torch

    upper, lower = x[:, 0::2], x[:, 1::2]
    if x.shape[1] % 2:
        lower = torch.cat((lower, upper[:, -1:]), dim=1)
    return (upper + lower).mul_(0.5)


def _at_left_of_pairs(x: "torch.Tensor") -> "torch.Tensor":
    """x (..., w) at every other column from the first, weighing 1, 2, 1 with its neighbours; ends are continued."""
    own, right = x[..., 0::2], x[..., 1::2]
    count = right.shape[-1]
    made = own * 0.5
    made[..., :count].add_(right, alpha=0.25)
    made[..., count:].add_(own[..., count:], alpha=0.25)
    made[..., 1:].add_(right[..., : made.shape[-1] - 1], alpha=0.25)
    made[..., :1].add_(own[..., :1], alpha=0.25)
    return made
