"""When a video is finished, and what may take its place."""

import pytest
import torch

from atlasvid_cli import outputs
from atlasvid_cli.errors import UsageError
from atlasvid_cli.video import write_video


def test_a_video_is_finished_that_is_whole_and_of_the_same_latents_decoder_and_codec(tmp_path):
    for suffix, codec in ((".mkv", "ffv1"), (".mp4", "h264"), (".mov", "prores")):
        wanted, target = {"key": "a", "decoder": "v", "codec": codec}, tmp_path / f"a{suffix}"
        assert not outputs.is_finished(target, wanted, 9)
        frames = torch.rand(9, 3, 64, 64)
        write_video(target, iter(frames), width=64, height=64, fps=8, frame_count=9, codec=codec, metadata=wanted)
        assert outputs.is_finished(target, wanted, 9)
        for name in wanted:
            assert not outputs.is_finished(target, wanted | {name: "other"}, 9)
        target.write_bytes(target.read_bytes()[: 3 * target.stat().st_size // 4])  # a copy that broke off
        assert not outputs.is_finished(target, wanted, 9)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"seed": "1", "dtype": "bfloat16"}, "from something else"),
        ({"dtype": "bfloat16"}, "same prompt, seed and model .*dtype bfloat16"),
        ({}, "same prompt, seed and model by other options"),
    ],
)
def test_a_video_that_is_kept_says_how_it_differs(tmp_path, changed, said):
    made = {
        "key": "a",
        "dtype": "float32",
        "attention": "native",
        "prompt": "p",
        "seed": "0",
        "model": "m",
        "version": "1",
    }
    frames = torch.zeros(1, 3, 64, 64)
    write_video(tmp_path / "a.mp4", iter(frames), width=64, height=64, fps=8, frame_count=1, metadata=made | changed)
    outputs.check_replaceable(tmp_path / "a.mp4", made | changed, "h264")
    outputs.check_replaceable(tmp_path / "b.mp4", made, "h264")
    with pytest.raises(UsageError, match=said):
        outputs.check_replaceable(tmp_path / "a.mp4", made | {"key": "b"}, "h264")


def test_a_master_is_not_replaced_by_the_same_video_in_another_codec(tmp_path):
    tagged = {"key": "a", "codec": "ffv1"}
    write_video(
        tmp_path / "a.mkv", iter(torch.zeros(1, 3, 64, 64)), width=64, height=64, fps=8, frame_count=1, metadata=tagged
    )
    outputs.check_replaceable(tmp_path / "a.mkv", tagged, "ffv1")
    with pytest.raises(UsageError, match="the same video in ffv1"):
        outputs.check_replaceable(tmp_path / "a.mkv", tagged, "hevc10")
