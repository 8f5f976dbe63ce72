"""What a file tells of itself, and damaged ones refused by name."""

from fractions import Fraction

import pytest
import torch

from atlasvid_cli.errors import InputError
from atlasvid_cli.info import describe
from atlasvid_cli.video import probe, write_video


def test_a_video_of_an_unknown_codec_is_refused(tmp_path):
    path = tmp_path / "a.mp4"
    frames = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    write_video(path, iter([frames]), width=64, height=64, fps=Fraction(8), frame_count=3)
    assert describe(path)["frames"] == probe(path)["frames"] == 3
    path.write_bytes(path.read_bytes().replace(b"avc1", b"zzzz"))
    for look in (describe, probe):
        with pytest.raises(InputError, match="codec"):
            look(path)
