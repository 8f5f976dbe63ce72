"""Frames to video files and back, through PyAV, with colour that is stated and not guessed.

Frames are written as BT.709 in limited range at the bit depth of the codec, and tagged so. Files appear under their
name only when they are complete, and the same frames give the same bytes.
"""

import itertools
import os
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import av
import numpy as np

from .errors import InputError, RenderError, UsageError, one_line
from .store import replacing
from .ycbcr import to_planes

if TYPE_CHECKING:
    import torch

    from .console import Console


class Codec(NamedTuple):
    """How a codec is written. Subsampled H.264, H.265 and ProRes cannot hold odd sizes, which are written as 4:4:4."""

    encoder: str
    suffixes: tuple[str, ...]  # containers that may hold it, the usual one first
    pixels: str
    pixels_odd: str
    options: dict[str, str]
    tag: str | None = None
    smallest: int = 1  # pixels a side


# Thread counts are fixed, not "one a core", because they change the bytes.
CODECS = {
    "h264": Codec(
        "libx264", (".mp4", ".mov", ".mkv"), "yuv420p", "yuv444p", {"preset": "veryfast", "crf": "17", "threads": "4"}
    ),
    "hevc10": Codec(
        "libx265",
        (".mp4", ".mov", ".mkv"),
        "yuv420p10le",
        "yuv444p10le",
        {"preset": "fast", "crf": "18", "x265-params": "log-level=none:info=0:frame-threads=2"},
        tag="hvc1",  # what QuickTime and browsers play
    ),
    # below 64 px SVT-AV1 writes past its buffers
    "av1": Codec(
        "libsvtav1", (".mp4", ".mkv"), "yuv420p10le", "yuv420p10le", {"preset": "8", "crf": "22"}, smallest=64
    ),
    # 422 HQ; 4444 for odd sizes, where FFmpeg's 4:2:2 encoder leaves garbage in the last columns
    "prores": Codec("prores_ks", (".mov", ".mkv"), "yuv422p10le", "yuv444p10le", {"threads": "4"}),
    "ffv1": Codec(
        "ffv1",
        (".mkv",),
        "yuv444p10le",
        "yuv444p10le",
        {"level": "3", "slices": "16", "slicecrc": "1", "g": "1", "threads": "4"},
    ),
}

BT709 = 1  # the code of its primaries, transfer and matrix in every container, and of its matrix in swscale
LIMITED, FULL = 1, 2

# swscale's bilinear, with chroma interpolated and rounded exactly: its default is 12 dB worse
SWSCALE_FLAGS = 0x2 | 0x2000 | 0x4000 | 0x40000

QUEUED_FRAMES = 4  # 12 to 50 MB each at 4K: enough for the encoder to work through a pause of the decoder


def suffix_for(codec: str) -> str:
    """The usual file suffix of a codec, `.mp4` for instance; `UsageError` for one that is not in `CODECS`."""
    return _codec(codec).suffixes[0]


def _codec(name: str) -> Codec:
    if name not in CODECS:
        raise UsageError(f"There is no codec '{name}': choose one of {', '.join(CODECS)}.")
    return CODECS[name]


def check_target(path: Path, codec: str, width: int, height: int) -> None:
    """Raises UsageError where codec, size and file suffix do not go together."""
    spec = _codec(codec)
    if path.suffix.lower() not in spec.suffixes:
        raise UsageError(f"'{path.name}' cannot hold {codec}: name it *{' or *'.join(spec.suffixes)}.")
    if min(width, height) < spec.smallest:
        raise UsageError(
            f"{codec} cannot encode {width}x{height}: choose another codec, or {spec.smallest} px or more."
        )


def warn_of_player(console: "Console", codec: str, width: int, height: int) -> None:
    """A word about odd sides in 8-bit H.264, whose chroma is then as large as its luma."""
    if codec == "h264" and (width % 2 or height % 2):
        even = f"{width + width % 2}x{height + height % 2}"
        console.warn(
            f"{width}x{height} has an odd side, so that H.264 is written as 4:4:4, which many players cannot show;"
            f" --res {even} plays everywhere"
        )


def write_video(
    path: Path,
    frames: Iterator["torch.Tensor"],
    *,
    width: int,
    height: int,
    fps: Fraction | float,
    frame_count: int,
    codec: str = "h264",
    metadata: dict[str, str] | None = None,
    on_frame: Callable[[int], None] | None = None,
) -> None:
    """Writes the first `frame_count` of `frames` (3, H, W) in 0..1, cropped to the top left width x height.

    Encoding runs in a thread behind a bounded queue. `on_frame` gets the number of frames handed over so far.
    `RenderError` when frames run out or are too small, `UsageError` when codec, size and suffix do not go together,
    `ResourceError` when the disk is full or the place cannot be written; nothing is left behind then.
    """
    check_target(path, codec, width, height)
    spec = _codec(codec)
    pixels = spec.pixels_odd if width % 2 or height % 2 else spec.pixels
    planes: queue.Queue[list[np.ndarray]] = queue.Queue(QUEUED_FRAMES)
    given_up = threading.Event()
    with replacing(path, path.suffix) as temporary, ThreadPoolExecutor(1, "encode") as pool:
        rate = Fraction(fps).limit_denominator(1001)
        taken = _taken(planes, frame_count, given_up)
        encoder = pool.submit(_encode, temporary, spec, pixels, width, height, rate, frame_count, metadata or {}, taken)
        done = 0
        try:
            for frame in itertools.islice(frames, frame_count):  # asks for none after the last
                if frame.shape[1] < height or frame.shape[2] < width:
                    raise RenderError(f"The frames are {frame.shape[2]}x{frame.shape[1]}, less than {width}x{height}.")
                _put(planes, to_planes(frame[:, :height, :width], pixels), encoder)
                del frame  # while the next one is made
                done += 1
                if on_frame:
                    on_frame(done)
            if done < frame_count:
                raise RenderError(f"The decoder gave {done} frames, but the video needs {frame_count}.")
            encoder.result()
        except BaseException:
            given_up.set()  # never waits, so that a second interrupt cannot leave the encoder waiting for ever
            raise


def _taken(planes: queue.Queue[list[np.ndarray]], count: int, given_up: threading.Event) -> Iterator[list[np.ndarray]]:
    """The next `count` of `planes` as they come; RenderError once nobody wants them encoded."""
    while count:
        if given_up.is_set():
            raise RenderError("The video was given up.")
        with suppress(queue.Empty):
            yield planes.get(timeout=0.2)
            count -= 1


def _put(planes: queue.Queue[list[np.ndarray]], item: list[np.ndarray], encoder: Future) -> None:
    """Puts `item` as soon as there is room. Raises what the encoder failed with: nobody empties the queue then."""
    while True:
        if encoder.done():
            encoder.result()
        try:
            return planes.put(item, timeout=0.2)
        except queue.Full:
            continue


def _encode(
    path: Path,
    codec: Codec,
    pixels: str,
    width: int,
    height: int,
    rate: Fraction,
    frame_count: int,
    metadata: dict[str, str],
    frames: Iterator[list[np.ndarray]],
) -> None:
    """Encodes frames (planes, see `to_planes`) into `path`, whose suffix names the container."""
    options = {"fflags": "+bitexact"}  # no dates, random ids or library versions
    if path.suffix.lower() != ".mkv":
        options["movflags"] = "faststart+use_metadata_tags"
        options["movie_timescale"] = str(rate.numerator * 100)  # in the default of 1 ms durations are rounded down
    os.environ.setdefault("SVT_LOG", "1")  # SVT-AV1 prints to stderr by itself: errors only
    with av.open(str(path), "w", options=options) as container:
        container.metadata.update(metadata)
        stream = container.add_stream(codec.encoder, rate=rate, options=codec.options)
        stream.width, stream.height, stream.pix_fmt = width, height, pixels
        context = stream.codec_context
        context.color_primaries = context.color_trc = context.colorspace = BT709
        context.color_range = LIMITED
        if frame_count <= 2:  # fewer than x265 reorders, which then leaves their decoding times uninitialised
            context.max_b_frames = 0
        context.flags |= av.codec.context.Flags.bitexact
        if codec.tag and path.suffix.lower() != ".mkv":
            context.codec_tag = codec.tag
        for i, planes in enumerate(frames):
            frame = av.VideoFrame(width, height, pixels)
            for plane, values in zip(frame.planes, planes, strict=True):
                rows = np.frombuffer(plane, values.dtype).reshape(plane.height, -1)  # rows are padded
                rows[:, : values.shape[1]] = values
            frame.color_primaries = frame.color_trc = frame.colorspace = BT709
            frame.color_range = LIMITED
            frame.pts = i
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@contextmanager
def opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """The container and best video stream of `path`; `InputError` when there is none, or while it is read."""
    try:
        # absolute: "a:b.mp4" would name a protocol
        with av.open(str(path.absolute()), metadata_errors="replace") as container:  # old files name things in Latin-1
            stream = container.streams.best("video")
            if stream is None:
                raise InputError(f"'{path}' holds no video: give a file that does.")
            if stream.codec_context is None:
                raise InputError(f"'{path}' is in a codec that cannot be read here: convert it first.")
            yield container, stream
    except av.error.FFmpegError as error:
        raise InputError(
            f"'{path}' cannot be read as a video ({one_line(error.strerror)}): check the file, or save it again."
        ) from error


def tags(path: Path) -> dict[str, str]:
    """What a video file says beside its streams, in lower case, as Matroska keeps no case; InputError as `probe`."""
    with opened(path) as (container, _):
        containers_own = ("major_brand", "minor_version", "compatible_brands", "encoder")
        return {k.lower(): v for k, v in container.metadata.items() if k.lower() not in containers_own}


def whole_frames(path: Path) -> int:
    """Frames that a video file holds all bytes of: of one that was cut short fewer than it says."""
    count = 0
    with opened(path) as (container, stream), suppress(av.FFmpegError):
        for packet in container.demux(stream):
            count += packet.size > 0 and not packet.is_corrupt
    return count


def probe(path: Path) -> dict[str, Any]:
    """What a video file says of itself; its frames are counted, not decoded. `InputError` when it is not a video.

    Keys: width, height, fps, frames, seconds, codec, pix_fmt, color_primaries, color_trc, color_space, color_range
    and metadata (its `tags`).
    """
    metadata = tags(path)
    with opened(path) as (container, stream):
        context = stream.codec_context
        names = {BT709: "bt709"}
        count = stream.frames or sum(packet.size > 0 for packet in container.demux(stream))
        rate = stream.average_rate or Fraction(0)
        return {
            "width": stream.width,
            "height": stream.height,
            "fps": float(rate),
            "frames": count,
            "seconds": float(stream.duration * stream.time_base if stream.duration else count / rate if rate else 0),
            "codec": context.codec.canonical_name,
            "pix_fmt": context.pix_fmt,
            "color_primaries": names.get(context.color_primaries, "other"),
            "color_trc": names.get(context.color_trc, "other"),
            "color_space": names.get(context.colorspace, "other"),
            "color_range": {LIMITED: "limited", FULL: "full"}.get(context.color_range, "other"),
            "metadata": metadata,
        }


def read_frames(path: Path) -> Iterator[np.ndarray]:
    """Frames (H, W, 3) uint8 RGB, converted as the file's tags say."""
    with opened(path) as (container, stream):
        for frame in container.decode(stream):
            yield rgb(frame)


def rgb(frame: Any) -> np.ndarray:
    """A decoded frame of any pixel format as (H, W, 3) uint8 RGB, transparent pixels on black.

    Matrix and range are those that the frame is tagged with; untagged ones are guessed as players do: BT.601 below
    720p and BT.709 from there, limited unless the format says full.
    """
    layout, tagged = frame.format, int(frame.colorspace)
    has_alpha = layout.has_palette or any(c.is_alpha for c in layout.components)
    options: dict[str, Any] = {"format": "rgba" if has_alpha else "rgb24", "interpolation": SWSCALE_FLAGS}
    if not layout.is_rgb and not layout.has_palette:
        # swscale's codes: BT.709, FCC, BT.601, 240M, BT.2020
        guess = BT709 if frame.width >= 1280 or frame.height >= 720 else 5
        options["src_colorspace"] = {1: BT709, 4: 4, 5: 5, 6: 5, 7: 7, 9: 9, 10: 9}.get(tagged, guess)
        is_full = int(frame.color_range) == FULL or layout.name.startswith("yuvj")
        options |= {"src_color_range": FULL if is_full else LIMITED, "dst_color_range": FULL}
    image = frame.reformat(**options).to_ndarray()
    if has_alpha:
        image = (image[..., :3].astype(np.uint16) * image[..., 3:] // 255).astype(np.uint8)
    if len(layout.components) < 3 and int(frame.color_range) == LIMITED:  # swscale takes all gray for full
        image = ((image.clip(16, 235) - 16.0) * (255 / 219)).round().astype(np.uint8)
    return image


def contact_sheet(frames: list["torch.Tensor"], columns: int) -> "torch.Tensor":
    """One image (3, H', W') of equally large frames (3, H, W) in 0..1, row by row with a narrow black gap."""
    gap = 4
    _, height, width = frames[0].shape
    rows = -(-len(frames) // columns)
    sheet = frames[0].new_zeros(3, rows * (height + gap) - gap, columns * (width + gap) - gap)
    for i, frame in enumerate(frames):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        sheet[:, top : top + height, left : left + width] = frame
    return sheet


def write_png(path: Path, image: "torch.Tensor") -> None:
    """Writes an image (3, H, W) in 0..1 as an 8-bit RGB PNG. `ResourceError` when the disk does not take it."""
    values = (image.float().clamp(0, 1) * 255).round().permute(1, 2, 0).contiguous().cpu().numpy().astype(np.uint8)
    context = av.CodecContext.create("png", "w")
    context.height, context.width = values.shape[:2]
    context.pix_fmt, context.time_base = "rgb24", Fraction(1)
    packets = [*context.encode(av.VideoFrame.from_ndarray(values, "rgb24")), *context.encode(None)]
    with replacing(path, path.suffix) as temporary:
        temporary.write_bytes(b"".join(bytes(packet) for packet in packets))
