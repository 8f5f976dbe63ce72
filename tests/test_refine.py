from dataclasses import replace
from fractions import Fraction
from inspect import signature

import pytest
import torch

from atlasvid_cli import refine
from atlasvid_cli.model import patchify, text_context
from atlasvid_cli.plan import ALGORITHM
from atlasvid_cli.presets import Detail, Level
from atlasvid_cli.refine import Region, Stream, sample_detail
from atlasvid_cli.schedule import noise, sigmas
from atlasvid_cli.shapes import Grid
from atlasvid_cli.stages import Stage

STAGE = Stage(Grid(9, 10, 12), Fraction(3), 4, 3, 1.0, 1.0, 3.0)
LEVEL = Level(3, 1.0, 1.0)
DETAIL = Detail(2.0, 4, True, ((3, 4, 4), (5, 3, 3)), (0, 1, 1), (13, 9, 9), False, "both", 8, 3.0, LEVEL, LEVEL)


@pytest.fixture
def below():
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(4))


@pytest.fixture
def sample(transformer, prompt, below):
    contexts = [text_context(transformer, [p], 512) for p in (prompt, prompt[:1])]

    def run(stage=STAGE, seed=5, chunk=8, detail=DETAIL, **more):
        stream = Stream(transformer, contexts[: stage.passes])
        return sample_detail(stream, stream, stage, detail, 2, seed, 1, below, chunk=chunk, **more)

    return run


def test_any_chunk_size_gives_the_same_latents(sample):
    torch.testing.assert_close(sample(chunk=1), sample(chunk=100), atol=1e-5, rtol=0)


def test_a_proxy_stream_that_is_kept_is_as_good_as_one_made_at_every_step(sample, monkeypatch):
    kept, made = sample(), []
    context, forward = refine.proxy_context, refine.detail_forward

    def noted(*figures):
        made.append(figures)
        return context(*figures)

    def anew(model, x, grid, timestep, text, proxy, *rest, **more):
        return forward(model, x, grid, timestep, text, context(*made[0]), *rest, **more)

    monkeypatch.setattr(refine, "proxy_context", noted)
    monkeypatch.setattr(refine, "detail_forward", anew)
    torch.testing.assert_close(sample(), kept, atol=1e-5, rtol=0)
    assert len(made) == 1


@pytest.mark.parametrize("clean_proxy", [True, False])
@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.7, 0.9)])
def test_a_proxy_stream_computed_beside_every_forward_gives_the_same_bytes(sample, monkeypatch, clean_proxy, interval):
    detail, guided = (
        replace(DETAIL, clean_proxy=clean_proxy),
        replace(STAGE, guidance_scale=4.0, guidance_interval=interval),
    )
    kept = sample(guided, detail=detail)
    monkeypatch.setattr(refine, "proxy_context", lambda *given: pytest.fail("it was kept"))
    assert torch.equal(sample(guided, detail=detail, keeps=False), kept)


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(sample):
    assert torch.equal(sample(), sample())
    assert (sample() - sample(seed=6)).abs().max() > 0.1


def test_what_the_method_makes_changes_only_with_its_number(sample):
    """Who changes these values on purpose raises `plan.ALGORITHM`, so that no kept work is taken for the new."""
    made = sample(replace(STAGE, guidance_scale=2.0, strength=0.7))
    expected = torch.tensor([1.2615, 2.2866, 0.8930, 0.4221, -0.3692, 0.8771])
    assert ALGORITHM == 2
    torch.testing.assert_close(made[0, 4, 7, :6], expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize("stage", [STAGE, replace(STAGE, guidance_scale=2.0, strength=0.7)])
def test_a_resumed_run_ends_with_the_same_bytes(sample, stage):
    states = {}

    def save(step, tensors):
        states[step] = {k: v.clone() for k, v in tensors.items()}

    whole = sample(stage, save=save)
    assert torch.equal(sample(stage, resume=(2, states[2])), whole)


def test_a_resumed_level_starts_only_what_it_needs(sample, monkeypatch):
    """Its tokens are there; of a region what surrounds it still comes from where it started."""
    started, start, states = [], refine._start, {}
    video = sample()
    region = Region((2, 3, 4), (6, 7, 9), video)
    whole = sample(seed=8, region=region, save=lambda i, x: states.update({i: x["tokens"].clone()}))
    monkeypatch.setattr(refine, "_start", lambda *a: started.append(1) or start(*a))
    assert torch.equal(sample(seed=8, region=region, resume=(1, {"tokens": states[1]})), whole) and len(started) == 1
    sample(resume=(2, {"tokens": patchify(video, 2)}))
    assert len(started) == 1


def test_guidance_with_the_same_prompt_twice_changes_nothing(transformer, prompt, below):
    context = text_context(transformer, [prompt], 512)
    guided = replace(STAGE, guidance_scale=4.0)
    twice, once = (Stream(transformer, [context] * n) for n in (2, 1))
    out = sample_detail(twice, twice, guided, DETAIL, 2, 5, 1, below, chunk=8)
    plain = sample_detail(once, once, STAGE, DETAIL, 2, 5, 1, below, chunk=8)
    torch.testing.assert_close(out, plain, atol=1e-5, rtol=0)


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.7, 0.9)])
@pytest.mark.parametrize("clean_proxy", [True, False])
def test_guidance_in_one_batch_is_guidance_in_two_passes(transformer, prompt, below, interval, clean_proxy):
    prompts, blocks = [prompt, 2 * prompt[:3]], {1: 0, 2: 0}
    detail = replace(DETAIL, clean_proxy=clean_proxy)

    def sample(together):
        def count(prompts):
            blocks[together] += prompts

        groups = [prompts] if together == 2 else [[p] for p in prompts]
        stream = Stream(transformer, [text_context(transformer, group, 512) for group in groups])
        stage = replace(STAGE, guidance_scale=3.0, guidance_interval=interval, guidance_batch=together == 2)
        return sample_detail(stream, stream, stage, detail, 2, 5, 1, below, chunk=8, on_block=count)

    torch.testing.assert_close(sample(2), sample(1), atol=1e-5, rtol=0)
    assert blocks[1] == blocks[2] > 0


def test_guidance_acts_only_within_its_interval(sample):
    guided = replace(STAGE, guidance_scale=4.0)
    assert [round(s, 2) for s in sigmas(STAGE.steps, STAGE.strength, STAGE.flow_shift)] == [1.0, 0.86, 0.6, 0.0]
    never, once, always = (
        sample(replace(guided, guidance_interval=interval)) for interval in ((0.0, 0.1), (0.7, 0.9), (0.0, 1.0))
    )
    assert torch.equal(never, sample()) and torch.equal(always, sample(guided))
    assert not torch.equal(once, never) and not torch.equal(once, always)


def test_steps_outside_the_interval_take_one_forward(sample):
    blocks = []
    stage = replace(STAGE, guidance_scale=4.0, guidance_interval=(0.7, 0.9))
    sample(stage, on_block=blocks.append)
    assert stage.forwards() == 4 and sum(blocks) == 3 * 4  # of three blocks each
    assert [stage.forwards(n) for n in range(4)] == [0, 1, 3, 4]


@pytest.mark.parametrize("part", ["shifted", "proxy_attention", "scaled_positions", "clean_proxy"])
def test_each_part_of_the_method_counts(sample, part):
    assert (sample(detail=replace(DETAIL, **{part: False})) - sample()).abs().max() > 1e-4


def spied(monkeypatch, name):
    """What every call of a function that `refine` uses is given, by the names of its parameters."""
    calls, real = [], getattr(refine, name)

    def spy(*arguments, **named):
        given = signature(real).bind(*arguments, **named)
        given.apply_defaults()
        calls.append({k: v.clone() if k == "tokens" else v for k, v in given.arguments.items()})
        return real(*arguments, **named)

    monkeypatch.setattr(refine, name, spy)
    return calls


def test_the_proxy_is_read_at_timestep_0_and_the_windows_cycle_begins_one_further_at_every_step(sample, monkeypatch):
    proxies, details = spied(monkeypatch, "proxy_context"), spied(monkeypatch, "detail_forward")
    sample()
    assert [call["timestep"] for call in proxies] == [0.0]
    assert [call["phase"] for call in details] == [0, 1, 2]
    times = [call["timestep"] for call in details]
    assert times == [int(1000 * s) for s in sigmas(STAGE.steps, STAGE.strength, STAGE.flow_shift)[:-1]]
    proxies.clear()
    sample(detail=replace(DETAIL, clean_proxy=False))
    assert [call["timestep"] for call in proxies] == times


def test_what_surrounds_a_region_goes_from_its_noise_to_the_video(sample, monkeypatch):
    video, seed = sample(), 77
    calls = spied(monkeypatch, "detail_forward")
    sample(seed=seed, region=Region((2, 3, 4), (6, 7, 9), video))
    _, t, h, w = video.shape
    start = noise(seed, 1, 4, range(t), range(h), range(w))
    outside = torch.ones(9, 10, 12, dtype=torch.bool)
    outside[2:6, 3:7, 4:9] = False
    for call, sigma in zip(calls, sigmas(STAGE.steps, STAGE.strength, STAGE.flow_shift), strict=False):
        expected = patchify((1 - sigma) * video + sigma * start, 2)  # the halo is all that there is
        torch.testing.assert_close(call["tokens"][0][outside.flatten()], expected[outside.flatten()])


def test_a_region_sees_its_halo_and_nothing_beyond(sample):
    detail = replace(DETAIL, windows=((3, 2, 2),))
    video = sample(detail=detail)

    def inside(changed_row):
        around = video.clone()
        around[:, :, changed_row * 2 : changed_row * 2 + 2] += 1.0
        region = Region((0, 0, 0), (9, 2, 12), around)
        return sample(detail=detail, seed=77, region=region)[:, :, :4]

    assert torch.equal(inside(4), inside(9))
    assert not torch.equal(inside(2), inside(9))


def test_without_shifts_what_is_beyond_a_window_border_is_never_seen(transformer, prompt):
    """One shape, no proxy, no shift: the windows are tiles, sampled as if each were alone."""
    context = text_context(transformer, [prompt], 512)
    tiles = replace(DETAIL, shifted=False, proxy_attention=False, windows=((9, 10, 6),))
    low = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(4))
    changed = low.clone()
    changed[..., 6:] += 1.0
    stage = replace(STAGE, strength=0.7)
    stream = Stream(transformer, [context])
    a, b = (sample_detail(stream, stream, stage, tiles, 2, 5, 1, x, chunk=8) for x in (low, changed))
    assert torch.equal(a[..., :12], b[..., :12]) and not torch.equal(a[..., 12:], b[..., 12:])


def test_a_region_leaves_the_rest_as_it_was(sample):
    video = sample()
    region = Region((2, 3, 4), (6, 7, 9), video)
    again = sample(seed=77, region=region)
    inside = torch.zeros_like(video, dtype=torch.bool)
    inside[:, 2:6, 6:14, 8:18] = True
    assert torch.equal(again[~inside], video[~inside])
    assert (again - video)[inside].abs().mean() > 0.05


def test_a_region_of_everything_is_a_plain_run(sample):
    video = sample()
    whole = Region((0, 0, 0), (9, 10, 12), video)
    torch.testing.assert_close(sample(seed=8, region=whole), sample(seed=8), atol=1e-5, rtol=0)
