"""What a file tells of itself, and damaged ones refused by name."""

from fractions import Fraction

import pytest
import torch

from atlasvid_cli.errors import InputError
from atlasvid_cli.info import describe, lines
from atlasvid_cli.video import probe, write_video


def test_a_video_of_an_unknown_codec_is_refused(tmp_path):
    path = tmp_path / "a.mp4"
    frames = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    write_video(path, iter(frames), width=64, height=64, fps=Fraction(8), frame_count=3)
    assert describe(path)["frames"] == probe(path)["frames"] == 3
    path.write_bytes(path.read_bytes().replace(b"avc1", b"zzzz"))
    for look in (describe, probe):
        with pytest.raises(InputError, match="codec"):
            look(path)


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1536, "1.5 KiB"), (3 << 20, "3 MiB"), (5 << 40, "5 TiB")],
)
def test_sizes_have_a_unit(value, shown):
    assert lines({"disk_free_bytes": value, "files_bytes": {"a.mp4": value}}) == [
        f"disk_free: {shown}",
        f"files.a.mp4: {shown}",
    ]


def test_stages_have_lines_of_their_own_and_what_is_none_has_none():
    facts = {"run": {"stages": [{"stage": "proxy", "steps": 20, "clip": None}], "codecs": ["h264", "av1"]}}
    assert lines(facts) == ["run.stages.proxy.stage: proxy", "run.stages.proxy.steps: 20", "run.codecs: h264, av1"]


def test_what_a_foreign_file_says_stays_on_its_line():
    assert lines({"metadata": {"prompt": "x\nkey: forged\x1b[2J"}}) == ["metadata.prompt: x key: forged [2J"]
