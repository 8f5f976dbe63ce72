"""Latents are those of diffusers' own VAE, normalised, however they are encoded."""

import pytest
import torch

from atlasvid_cli import decode, encode, train_vae
from atlasvid_cli.encode import encode_clips, encode_stream
from tests.test_train_vae import CONFIG


@pytest.fixture(scope="module", params=["tiny", "wan2.2", "wider first", "wan2.1"])
def vae(request):
    """The structures of the presets, and one that doubles its channels where it does not yet merge frames."""
    z = CONFIG["z_dim"]
    statistics = {"latents_mean": [0.1 * i for i in range(z)], "latents_std": [1.0 + i for i in range(z)]}
    plain = {"patch_size": None, "in_channels": 3, "out_channels": 3}
    changes = {
        "tiny": {},
        "wan2.2": {"dim_mult": [1, 2, 4, 4], "temperal_downsample": [False, True, True], "num_res_blocks": 2},
        "wider first": {**plain, "dim_mult": [2, 2, 2], "temperal_downsample": [False, True]},
        "wan2.1": {**plain, "dim_mult": [1, 2, 4, 4], "temperal_downsample": [False, True, True], "is_residual": False},
    }[request.param]
    torch.manual_seed(0)
    vae = train_vae.build({**CONFIG, **statistics, **changes}).eval()
    if request.param.startswith("wan"):  # the embedded one's is off
        for attention in (*vae.encoder.mid_block.attentions, *vae.decoder.mid_block.attentions):
            torch.nn.init.normal_(attention.proj.weight, std=0.1)
    return vae


def clip(frames, seed=0):
    return torch.rand(3, frames, 64, 96, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("frames", [1, 5, 13])
def test_a_stream_is_encoded_as_the_vae_encodes_the_whole_clip(vae, frames):
    pixels = clip(frames)
    with torch.no_grad():
        whole = vae.encode(pixels[None]).latent_dist.mode()[0]
    found = encode_stream(vae, iter(pixels.unbind(1)))
    mean, std = (torch.tensor(v).view(-1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    torch.testing.assert_close(found * std + mean, whole, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(encode_clips(vae, pixels[None])[0], found, atol=1e-5, rtol=1e-4)


def test_a_stream_takes_one_frame_at_a_time(vae, monkeypatch):
    taken, seen = 0, []

    def frames():
        nonlocal taken
        for frame in clip(9).unbind(1):
            taken += 1
            yield frame

    walk = encode._latent
    monkeypatch.setattr(encode, "_latent", lambda *a: seen.append(taken) or walk(*a))
    encode_stream(vae, frames())
    assert seen == list(range(1, 10))


def test_decoding_takes_the_normalisation_back(vae):
    pixels = clip(5)
    with torch.no_grad():
        own = vae.decode(vae.encode(pixels[None]).latent_dist.mode()).sample[0]
    ours = torch.stack(list(decode.decode_stream(vae, encode_stream(vae, iter(pixels.unbind(1))))))
    torch.testing.assert_close(ours.transpose(0, 1) * 2 - 1, own.clamp(-1, 1), atol=1e-4, rtol=0)


def test_clips_encoded_together_are_encoded_as_if_alone(vae):
    clips = torch.stack([clip(5, seed) for seed in range(3)])
    for one, latents in zip(clips, encode_clips(vae, clips), strict=True):
        torch.testing.assert_close(encode_clips(vae, one[None])[0], latents, atol=1e-5, rtol=1e-4)
