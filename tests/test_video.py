"""Video files: colour, exact counts, same bytes, and nothing left behind after a failure."""

import errno
import math
import subprocess
import sys
import time

import av
import numpy as np
import pytest
import torch

from atlasvid_cli import video
from atlasvid_cli.console import Console
from atlasvid_cli.errors import InputError, RenderError, ResourceError, UsageError

META = {"prompt": "a red circle, «naïve» = 1; 2", "seed": "7", "atlasvid": "0.1"}


def ramp(count: int, height: int, width: int) -> torch.Tensor:
    """Frames (count, 3, H, W): red along x, green along y, blue over time, all smooth."""
    x, y, t = (torch.linspace(0.02, 0.98, n) for n in (width, height, count))
    red, green, blue = torch.broadcast_tensors(x[None, None], y[None, :, None], t[:, None, None])
    return torch.stack((red, green, blue), dim=1).contiguous()


def write(path, frames, codec="h264", count=None, size=None, **more):
    height, width = size or frames.shape[2:]
    more.setdefault("metadata", META)
    video.write_video(
        path,
        iter(frames),
        width=width,
        height=height,
        fps=16,
        frame_count=count or len(frames),
        codec=codec,
        **more,
    )


def psnr(path, frames: torch.Tensor) -> float:
    got = torch.from_numpy(np.stack(list(video.read_frames(path)))).permute(0, 3, 1, 2) / 255
    assert got.shape == frames.shape
    return -10 * math.log10(float((got - frames).square().mean()))


@pytest.mark.parametrize(
    "codec, pixels, name, least",
    [
        ("h264", "yuv420p", "h264", 40),
        ("hevc10", "yuv420p10le", "hevc", 40),
        ("av1", "yuv420p10le", "av1", 40),
        ("prores", "yuv422p10le", "prores", 50),
        ("ffv1", "yuv444p10le", "ffv1", 50),
    ],
)
def test_round_trip(codec, pixels, name, least, tmp_path):
    path, frames = tmp_path / f"a{video.suffix_for(codec)}", ramp(9, 96, 128)
    counted = []
    write(path, frames, codec, on_frame=counted.append)
    info = video.probe(path)
    assert info == {
        "width": 128,
        "height": 96,
        "fps": 16.0,
        "frames": 9,
        "seconds": 9 / 16,
        "codec": name,
        "pix_fmt": pixels,
        "color_primaries": "bt709",
        "color_trc": "bt709",
        "color_space": "bt709",
        "color_range": "limited",
        "metadata": META,
    }
    assert psnr(path, frames) > least
    assert counted == list(range(1, 10))
    first = path.read_bytes()
    write(path, frames, codec)
    assert path.read_bytes() == first
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("codec", video.CODECS)
@pytest.mark.parametrize("height, width", [(77, 65), (78, 65), (77, 66)])
def test_odd_sizes_are_kept(codec, height, width, tmp_path):
    path, frames = tmp_path / f"a{video.suffix_for(codec)}", ramp(3, height, width)
    write(path, frames, codec)
    info = video.probe(path)
    assert (info["width"], info["height"], info["frames"]) == (width, height, 3)
    assert psnr(path, frames) > 38


def test_crops_to_the_top_left_and_drops_what_is_too_much(tmp_path):
    path, frames = tmp_path / "a.mp4", ramp(9, 80, 96)
    taken = []

    def decoded():
        for frame in frames:
            taken.append(1)
            yield frame

    video.write_video(path, decoded(), width=64, height=66, fps=24, frame_count=6)
    assert video.probe(path)["seconds"] == 6 / 24
    assert psnr(path, frames[:6, :, :66, :64]) > 38
    assert len(taken) == 6  # the others were not even decoded


@pytest.mark.parametrize("fps, expected", [(23.976, 24000 / 1001), (29.97, 30000 / 1001), (12.5, 12.5)])
def test_frame_rates(fps, expected, tmp_path):
    path = tmp_path / "a.mp4"
    video.write_video(path, iter(ramp(4, 32, 32)), width=32, height=32, fps=fps, frame_count=4)
    info = video.probe(path)
    assert info["fps"] == pytest.approx(expected, rel=1e-5)
    assert info["seconds"] == pytest.approx(4 / expected, rel=1e-3)


@pytest.mark.parametrize("codec", ["hevc10", "prores", "ffv1"])
def test_ten_bits_keep_more_than_eight(codec, tmp_path):
    """A slow grey ramp has over 300 steps of luma in 10 bits; through 8 bits it would have at most 110."""
    path = tmp_path / f"a{video.suffix_for(codec)}"
    write(path, torch.linspace(0.25, 0.75, 512).expand(1, 3, 64, 512), codec)
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
    luma = np.frombuffer(frame.planes[0], np.uint16).reshape(64, -1)[32, :512]
    assert len(np.unique(luma)) > 300


@pytest.mark.parametrize("codec", video.CODECS)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_very_short(codec, count, tmp_path):
    path = tmp_path / f"a{video.suffix_for(codec)}"
    write(path, ramp(4, 96, 128)[:count], codec)
    info = video.probe(path)
    assert (info["frames"], info["seconds"]) == (count, count / 16)


def test_prores_is_422_hq(tmp_path):
    write(tmp_path / "a.mov", ramp(2, 64, 64), "prores")
    with av.open(str(tmp_path / "a.mov")) as container:
        assert container.streams.video[0].codec_context.codec_tag == "apch"


def test_faststart(tmp_path):
    write(tmp_path / "a.mp4", ramp(4, 64, 64))
    data = (tmp_path / "a.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


def broken():
    yield from ramp(4, 64, 64)
    raise ValueError("the decoder broke")


@pytest.mark.parametrize(
    "frames, error",
    [
        (broken, ValueError),
        (lambda: iter(ramp(4, 64, 64)), RenderError),
        (lambda: iter(ramp(9, 32, 64)), RenderError),
    ],
    ids=["decoder fails", "too few", "too small"],
)
def test_failure_leaves_the_old_file_and_nothing_else(frames, error, tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"old")
    with pytest.raises(error):
        video.write_video(path, frames(), width=64, height=64, fps=16, frame_count=9)
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]
    assert path.read_bytes() == b"old"


def test_full_disk_in_the_encoder_stops_the_decoder(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(video, "_encode", full)
    decoded = []

    def endless():
        while True:
            decoded.append(1)
            yield ramp(1, 16, 16)[0]

    with pytest.raises(ResourceError, match="disk is full"):
        video.write_video(tmp_path / "a.mp4", endless(), width=16, height=16, fps=16, frame_count=10_000)
    assert len(decoded) < 100
    assert not list(tmp_path.iterdir())


def test_an_interrupt_leaves_the_queue_unencoded_and_waits_for_nothing(tmp_path, monkeypatch):
    taken = []

    def slow(*job):
        for planes in job[-1]:
            taken.append(planes)
            time.sleep(0.3)

    def interrupted():
        yield from ramp(4, 64, 64)
        raise KeyboardInterrupt

    monkeypatch.setattr(video, "_encode", slow)
    with pytest.raises(KeyboardInterrupt):
        video.write_video(tmp_path / "a.mp4", interrupted(), width=64, height=64, fps=16, frame_count=99)
    assert len(taken) <= 2  # of four in the queue
    assert not list(tmp_path.iterdir())


def test_wrong_requests(tmp_path):
    with pytest.raises(UsageError, match="no codec"):
        video.suffix_for("divx")
    with pytest.raises(UsageError, match=r"\.mov"):
        write(tmp_path / "a.mp4", ramp(1, 64, 64), "prores")
    with pytest.raises(UsageError, match="64 px"):
        write(tmp_path / "a.mp4", ramp(1, 32, 64), "av1")
    with pytest.raises(ResourceError, match="No such file"):
        write(tmp_path / "missing" / "a.mp4", ramp(1, 64, 64))


@pytest.mark.parametrize(
    ("codec", "width", "even"), [("h264", 853, "854x480"), ("h264", 854, None), ("ffv1", 853, None)]
)
def test_what_many_players_cannot_show_is_told(codec, width, even, capsys):
    video.warn_of_player(Console(interactive=False), codec, width, 480)
    said = capsys.readouterr().err
    assert f"--res {even}" in said if even else not said


def test_unreadable_files(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"no video")
    for name in ("a.mp4", "missing.mp4"):
        with pytest.raises(InputError, match=name):
            video.probe(tmp_path / name)
        with pytest.raises(InputError, match=name):
            next(video.read_frames(tmp_path / name))


def test_png_is_exact(tmp_path):
    frames = [torch.rand(3, 20, 31, generator=torch.Generator().manual_seed(i)) for i in range(5)]
    sheet = video.contact_sheet(frames, 3)
    assert sheet.shape == (3, 44, 101)
    assert torch.equal(sheet[:, 24:, 35:66], frames[4])
    video.write_png(tmp_path / "a.png", sheet)
    with av.open(str(tmp_path / "a.png")) as container:
        got = next(container.decode(video=0)).to_ndarray(format="rgb24")
    assert np.array_equal(got, (sheet * 255).round().permute(1, 2, 0).numpy().astype(np.uint8))
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_importing_does_not_load_torch():
    code = "import sys, atlasvid_cli.video; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
