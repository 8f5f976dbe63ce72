"""The planes that codecs get."""

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
