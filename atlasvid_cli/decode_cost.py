"""What decoding latents to a file takes: memory, disk, tiles, and whether this machine has it."""

from pathlib import Path
from typing import TYPE_CHECKING

from .errors import ResourceError
from .machine import Machine, available_ram, decode_dtype, disk_of, this_machine
from .memory import GIB, GPU_SHARE, PROGRAM_VRAM, Memory
from .presets import Preset

if TYPE_CHECKING:
    from .plan import Plan
    from .stages import Stage

# bytes a pixel and frame of a video file, on the safe side of detailed footage at the quality of `video.CODECS`
VIDEO_BYTES = {"h264": 0.05, "hevc10": 0.05, "av1": 0.05, "prores": 0.8, "ffv1": 2.0}
# frames that encoders look ahead, and bytes a pixel that each takes meanwhile: of even sizes, and of odd ones in 4:4:4
# (docs/LOG.md)
ENCODER_FRAMES = 40
ENCODER_BYTES = {"h264": (3, 5), "hevc10": (9, 15), "av1": (8, 8), "prores": (2, 3), "ffv1": (5, 5)}

# what the allocator and the convolutions' scratch make of the VAE's tensors, by bytes a value: measured in fp32
# (docs/LOG.md); in bf16 not measured with this decoder: its predecessor's measured peak over today's estimate
KEPT = {4: 1.25, 2: 1.95}


def file_bytes(width: int, height: int, frames: int, codec: str) -> int:
    return int(width * height * frames * VIDEO_BYTES[codec])


def decode_memory(
    preset: Preset, latents: tuple[int, int, int], width: int, height: int, codec: str | None, machine: Machine
) -> Memory:
    """What decoding `latents` (t, h, w) to frames of `width` x `height` pixels needs beside the program, with what
    encodes them where there is a `codec`."""
    from .vae_cost import decode_bytes, output_bytes

    t, h, w = latents
    size, tile = vae_itemsize(preset, machine), vae_tile(preset, h, w, machine)
    on_gpu = machine.device.kind == "cuda"
    frames = output_bytes(preset.vae, h, w)
    decoder = int(KEPT[size] * (decode_bytes(preset.vae, h, w, tile, size, not on_gpu) + (0 if on_gpu else frames)))
    decoder += preset.vae_parameters * size
    host = t * h * w * preset.transformer.channels * 4 + (frames if on_gpu else 0)
    if codec:
        held = min(ENCODER_FRAMES, 1 + preset.geometry.temporal * (t - 1))
        host += held * ENCODER_BYTES[codec][width % 2 or height % 2] * width * height
    return Memory(decoder, host) if on_gpu else Memory(0, host + decoder)


def check_decode(
    preset: Preset, latents: tuple[int, int, int], size: tuple[int, int], frames: int, codec: str, folder: Path
) -> None:
    """Raises ResourceError, before anything is loaded, where saved latents cannot be decoded to a video of that `size`
    (width, height) in `folder`, in the memory and on the disk here."""
    from .vae_cost import spool_bytes

    video = file_bytes(*size, frames, codec)
    tiles = spool_bytes(preset.vae, *latents) if vae_tile(preset, *latents[1:]) else 0
    if tiles + video > (free := disk_of(folder)[1]):
        raise ResourceError(
            f"decoding writes {(tiles + video) / GIB:.1f} GiB and {folder} has {free / GIB:.1f} GiB free;"
            " free some space or choose another --output"
        )
    machine = this_machine()
    needed = decode_memory(preset, latents, *size, codec, machine)
    for kind, needs, free in (
        ("GPU memory", needed.vram, machine.vram),
        ("memory", needed.ram, available_ram()),
    ):
        if needs > free:
            raise ResourceError(
                f"decoding needs {needs / GIB:.1f} GiB of {kind} and {free / GIB:.1f} GiB are free;"
                " close other programs, or lower decode_gib in the preset"
            )


def vae_tile(preset: Preset, h: int, w: int, machine: Machine | None = None) -> int | None:
    """The tile side in latents with which decoding h x w latents fits in `decode_gib`, and in a GPU that has less; None
    for whole frames."""
    from .vae_cost import SMALLEST_TILE, choose_tile, decode_bytes

    machine = machine or this_machine()
    size, on_gpu = vae_itemsize(preset, machine), machine.device.kind == "cuda"
    budget = int(preset.decode_gib * GIB)
    if on_gpu:
        room = GPU_SHARE * machine.device.memory - PROGRAM_VRAM - preset.vae_parameters * size
        # where not even the smallest tile fits, the plan says so, as of any stage
        least = decode_bytes(preset.vae, h, w, SMALLEST_TILE, size, banded=False)
        budget = min(budget, max(int(room / KEPT[size]), least))
    return choose_tile(preset.vae, h, w, budget, size, not on_gpu)


def start_tile(plan: "Plan", stage: "Stage", machine: Machine | None = None) -> int | None:
    """`vae_tile` of the level below a detail level that starts from its pixels."""
    below, patch = plan.below(stage), plan.preset.geometry.patch
    return vae_tile(plan.preset, below.h * patch, below.w * patch, machine)


def vae_itemsize(preset: Preset, machine: Machine) -> int:
    """Bytes of a value in the dtype that the VAE computes in."""
    return decode_dtype(preset.decode_dtype, machine.device).itemsize
