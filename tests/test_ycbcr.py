"""The planes that codecs get."""

import numpy as np
import pytest
import torch

from atlasvid_cli.ycbcr import to_planes


def test_known_colours():
    """Codes of BT.709 limited range for black, white and the primaries (ITU-R BT.709, table 3)."""
    colours = torch.tensor([[0, 0, 0], [1, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1]], dtype=torch.float32)
    y, cb, cr = (p[0].tolist() for p in to_planes(colours.T[:, None], "yuv444p"))
    assert list(zip(y, cb, cr, strict=True)) == [
        (16, 128, 128),
        (235, 128, 128),
        (63, 102, 240),
        (173, 42, 26),
        (32, 240, 118),
    ]
    assert to_planes(colours.T[:, None], "yuv444p10le")[0][0].tolist()[:2] == [64, 940]


@pytest.mark.parametrize("height", [1, 2, 65, 130])
@pytest.mark.parametrize("width", [1, 2, 7, 8])
@pytest.mark.parametrize("pixels", ["yuv420p", "yuv422p10le", "yuv444p"])
def test_chroma_lies_on_the_left_pixel_of_a_pair_and_between_two_rows(height, width, pixels):
    """A pair's chroma weighs its left pixel twice and that one's neighbours once each, over both rows; frames end with
    their last row and column continued."""
    frame = torch.rand(3, height, width, generator=torch.Generator().manual_seed(0))
    full = np.stack(to_planes(frame, "yuv444p10le")[1:]).astype(float)
    if pixels == "yuv420p":
        full = np.pad(full, ((0, 0), (0, height % 2), (0, 0)), "edge")
        full = (full[:, 0::2] + full[:, 1::2]) / 2
    if pixels != "yuv444p":
        left = np.pad(full, ((0, 0), (0, 0), (1, 1)), "edge")
        full = ((left[..., :-2] + 2 * left[..., 1:-1] + left[..., 2:]) / 4)[..., 0::2]
    codes = 1 if pixels.endswith("10le") else 4
    luma, *chroma = to_planes(frame, pixels)
    assert luma.shape == (height, width)
    assert luma.dtype == chroma[0].dtype == (np.uint16 if codes == 1 else np.uint8)
    # roundings to ten bits, and once more
    np.testing.assert_allclose(np.stack(chroma).astype(float) * codes, full, rtol=0, atol=0.5 + codes / 2)
