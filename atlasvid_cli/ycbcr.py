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
    bands = (_band_planes(band, pixels) for band in rgb.split(BAND_ROWS, dim=1))
    return [np.concatenate(parts) for parts in zip(*bands, strict=True)]


def _band_planes(rgb: "torch.Tensor", pixels: str) -> list[np.ndarray]:
    import torch
    import torch.nn.functional as F

    step, dtype = (4, np.uint16) if pixels.endswith("10le") else (1, np.uint8)  # 10 bits: four codes an 8-bit one
    black = rgb.new_tensor([[16.0], [128.0], [128.0]], dtype=torch.float32) * step
    weights = rgb.new_tensor(YCBCR, dtype=torch.float32) * step
    shape, height = rgb.shape, rgb.shape[1]
    planes = torch.addmm(black, weights, rgb.float().clamp(0, 1).flatten(1)).view(shape)
    luma, chroma = planes[0], planes[1:]
    if "420" in pixels:
        chroma = F.pad(chroma, (0, 0, 0, height % 2), "replicate")
        chroma = (chroma[:, 0::2] + chroma[:, 1::2]).mul_(0.5)
    if "444" not in pixels:
        chroma = F.pad(chroma, (1, 1), "replicate")
        around = chroma[..., :-2] + chroma[..., 2:]
        chroma = around.add_(chroma[..., 1:-1], alpha=2).mul_(0.25)[..., 0::2]
    return [plane.round().cpu().numpy().astype(dtype) for plane in (luma, *chroma)]
