"""What decoding is said to take is what it takes."""

import weakref
from dataclasses import fields

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from atlasvid_cli import banded, decode, vae_cost
from atlasvid_cli.encode import encode_stream
from atlasvid_cli.errors import ResourceError
from atlasvid_cli.half import HalfEncoder
from atlasvid_cli.presets import Vae
from tests.test_decode import EMBEDDED, IDLE, STILL, WAN21, WAN22, build, latents

LAYOUTS, NAMES = (EMBEDDED, STILL, IDLE, WAN21, WAN22), ("embedded", "still", "idle", "wan2.1", "wan2.2")


def told(config: dict) -> Vae:
    """What a preset says of a VAE of this config."""
    known = {"is_residual": False, "out_channels": 3} | config
    return Vae(**{f.name: known[f.name] for f in fields(Vae) if f.name in known})


class LiveBytes(TorchDispatchMode):
    """Peak bytes of tensors that operators made and that are still referenced."""

    def __init__(self, module):
        super().__init__()
        self.live, self.peak = 0, 0
        self.seen = weakref.WeakSet(p.untyped_storage() for p in module.parameters())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage not in self.seen:
                    self.seen.add(storage)
                    self.live += storage.nbytes()
                    weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def _free(self, size):
        self.live -= size


@pytest.mark.parametrize("config", LAYOUTS, ids=NAMES)
@pytest.mark.parametrize(
    ("tile", "dtype", "band"),
    [
        (None, torch.float32, 1 << 14),  # several bands a frame
        (None, torch.float32, vae_cost.BAND),
        (8, torch.float32, vae_cost.BAND),
        (None, torch.bfloat16, vae_cost.BAND),
    ],
    ids=str,
)
def test_memory_is_as_predicted(config, tile, dtype, band, tmp_path, monkeypatch):
    monkeypatch.setattr(banded, "BAND", band)
    monkeypatch.setattr(vae_cost, "BAND", band)
    vae, z = build(config, live=False).to(dtype), latents(config, 3, 16, 40 if tile else 32)
    list(decode.decode_stream(vae, z[:, :1, :2, :2]))
    with LiveBytes(vae) as counter:
        for _ in decode.decode_stream(vae, z, tile=tile, spool=tmp_path):
            pass
    seen = vae_cost.seen_at_once(told(config), *z.shape[-2:], tile)
    predicted = vae_cost.decode_bytes(told(config), *z.shape[-2:], tile, dtype.itemsize)
    predicted += vae_cost.output_bytes(told(config), *seen)
    assert predicted == pytest.approx(counter.peak, rel=0.12)


@pytest.mark.parametrize(
    ("config", "half"),
    [*((config, False) for config in LAYOUTS), (EMBEDDED, True), (STILL, True), (WAN22, True)],
    ids=[*NAMES, "embedded-half", "still-half", "wan2.2-half"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("band", [1 << 15, vae_cost.BAND], ids=["bands", "whole"])
def test_memory_of_encoding_is_as_predicted(config, half, dtype, band, monkeypatch):
    monkeypatch.setattr(banded, "BAND", band)
    monkeypatch.setattr(vae_cost, "BAND", band)
    vae, (h, w) = build(config, live=False).to(dtype), (16, 8)
    side = vae_cost.space_factor(told(config)) // (1 + half)
    frames = [torch.rand(3, h * side, w * side) for _ in range(9)]
    encoder = HalfEncoder(vae.encoder) if half else vae.encoder
    with LiveBytes(encoder) as counter:
        encode_stream(vae, (frame.clone() for frame in frames), encoder)
    assert vae_cost.encode_bytes(told(config), h, w, dtype.itemsize, half=half) == pytest.approx(counter.peak, rel=0.12)


def counted():
    """Counts FLOPs, those of products into a tensor too, which PyTorch's counter leaves out."""

    def product(into, a, b, **_):
        return 2 * a[0] * a[1] * b[1]

    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: product})


@pytest.mark.parametrize("config", LAYOUTS, ids=NAMES)
def test_work_is_as_predicted(config):
    """Of a latent frame in the middle of a video; upsamplers compute a row and a column more than they keep."""
    vae, (h, w), factor = build(config, live=False), (9, 14), vae_cost.time_factor(told(config))
    side = vae_cost.space_factor(told(config))
    decoded, encoded = [], []
    for steps in (3, 4):
        with counted() as counter:
            list(decode.decode_stream(vae, latents(config, steps, h, w)))
        decoded.append(counter.get_total_flops())
        with counted() as counter:
            encode_stream(vae, torch.rand(1 + factor * (steps - 1), 3, h * side, w * side))
        encoded.append(counter.get_total_flops())
    assert decoded[1] - decoded[0] == pytest.approx(vae_cost.decode_flops(told(config), h, w), rel=0.04)
    assert encoded[1] - encoded[0] == pytest.approx(vae_cost.encode_flops(told(config), h, w), rel=0.02)


@pytest.mark.parametrize("config", [EMBEDDED, STILL], ids=["embedded", "still"])
def test_work_on_half_size_frames_is_as_predicted(config):
    vae, (h, w), side = build(config, live=False), (9, 14), vae_cost.space_factor(told(config)) // 2
    encoder, encoded = HalfEncoder(vae.encoder), []
    for steps in (3, 4):
        frames = torch.rand(1 + vae_cost.time_factor(told(config)) * (steps - 1), 3, h * side, w * side)
        with counted() as counter:
            encode_stream(vae, frames, encoder)
        encoded.append(counter.get_total_flops())
    assert encoded[1] - encoded[0] == pytest.approx(vae_cost.encode_flops(told(config), h, w, half=True), rel=0.02)


def test_embedded_vae_at_4k_fits_whole():
    assert vae_cost.decode_bytes(told(STILL), 136, 240) < 1.3 * 2**30
    assert vae_cost.choose_tile(told(STILL), 136, 240, int(1.3 * 2**30)) is None


def test_choose_tile_takes_the_largest_that_fits():
    budget = 2 * 2**30
    tile = vae_cost.choose_tile(told(EMBEDDED), 270, 480, budget)
    taken, more = (vae_cost.decode_bytes(told(EMBEDDED), 270, 480, side) for side in (tile, tile + 1))
    assert taken <= budget < more
    with pytest.raises(ResourceError, match=r"smallest tiles.*decode_gib"):
        vae_cost.choose_tile(told(EMBEDDED), 270, 480, 2**20)


@pytest.mark.parametrize(("h", "w", "tile"), [(40, 60, 16), (40, 60, 59), (9, 9, 8)])
def test_tiles_are_as_much_work_as_what_they_see(h, w, tile, monkeypatch, tmp_path):
    """A tile is decoded with its halo; without one, tiles are no more than the frame."""
    seen = []
    step = decode._step

    def counted(vae, latent, history, first):
        seen.append(latent.shape[-2] * latent.shape[-1])
        return step(vae, latent, history, first)

    monkeypatch.setattr(decode, "_step", counted)
    list(decode.decode_stream(build(EMBEDDED, live=True), latents(EMBEDDED, 1, h, w), tile, tmp_path))
    assert vae_cost.overlap(told(EMBEDDED), h, w, tile) == pytest.approx(sum(seen) / (h * w), rel=0.05)
    assert vae_cost.overlap(told(EMBEDDED), h, w, None) == vae_cost.overlap(told(EMBEDDED), h, w, 60) == 1
