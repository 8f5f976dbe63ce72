"""Streaming decode: equal to diffusers' own `_decode`, tiled or not."""

import pytest
import torch
from diffusers import AutoencoderKLWan

from atlasvid_cli import causal, decode, vae_cost
from atlasvid_cli.errors import RenderError, ResourceError

RESIDUAL = {
    "base_dim": 8,
    "decoder_base_dim": 8,
    "z_dim": 4,
    "dim_mult": [1, 2, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [True, True],
    "is_residual": True,
    "in_channels": 48,
    "out_channels": 48,
    "patch_size": 4,
    "scale_factor_temporal": 4,
    "scale_factor_spatial": 16,
    "latents_mean": [0.1, -0.2, 0.0, 0.3],
    "latents_std": [1.5, 0.5, 1.0, 2.0],
}
WAN21 = {
    "base_dim": 8,
    "z_dim": 4,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "temperal_downsample": [False, True, True],
    "latents_mean": [0.0, 0.5, 0.0, -0.5],
    "latents_std": [1.0, 2.0, 1.0, 0.5],
}
# as Wan2.2: a level that halves its channels, so that the shortcut mixes them, and one that doubles no frames
WAN22 = dict(
    RESIDUAL,
    dim_mult=[1, 2, 4, 4],
    temperal_downsample=[False, True, True],
    patch_size=2,
    in_channels=12,
    out_channels=12,
)
EMBEDDED = dict(RESIDUAL, base_dim=32, decoder_base_dim=32, z_dim=32, latents_mean=[0.0] * 32, latents_std=[1.0] * 32)
STILL = EMBEDDED | {"still": 2}
IDLE = STILL | {"idle": 1}


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors here are far too small for more: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build(config: dict, live: bool = True) -> AutoencoderKLWan:
    torch.manual_seed(0)
    vae = AutoencoderKLWan(**{k: v for k, v in config.items() if k not in ("still", "idle")}).eval()
    with torch.no_grad():
        for p in vae.parameters():  # biases and gains that matter
            if p.ndim == 1 or p[0].numel() == 1:
                p.add_(torch.randn_like(p) * 0.2)
        if not live:
            for attention in vae.decoder.mid_block.attentions:
                attention.proj.weight.zero_()
                attention.proj.bias.zero_()
    causal.hold_still(vae, config.get("still", 0))
    causal.make_idle(vae, config.get("idle", 0))
    return vae


def latents(config: dict, t: int, h: int, w: int) -> torch.Tensor:
    return torch.randn(config["z_dim"], t, h, w, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def reference(vae: AutoencoderKLWan, z: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(v).view(-1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    return vae._decode((z * std + mean)[None]).sample[0].transpose(0, 1) * 0.5 + 0.5


@pytest.mark.parametrize(
    "config", [RESIDUAL, WAN21, WAN22, STILL, IDLE], ids=["residual", "wan2.1", "wan2.2", "still", "idle"]
)
@pytest.mark.parametrize("live", [True, False], ids=["attention", "no attention"])
def test_equals_diffusers(config, live):
    vae, z = build(config, live), latents(config, 3, 4, 6)
    frames = torch.stack(list(decode.decode_stream(vae, z)))
    assert frames.dtype == torch.float32
    expected = reference(vae, z)
    assert expected.std() > 0.05
    torch.testing.assert_close(frames, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("config", [RESIDUAL, WAN21, WAN22], ids=["residual", "wan2.1", "wan2.2"])
def test_in_bfloat16_frames_stay_within_an_eight_bit_step_or_two(config):
    vae, z = build(config, live=True), latents(config, 3, 4, 6)
    exact = torch.stack(list(decode.decode_stream(vae, z)))
    rounded = torch.stack(list(decode.decode_stream(vae.bfloat16(), z)))
    assert rounded.dtype == torch.float32
    assert (rounded - exact).square().mean().sqrt() < 1.5 / 255


def test_leaves_the_vae_as_it_was():
    vae, z = build(RESIDUAL), latents(RESIDUAL, 2, 4, 4)
    before = reference(vae, z)
    list(decode.decode_stream(vae, z))
    assert torch.equal(reference(vae, z), before)


@pytest.mark.parametrize("config", [RESIDUAL, WAN21], ids=["residual", "wan2.1"])
def test_tiles_without_attention_are_exact(config, tmp_path):
    vae, z = build(config, live=False), latents(config, 2, 5, 34)
    whole = torch.stack(list(decode.decode_stream(vae, z)))
    seen: list[int] = []
    frames = decode.decode_stream(vae, z, tile=12, spool=tmp_path, on_tile=lambda: seen.append(1))
    tiled = [next(frames)]
    assert len(seen) == decode.tile_steps(z, 12) > 0 and decode.tile_steps(z, 100) == 0
    tiled = torch.stack([*tiled, *frames])
    assert vae_cost.receptive_radius(vae.config) < 34 - 12  # some tile does not see the whole width
    torch.testing.assert_close(tiled, whole, rtol=0, atol=1e-5)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("config", [RESIDUAL, WAN21], ids=["residual", "wan2.1"])
def test_receptive_radius_bounds_and_is_not_slack(config):
    vae = build(config, live=False)
    radius = vae_cost.receptive_radius(vae.config)
    z = latents(config, 1, 1, 2 * radius + 3)
    changed = z.clone()
    changed[..., 0] += 100.0
    a, b = (next(decode.decode_stream(vae, v)) for v in (z, changed))
    reached = (a != b).any(dim=(0, 1)).nonzero().max().item() // vae_cost.space_factor(vae.config)
    assert radius - 2 <= reached <= radius


def test_tiles_with_attention_are_blended(tmp_path, monkeypatch):
    """Decoders that see each tile as one gray stand for attention, which differs from tile to tile."""

    def gray(vae, latent, history, first):
        height, width = (side * vae_cost.space_factor(vae.config) for side in latent.shape[-2:])
        yield torch.full((3, height, width), latent.mean().sigmoid().item())

    monkeypatch.setattr(decode, "_step", gray)
    vae = build(RESIDUAL)
    factor = vae_cost.space_factor(vae.config)
    z = torch.linspace(-3, 3, 36).expand(4, 1, 9, 36)  # darker tiles to the left
    row = torch.stack(list(decode.decode_stream(vae, z, tile=12, spool=tmp_path)))[0, 0, 0]
    steps, reach = row.diff(), 2 * factor
    for border in (12 * factor, 24 * factor):
        across = slice(border - reach - 1, border + reach)
        assert steps[across].sum() > 0.05 and steps[across].max() < 1.1 * steps[across].sum() / (2 * reach)
        steps[across] = 0
    assert steps.abs().max() < 1e-4  # nothing elsewhere, but for rounding


@pytest.mark.parametrize("size, tile", [(7, 3), (34, 12), (136, 50), (5, 5)])
@pytest.mark.parametrize("blend", [0, 4])
def test_tile_weights_sum_to_one(size, tile, blend):
    spans = vae_cost.spans(size, tile)
    assert max(b - a for a, b in spans) <= tile
    pixels = [(a * 16, b * 16) for a, b in spans]
    total = sum(decode._ramp(span, blend, size * 16) for span in pixels)
    torch.testing.assert_close(total, torch.ones(size * 16))


def test_bad_latents_are_refused():
    vae, z = build(RESIDUAL), latents(RESIDUAL, 1, 2, 2)
    with pytest.raises(RenderError, match="NaN"):
        next(decode.decode_stream(vae, z * float("nan")))
    with pytest.raises(RenderError, match="shape"):
        next(decode.decode_stream(vae, z[:2]))


def test_full_disk_is_said_before_decoding(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(ResourceError, match="disk space"):
        next(decode.decode_stream(build(RESIDUAL), latents(RESIDUAL, 1, 4, 20), tile=10, spool=tmp_path))
    assert not list(tmp_path.iterdir())
