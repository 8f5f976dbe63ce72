import copy
import itertools
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline

from atlasvid_cli.model import clip_forward, patchify, text_context, unpatchify
from atlasvid_cli.proxy import Expert, sample_proxy
from atlasvid_cli.schedule import noise, sigmas
from atlasvid_cli.shapes import Grid, Spacing
from atlasvid_cli.stages import Stage
from atlasvid_cli.weights import load_scheduler


def scheduler():
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def stage(time_ratio=1):
    return Stage(Grid(3, 4, 5), 1, time_ratio, 5, 1.0, 3.0, 3.0)  # type: ignore[arg-type]


@pytest.fixture
def experts(transformer, prompt):
    """Two experts, the second with other weights and guidance, which take turns at sigma 0.7."""
    other = copy.deepcopy(transformer)
    for parameter in other.parameters():
        parameter.mul_(0.9)
    return [
        Expert(model, *(text_context(model, [p], 512) for p in (prompt, prompt[:1] * 0.5)), scale)
        for model, scale in ((transformer, 3.0), (other, 2.0))
    ]


@pytest.fixture
def sample(experts):
    def run(stage, seed=0, count=1, **options):
        def expert_at(timestep):
            return experts[0] if count == 1 or timestep >= 700 else experts[1]

        by = options.pop("scheduler", None) or scheduler()
        return sample_proxy(expert_at, by, stage, 4, 2, seed, **options)

    return run


@pytest.mark.parametrize("count", [1, 2])
def test_without_time_scaling_it_is_wan_pipeline(sample, experts, prompt, count):
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    )
    second = {"transformer_2": experts[1].model, "boundary_ratio": 0.7} if count == 2 else {}
    pipeline = WanPipeline(None, None, vae, scheduler(), experts[0].model, **second)
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
        guidance_scale_2=2.0 if count == 2 else None,
        latents=latents[None],
        prompt_embeds=positive,
        negative_prompt_embeds=negative,
        output_type="latent",
    ).frames[0]
    torch.testing.assert_close(sample(stage(), count=count, latents=latents), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("killed_after", "count"), [(1, 1), (2, 2), (4, 2)])
def test_a_resumed_run_ends_with_the_same_bytes(sample, killed_after, count):
    states = {}

    def save(step, tensors):
        states[step] = {k: v.clone() for k, v in tensors.items()}

    whole = sample(stage(4), 9, count, save=save)
    resumed = sample(stage(4), 9, count, resume=(killed_after, states[killed_after]))
    assert torch.equal(whole, resumed)


@pytest.fixture
def euler(tmp_path):
    scheduler().save_pretrained(tmp_path / "scheduler")
    return lambda: load_scheduler(tmp_path, 5.0, "euler")


@torch.no_grad()
def test_euler_steps_follow_the_velocity(sample, experts, euler):
    """x - (sigma - next sigma) v at even times, shifted: few-step LoRAs are made for that. UniPC ends elsewhere."""
    first, by = stage(4), euler()
    by.set_timesteps(4)
    torch.testing.assert_close(by.sigmas, torch.tensor(sigmas(4, 1.0, 5.0)), atol=3e-3, rtol=0)
    x = noise(0, 0, 4, range(3), range(8), range(10))
    for timestep, (at, after) in zip(by.timesteps, itertools.pairwise(by.sigmas), strict=True):
        tokens = patchify(x, 2)[None]
        prompt, negative = (
            clip_forward(experts[0].model, tokens, first.grid, timestep[None], text, Spacing(4))[0]
            for text in (experts[0].prompt, experts[0].negative)
        )
        x = x - (at - after) * unpatchify(negative + 3.0 * (prompt - negative), first.grid, 2)
    made = sample(replace(first, steps=4), scheduler=euler())
    torch.testing.assert_close(made, x, atol=1e-5, rtol=1e-5)
    assert (sample(replace(first, steps=4), scheduler=euler()) - sample(replace(first, steps=4))).abs().max() > 1e-3


def test_a_resumed_run_of_euler_steps_ends_with_the_same_bytes(sample, euler):
    states = {}
    whole = sample(
        stage(4), scheduler=euler(), save=lambda step, tensors: states.update({step: copy.deepcopy(tensors)})
    )
    assert torch.equal(sample(stage(4), scheduler=euler(), resume=(2, states[2])), whole)


def test_without_scaled_time_positions_are_those_of_time_ratio_one(sample):
    plain = sample(stage=stage(1))
    assert torch.equal(sample(stage=replace(stage(4), scaled_time=False)), plain)
    assert not torch.equal(sample(stage=stage(4)), plain)


def test_the_seed_decides(sample):
    a, b, c = (sample(stage(4), seed) for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert (a - c).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("scale", [3.0, 1.0])
def test_autoguidance_leads_guided_velocities_away_from_the_weaker_model_too(experts, euler, scale):
    """Guided: negative + 3 (prompt - negative) + 0.5 (prompt - the weaker one's); unguided as if it were not there."""
    strong, weak = experts
    expert = replace(strong, guidance_scale=scale, weaker=(weak.model, weak.prompt))
    made = sample_proxy(lambda _: expert, by := euler(), replace(stage(4), steps=1, autoguidance=0.5), 4, 2, 0)
    x = noise(0, 0, 4, range(3), range(8), range(10))

    def velocity(of, text):
        tokens = clip_forward(of.model, patchify(x, 2)[None], stage().grid, by.timesteps, text, Spacing(4))[0]
        return unpatchify(tokens, stage().grid, 2)

    prompt, negative, weaker = (
        velocity(*v) for v in ((strong, strong.prompt), (strong, strong.negative), (weak, weak.prompt))
    )
    guided = negative + 3.0 * (prompt - negative) + 0.5 * (prompt - weaker) if scale > 1 else prompt
    torch.testing.assert_close(made, x - (by.sigmas[0] - by.sigmas[1]) * guided, atol=1e-5, rtol=1e-5)
