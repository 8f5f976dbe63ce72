import pytest
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline

from atlasvid_cli.model import text_context
from atlasvid_cli.plan import Stage
from atlasvid_cli.proxy import sample_proxy
from atlasvid_cli.shapes import Grid


def scheduler():
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def stage(time_ratio=1, guidance=3.0):
    return Stage(Grid(3, 4, 5), 1, time_ratio, 5, 1.0, guidance, 3.0)  # type: ignore[arg-type]


@pytest.fixture
def texts(transformer, prompt):
    return text_context(transformer, [prompt], 512), text_context(transformer, [prompt[:1] * 0.5], 512)


def test_without_time_scaling_it_is_wan_pipeline(transformer, texts, prompt):
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    )
    pipeline = WanPipeline(None, None, vae, scheduler(), transformer)
    pipeline.set_progress_bar_config(disable=True)
    latents = torch.randn(4, 3, 8, 10, generator=torch.Generator().manual_seed(3))
    pad = torch.zeros(1, 512, 16)
    positive, negative = pad.clone(), pad.clone()
    positive[0, : len(prompt)], negative[0, :1] = prompt, prompt[:1] * 0.5
    expected = pipeline(
        height=64,
        width=80,
        num_frames=9,
        num_inference_steps=5,
        guidance_scale=3.0,
        latents=latents[None],
        prompt_embeds=positive,
        negative_prompt_embeds=negative,
        output_type="latent",
    ).frames[0]
    out = sample_proxy(transformer, scheduler(), stage(), 2, 0, *texts, latents=latents)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("killed_after", [1, 2, 4])
def test_a_resumed_run_ends_with_the_same_bytes(transformer, texts, killed_after):
    states = {}

    def save(step, tensors):
        states[step] = {k: v.clone() for k, v in tensors.items()}

    whole = sample_proxy(transformer, scheduler(), stage(4), 2, 9, *texts, save=save)
    resumed = sample_proxy(
        transformer, scheduler(), stage(4), 2, 9, *texts, resume=(killed_after, states[killed_after])
    )
    assert torch.equal(whole, resumed)


def test_the_seed_decides(transformer, texts):
    a, b, c = (sample_proxy(transformer, scheduler(), stage(4, 1.0), 2, seed, *texts) for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert (a - c).abs().max() > 0.1
