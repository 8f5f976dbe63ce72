"""Clips of every kind are read as a player shows them: right colours, upright, at the right instants, cropped."""

from fractions import Fraction

import av
import numpy as np
import pytest
import torch

from atlasvid_cli import footage
from atlasvid_cli.errors import InputError

COLOUR = (200, 60, 30)
CORNERS = np.array([[(255, 0, 0), (0, 255, 0)], [(0, 0, 255), (0, 0, 0)]], np.uint8)
NAMES = {(255, 0, 0): "R", (0, 255, 0): "G", (0, 0, 255): "B", (0, 0, 0): "K"}


def write(path, frames, codec="ffv1", pixels="bgr0", times=None, rate=10, prepare=None):
    """Frames (H, W, 3 or 4) uint8, at `times` in ms (or one a tick of `rate`)."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pixels
        if prepare:
            prepare(stream)
        if times:
            stream.codec_context.time_base = Fraction(1, 1000)
        for i, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image, "rgba" if image.shape[2] == 4 else "rgb24")
            frame = frame.reformat(format=pixels)
            frame.pts, frame.time_base = (times[i], Fraction(1, 1000)) if times else (i, 1 / Fraction(rate))
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def planes(path, codec, pixels, values, matrix, full, size=(96, 64)):
    """A clip of one colour, given as its planes' code values, tagged with matrix and range (None: untagged)."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        (stream.width, stream.height), stream.pix_fmt = size, pixels
        tags = {"colorspace": matrix, "color_range": None if full is None else 1 + full}
        for owner in (stream.codec_context, frame := av.VideoFrame(*size, pixels)):
            for name, value in tags.items():
                if value is not None:
                    setattr(owner, name, value)
        for plane, value in zip(frame.planes, values, strict=True):
            np.frombuffer(plane, np.uint16 if "le" in pixels else np.uint8)[:] = round(value)
        for i in range(2):
            frame.pts = i
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def codes(matrix, full, bits=8):
    """Y, Cb, Cr of COLOUR."""
    red, blue = {1: (0.2126, 0.0722), 5: (0.299, 0.114), 9: (0.2627, 0.0593)}[matrix]
    r, g, b = (c / 255 for c in COLOUR)
    y = red * r + (1 - red - blue) * g + blue * b
    cb, cr = (b - y) / (2 - 2 * blue), (r - y) / (2 - 2 * red)
    step = 2 ** (bits - 8)
    if full:
        return [y * (256 * step - 1), *(c * (256 * step - 1) + 128 * step for c in (cb, cr))]
    return [(219 * y + 16) * step, *((224 * c + 128) * step for c in (cb, cr))]


def read(path, fps=10, count=1, shown=(32, 32), size=None):
    return list(footage.read_clip(footage.open_clip(path), Fraction(fps), count, shown, size))


def mean(frame):
    return ((frame.mean((1, 2)) + 1) * 127.5).tolist()


def grays(count, size=(16, 16)):
    """Frame i is gray of level 10 * i."""
    return [np.full((*size, 3), 10 * i, np.uint8) for i in range(count)]


def levels(frames):
    return [round(mean(f)[0] / 10) for f in frames]


@pytest.mark.parametrize(
    "codec, pixels, bits, full",  # x265 drops the tag of the full range
    [("libx264", "yuv420p", 8, False), ("libx264", "yuv420p", 8, True), ("libx265", "yuv420p10le", 10, False)],
)
@pytest.mark.parametrize("matrix", [1, 5, 9])
def test_colours_are_those_of_the_tags(tmp_path, codec, pixels, bits, matrix, full):
    path = planes(tmp_path / "a.mkv", codec, pixels, codes(matrix, full, bits), matrix, full)
    assert mean(read(path)[0]) == pytest.approx(COLOUR, abs=2)


@pytest.mark.parametrize("size, matrix", [((96, 64), 5), ((1280, 720), 1)])
def test_untagged_colours_are_guessed_from_the_size(tmp_path, size, matrix):
    path = planes(tmp_path / "a.mkv", "libx264", "yuv420p", codes(matrix, False), None, None, size)
    assert mean(read(path)[0]) == pytest.approx(COLOUR, abs=2)


@pytest.mark.parametrize("transfer, is_hdr", [(1, False), (16, True), (18, True)])
def test_hdr_is_known_by_its_transfer(tmp_path, transfer, is_hdr):
    def prepare(stream):
        stream.codec_context.color_trc = transfer

    path = write(tmp_path / "a.mkv", grays(2), "libx264", "yuv444p", prepare=prepare)
    assert footage.open_clip(path).is_hdr == is_hdr


@pytest.mark.parametrize("full, level", [(None, 128), (False, 130.4), (True, 128)])
def test_gray_honours_its_range(tmp_path, full, level):
    path = planes(tmp_path / "a.mkv", "ffv1", "gray", [128], None, full)
    assert mean(read(path)[0]) == pytest.approx([level] * 3, abs=0.6)


@pytest.mark.parametrize(
    "name, codec, pixels",
    [
        ("a.mov", "qtrle", "rgb24"),
        ("a.mov", "qtrle", "argb"),
        ("a.mkv", "ffv1", "bgra"),
        ("a.mkv", "ffv1", "yuva420p"),
        ("a.mov", "prores_ks", "yuva444p10le"),
        ("a.gif", "gif", "rgb8"),
        ("a.avi", "mjpeg", "yuvj420p"),
    ],
)
@pytest.mark.parametrize("alpha", [255, 0])
def test_pixel_formats_and_transparency(tmp_path, name, codec, pixels, alpha):
    image = np.full((64, 96, 4), alpha, np.uint8)
    image[..., :3] = COLOUR
    clear = alpha == 0 and "a" in pixels
    found = mean(read(write(tmp_path / name, [image] * 2, codec, pixels))[0])
    assert found == pytest.approx((0, 0, 0) if clear else COLOUR, abs=20 if pixels == "rgb8" else 2)


@pytest.mark.parametrize(
    "turn, expected",
    [
        ((0, False, False), "RGBK"),
        ((90, False, False), "GKRB"),
        ((-90, False, False), "BRKG"),
        ((180, False, False), "KBGR"),
        ((0, True, False), "GRKB"),
        ((0, False, True), "BKRG"),
        ((90, True, False), "KGBR"),
    ],
)
def test_a_turned_clip_is_upright(tmp_path, turn, expected):
    image = CORNERS.repeat(32, 0).repeat(48, 1)
    path = write(tmp_path / "a.mp4", [image] * 2, "libx264", "yuv444p", prepare=lambda s: s.set_display_rotation(*turn))
    shown = (32, 48) if abs(turn[0]) == 90 else (48, 32)
    clip = footage.open_clip(path)
    assert (clip.width, clip.height) == ((64, 96) if abs(turn[0]) == 90 else (96, 64))
    frame = read(path, shown=shown)[0]
    assert frame.shape == (3, shown[1], shown[0])
    w, h = shown
    spots = [frame[:, y, x] for y in (h // 4, 3 * h // 4) for x in (w // 4, 3 * w // 4)]
    assert "".join(NAMES[tuple(int(c > 0) * 255 for c in spot)] for spot in spots) == expected


def test_the_centre_of_the_wanted_aspect_is_shown(tmp_path):
    image = np.zeros((60, 101, 3), np.uint8)  # odd width
    image[:, 20:80, 0] = 255  # about the central square
    path = write(tmp_path / "a.mkv", [image])
    assert mean(read(path, shown=(30, 30))[0]) == pytest.approx((255, 0, 0), abs=6)
    whole = read(path, shown=(101, 60))[0]
    torch.testing.assert_close((whole + 1) * 127.5, torch.from_numpy(image).permute(2, 0, 1).float(), atol=0.1, rtol=0)
    tall = read(path, shown=(10, 60))[0]  # 10 columns of the middle
    assert mean(tall) == pytest.approx((255, 0, 0), abs=1)


def test_a_crop_is_where_it_is_asked_for(tmp_path):
    path = write(tmp_path / "a.mkv", [CORNERS.repeat(32, 0).repeat(32, 1)] * 4)
    corners = [footage.Crop(2, x, y) for y in (0, 1) for x in (0, 1)]
    frames = footage.read_clip(footage.open_clip(path), Fraction(10), 4, (32, 32), crop_at=lambda k: corners[k])
    found = [tuple(round(v) for v in mean(f)) for f in frames]
    assert [NAMES[f] for f in found] == ["R", "G", "B", "K"]
    path = write(tmp_path / "b.mkv", [CORNERS.repeat(32, 0).repeat(32, 1)], rate=1)  # one frame, four crops
    frames = footage.read_clip(footage.open_clip(path), Fraction(10), 4, (32, 32), crop_at=lambda k: corners[k])
    assert [NAMES[tuple(round(v) for v in mean(f))] for f in frames] == ["R", "G", "B", "K"]


def test_wide_pixels_are_made_square(tmp_path):
    """Shot 40 wide with pixels twice as wide as high: shown at 80x40 nothing is cropped, at 40x40 half is."""
    image = np.zeros((40, 40, 3), np.uint8)
    image[:, 10:30] = 255

    def prepare(stream):
        stream.codec_context.sample_aspect_ratio = Fraction(2)

    path = write(tmp_path / "a.mkv", [image], "libx264", "yuv444p", prepare=prepare)
    assert mean(read(path, shown=(80, 40))[0])[0] == pytest.approx(127.5, abs=2)
    assert mean(read(path, shown=(40, 40))[0])[0] == pytest.approx(255, abs=2)


def test_scaling_down_averages(tmp_path):
    """A checkerboard of single pixels becomes gray, and not moire."""
    image = np.indices((128, 128)).sum(0)[..., None].repeat(3, 2) % 2 * 255
    frame = read(write(tmp_path / "a.mkv", [image.astype(np.uint8)]), shown=(24, 24))[0]
    assert frame.abs().max() < 0.05


def test_what_the_grid_adds_repeats_the_edge(tmp_path):
    path = write(tmp_path / "a.mkv", [CORNERS.repeat(16, 0).repeat(16, 1)])
    small, large = read(path)[0], read(path, size=(40, 48))[0]
    assert large.shape == (3, 48, 40)
    assert torch.equal(large[:, :32, :32], small)
    assert torch.equal(large[:, 47, :32], small[:, 31]) and torch.equal(large[:, :32, 39], small[:, :, 31])


@pytest.mark.parametrize(
    "rate, fps, expected",
    [
        (10, 10, [0, 1, 2, 3, 4, 5]),
        (20, 10, [0, 2, 4, 6, 8, 10]),
        (24, 16, [0, 1, 3, 4, 6, 7]),  # in Matroska's milliseconds frame 1 is at 42, not at 41.67
        (24, 3, [0, 8, 16, 23, 23, 23]),  # frame 16 is at 667 ms, later than 2/3 s
        (5, 10, [0, 0, 1, 1, 2, 2]),
        (Fraction(30000, 1001), 4, [0, 7, 14, 22, 23, 23]),
    ],
)
@pytest.mark.parametrize("name, codec", [("a.mkv", "ffv1"), ("a.mov", "qtrle")])
def test_each_instant_has_the_frame_that_is_on_screen(tmp_path, rate, fps, expected, name, codec):
    path = write(tmp_path / name, grays(24), codec, "rgb24" if codec == "qtrle" else "bgr0", rate=rate)
    assert levels(read(path, fps, 6)) == expected


def test_a_variable_frame_rate_is_taken_by_its_time_stamps(tmp_path):
    path = write(tmp_path / "a.mkv", grays(5), times=[500, 600, 1400, 1450, 2000])
    clip = footage.open_clip(path)
    assert clip.start == Fraction(1, 2) and clip.last == Fraction(2)
    # counted from the first frame
    assert levels(footage.read_clip(clip, Fraction(4), 8, (32, 32))) == [0, 1, 1, 1, 3, 3, 4, 4]


def test_frames_without_time_stamps_are_counted(tmp_path):
    path = write(tmp_path / "a.h264", grays(12), "libx264", "yuv444p", rate=20)
    clip = footage.open_clip(path)
    assert clip.rate == clip.fps and clip.seconds == 12 / clip.rate
    assert levels(footage.read_clip(clip, clip.rate / 2, 6, (16, 16))) == [0, 2, 4, 6, 8, 10]


def test_reordered_frames_in_avi_are_shown_in_order(tmp_path):
    def prepare(stream):
        stream.codec_context.options = {"x264-params": "scenecut=0:bframes=3:b-adapt=0"}

    path = write(tmp_path / "a.avi", grays(24), "libx264", "yuv420p", rate=20, prepare=prepare)
    assert levels(read(path, 20, 24, (16, 16))) == list(range(24))


def test_a_recording_cut_anywhere_begins_with_its_first_whole_frame(tmp_path):
    def prepare(stream):
        stream.codec_context.gop_size, stream.codec_context.max_b_frames = 8, 0
        stream.codec_context.options = {"x264-params": "scenecut=0"}  # which would make each frame whole

    path = write(tmp_path / "a.ts", grays(24), "libx264", "yuv420p", prepare=prepare)
    whole, second = path.read_bytes(), 188 * 8  # bytes of a packet: tables, then the frames' own
    path.write_bytes(whole[: 188 * 3] + whole[second:])
    assert levels(read(path, 10, 5, (16, 16))) == [8, 9, 10, 11, 12]
    assert footage.open_clip(path).seconds == Fraction(16, 10)


def test_a_picture_is_a_clip_of_one_frame(tmp_path):
    assert levels(read(write(tmp_path / "a.png", grays(3)[2:], "png", "rgb24"), count=3)) == [2, 2, 2]


def test_the_length_is_exact_and_the_content_is_known_by_its_hash(tmp_path):
    a = footage.open_clip(write(tmp_path / "a.mov", grays(24), "qtrle", "rgb24", rate=Fraction(30000, 1001)))
    b = footage.open_clip(write(tmp_path / "b.mov", grays(23), "qtrle", "rgb24"))
    assert a.seconds == Fraction(24 * 1001, 30000) and b.seconds == Fraction(23, 10)
    assert a.fps == Fraction(30000, 1001) and b.fps == 10
    assert a.sha256 != b.sha256
    (tmp_path / "c.mov").write_bytes(a.path.read_bytes())
    assert footage.open_clip(tmp_path / "c.mov").sha256 == a.sha256


def test_one_frame_at_a_time_is_decoded(tmp_path, monkeypatch):
    converted = []
    monkeypatch.setattr(footage, "rgb", lambda f, real=footage.rgb: converted.append(1) or real(f))
    path = write(tmp_path / "a.mkv", grays(20))
    frames = footage.read_clip(footage.open_clip(path), Fraction(20), 40, (16, 16))
    next(frames)
    assert len(converted) == 1
    list(frames)
    assert len(converted) == 20  # a frame shown twice is converted once


def sound(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 44100), np.float32), "fltp", "mono")
        frame.rate = 44100
        container.mux([*stream.encode(frame), *stream.encode(None)])


@pytest.mark.parametrize("kind", ["missing", "folder", "text", "empty", "sound", "cut"])
def test_what_is_no_video_is_said_so(tmp_path, kind):
    path = tmp_path / "a.mp4"
    if kind == "folder":
        path.mkdir()
    elif kind == "sound":
        sound(path)
    elif kind == "cut":  # an mp4 without its index
        write(path, grays(20), "libx264", "yuv420p")
        path.write_bytes(path.read_bytes()[:1000])
    elif kind != "missing":
        path.write_bytes(b"no video" if kind == "text" else b"")
    with pytest.raises(InputError, match=r"a\.mp4"):
        footage.open_clip(path)


def test_a_clip_that_stops_decoding_is_not_frozen_silently(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (40, 32, 32, 3), np.uint8)
    path = write(tmp_path / "a.mkv", list(noise))
    clip = footage.open_clip(path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match=r"only.*cut it there"):
        list(footage.read_clip(clip, Fraction(10), 40, (32, 32)))
    assert len(list(footage.read_clip(clip, Fraction(10), 5, (32, 32)))) == 5
