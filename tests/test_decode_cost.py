"""Decoding is refused before anything loads where it would not end."""

import dataclasses
from fractions import Fraction

import pytest

from atlasvid_cli import decode_cost
from atlasvid_cli.cost import rows
from atlasvid_cli.errors import ResourceError
from atlasvid_cli.machine import Machine, compute_device, machine_with_gpu
from atlasvid_cli.memory import model_bytes
from atlasvid_cli.plan import Request, make_plan
from atlasvid_cli.presets import load_preset


def job(codec="h264"):
    return make_plan(Request("tiny", 3840, 2160, Fraction(12), codec=codec))


def test_decoding_alone_needs_what_it_needs_in_a_plan(monkeypatch, tmp_path):
    plan = job()
    patch = plan.preset.geometry.patch
    latents = plan.target.t, plan.target.h * patch, plan.target.w * patch
    [needed] = [row.needed.ram for row in rows(plan) if row.stage == "decode"]
    needed -= model_bytes(plan.preset, compute_device())  # which stays loaded for the next video
    monkeypatch.setattr(decode_cost, "available_ram", lambda: needed)
    decode_cost.check_decode(plan.preset, latents, (3840, 2160), plan.frames, "h264", tmp_path)
    monkeypatch.setattr(decode_cost, "available_ram", lambda: needed - 1)
    with pytest.raises(ResourceError, match="decode_gib"):
        decode_cost.check_decode(plan.preset, latents, (3840, 2160), plan.frames, "h264", tmp_path)


def test_decoding_in_tiles_needs_disk_too(monkeypatch, tmp_path):
    preset = dataclasses.replace(load_preset("tiny"), decode_gib=0.2)
    monkeypatch.setattr(decode_cost, "disk_of", lambda folder: (0, 1 << 20))
    with pytest.raises(ResourceError, match="decoding writes"):
        decode_cost.check_decode(preset, (5, 68, 120), (1920, 1080), 17, "h264", tmp_path)


def test_tiles_fit_a_gpu_however_much_of_it_is_free():
    preset, latents = load_preset("wan2.1-1.3b"), (21, 272, 480)
    tiles = [decode_cost.vae_tile(preset, *latents[1:], machine_with_gpu(gib)) for gib in (80, 24, 12, 8)]
    assert tiles[0] == tiles[1] > tiles[2] > tiles[3]
    for gib in (12, 8):
        gpu = machine_with_gpu(gib)
        needed = decode_cost.decode_memory(preset, latents, 3840, 2160, "h264", gpu)
        assert 0.7 * gpu.vram < needed.vram <= 0.9 * gpu.vram
        used = Machine(gpu.device, 2**30)  # by other programs
        assert decode_cost.vae_tile(preset, *latents[1:], used) == decode_cost.vae_tile(preset, *latents[1:], gpu)
    least = decode_cost.decode_memory(preset, latents, 3840, 2160, "h264", tight := machine_with_gpu(1))
    assert decode_cost.vae_tile(preset, *latents[1:], tight) == 8 and least.vram > tight.vram


def test_decoding_alone_asks_for_the_disk_of_its_file(monkeypatch, tmp_path):
    video = decode_cost.file_bytes(1920, 1080, 17, "ffv1")
    monkeypatch.setattr(decode_cost, "disk_of", lambda folder: (0, video - 1))
    with pytest.raises(ResourceError, match="decoding writes"):
        decode_cost.check_decode(load_preset("tiny"), (5, 68, 120), (1920, 1080), 17, "ffv1", tmp_path)
    decode_cost.check_decode(load_preset("tiny"), (5, 68, 120), (1920, 1080), 17, "h264", tmp_path)


@pytest.mark.parametrize("codec", ["hevc10", "av1"])
def test_what_encodes_is_counted_by_its_codec(codec):
    [h264], [other] = ([row.needed.ram for row in rows(job(c)) if row.stage == "decode"] for c in ("h264", codec))
    assert other - h264 > 1.4 * 2**30  # at 4K (docs/LOG.md)


def test_frames_lie_in_host_memory_wherever_they_are_decoded():
    preset = load_preset("tiny")
    here = decode_cost.decode_memory(preset, (5, 136, 240), 3840, 2160, "h264", machine_with_gpu(80))
    frames = 2 * 3 * 4 * 3840 * 2176  # of fp32: one that is written and one that is made
    assert frames < here.host < frames + 2**30 and here.device < 3 * 2**30
