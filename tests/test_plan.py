"""From a request to numbers: what a preset leaves out is planned for."""

import dataclasses
from fractions import Fraction

import pytest

from atlasvid_cli.cost import memory
from atlasvid_cli.machine import this_machine
from atlasvid_cli.memory import Placement
from atlasvid_cli.plan import Request, make_plan
from atlasvid_cli.presets import load_preset
from atlasvid_cli.shapes import Grid
from atlasvid_cli.stages import level_stage

REQUEST = Request("tiny", 960, 540, Fraction(4))


def plan_with(**changes):
    preset = load_preset("tiny")
    return make_plan(REQUEST, preset=dataclasses.replace(preset, detail=dataclasses.replace(preset.detail, **changes)))


def test_a_changed_preset_takes_the_place_of_the_named_one():
    plan = plan_with(shifted=False)
    assert not plan.preset.detail.shifted
    assert plan.key(plan.levels[0]) != make_plan(REQUEST).key(make_plan(REQUEST).levels[0])


def test_native_denoises_a_small_video_at_its_own_size():
    plan = make_plan(Request("tiny", 320, 180, Fraction(4)))
    assert plan.scale == 3 and plan.native_grid == Grid(17, 6, 10)


def test_a_proxy_is_known_by_what_its_preview_shows():
    wider = make_plan(dataclasses.replace(REQUEST, width=1280, height=720))
    plan = make_plan(REQUEST)
    assert wider.proxy == plan.proxy and wider.proxy_size != plan.proxy_size
    assert wider.key(wider.proxy) != plan.key(plan.proxy)


@pytest.mark.parametrize("change", [{"seconds": Fraction(39, 10)}, {"seconds": Fraction(2), "fps": 32}])
def test_a_proxy_is_known_by_the_length_and_rate_that_refine_takes_over(change):
    plan, other = make_plan(REQUEST), make_plan(dataclasses.replace(REQUEST, **change))
    assert plan.proxy == other.proxy and plan.key(plan.proxy) != other.key(other.proxy)


def test_sampling_flags_are_of_the_proxy_or_where_that_is_there_of_the_levels_above():
    """As a LoRA for few steps wants them."""
    few = {"steps": 4, "guidance_scale": 1.0, "flow_shift": 5.0}
    for preset in ("wan2.1-1.3b", "wan2.2-a14b"):
        plain = make_plan(Request(preset, 1280, 720, Fraction(5)))
        of_proxy = make_plan(Request(preset, 1280, 720, Fraction(5), **few))
        given = make_plan(Request(preset, 1280, 720, Fraction(5), **few), plain.proxy.grid, plain.proxy_fps)
        sampled = [(s.steps, s.guidance_scale, s.flow_shift) for s in (of_proxy.proxy, *given.levels)]
        assert set(sampled) == {(4, 1.0, 5.0)}
        assert of_proxy.levels == plain.levels and plain.levels[0].steps > 4 and given.levels[0].passes == 1
        assert plain.proxy.experts is None or of_proxy.proxy.experts.guidance_scale == 1.0


def test_a_region_is_planned_as_what_is_sampled_of_it():
    request = dataclasses.replace(REQUEST, width=3840, height=2160)
    whole = make_plan(request)
    plan = make_plan(dataclasses.replace(request, region=(1280, 640, 320, 320), frames=(16, 32)))
    [(name, stage)] = plan.own_stages()
    assert name == "detail 2/2" and stage.grid == whole.target
    assert plan.region == ((4, 20, 40), (9, 30, 50))  # of 32 px tokens, and latents of four frames
    t, h, w = plan.preset.detail.halo
    part = plan.sampled(stage)
    assert (part.t, part.h, part.w) == (min(9 + t, stage.grid.t), 10 + 2 * h, 10 + 2 * w)
    assert plan.flops(stage) < 0.4 * whole.flops(stage) and plan.windows(stage) < 0.4 * whole.windows(stage)
    machine = this_machine()
    assert (
        memory(plan, stage, Placement("none"), machine).host
        < memory(whole, whole.levels[-1], Placement("none"), machine).host
    )
    assert whole.sampled(whole.levels[-1]) == whole.target


def test_forwards_are_counted_by_where_guidance_acts():
    level = dataclasses.replace(load_preset("tiny").detail.first, guidance_scale=3.0)
    always, never = (
        plan_with(first=dataclasses.replace(level, guidance_interval=i)).levels[0] for i in ((0.0, 1.0), (0.9, 1.0))
    )
    assert (always.forwards(), never.forwards()) == (2 * level.steps, level.steps)
    assert always.passes == never.passes == 2  # both prompts are there


def test_autoguidance_takes_a_forward_more_where_guidance_acts():
    proxy = make_plan(Request("tiny", 960, 544, Fraction(4))).proxy
    assert proxy.autoguidance > 0 and proxy.forwards() == 3 * proxy.steps and proxy.forwards(2) == 6
    assert dataclasses.replace(proxy, autoguidance=0.0).forwards() == 2 * proxy.steps
    assert dataclasses.replace(proxy, guidance_scale=1.0).forwards() == proxy.steps
    stock = make_plan(Request("wan2.1-1.3b", 960, 544, Fraction(4))).proxy
    assert not stock.is_autoguided and stock.forwards() == 2 * stock.steps


def test_autoguidance_is_part_of_a_key_where_it_acts():
    plan = make_plan(Request("tiny", 960, 544, Fraction(4)))

    def key(**changes):
        changed = dataclasses.replace(plan, proxy=dataclasses.replace(plan.proxy, **changes))
        return changed.key(changed.proxy)

    assert key(autoguidance=1.0) != key() != key(autoguidance=0.0)
    assert key(autoguidance=1.0, guidance_scale=1.0) == key(autoguidance=0.0, guidance_scale=1.0)
    assert "autoguidance" not in str(plan.key(plan.levels[0]))


@pytest.mark.parametrize("field", dataclasses.fields(load_preset("tiny").detail), ids=lambda field: field.name)
def test_what_a_preset_says_of_the_detail_is_part_of_a_key(field):
    """But for what is there already: in the level's own sampling, or the hash of weights."""
    plan = make_plan(Request("tiny", 960, 544, Fraction(4)))
    detail = dataclasses.replace(plan.preset.detail, **{field.name: "another"})
    changed = dataclasses.replace(plan, preset=dataclasses.replace(plan.preset, detail=detail))
    same = changed.key(changed.levels[0]) == plan.key(plan.levels[0])
    assert same == (field.name in {"min_ratio", "max_ratio", "flow_shift", "first", "upper", "lora", "chunk"})


def test_a_proxy_stream_at_the_detail_timestep_is_paid_for_at_every_step():
    # with steps n: n forwards, and the proxy stream once or n times
    first = load_preset("tiny").detail.first
    two, four = (dataclasses.replace(first, steps=n) for n in (2, 4))
    flops = {}
    for clean in (True, False):
        plans = [plan_with(first=level, clean_proxy=clean) for level in (two, four)]
        flops[clean] = [plan.flops(plan.levels[0]) for plan in plans]
    stream = flops[False][0] - flops[True][0]
    assert stream > 0 and flops[False][1] - flops[True][1] == 3 * stream
    assert flops[False][1] == 2 * flops[False][0]


def test_native_equal_steps_guide_every_step():
    level = dataclasses.replace(load_preset("tiny").detail.first, guidance_interval=(0.2, 0.4))
    equal = plan_with(first=level).at_equal_steps(7)
    assert all(s.forwards() == 14 for _, s in equal.named_stages())


def test_a_level_that_climbs_by_less_than_two_takes_no_frames_half_as_large():
    """They would show less than the level below does: an earlier result may be as close to what is asked for."""
    detail = load_preset("tiny").detail
    entries = [level_stage(detail, detail.upper, Grid(1, 8, 8), Fraction(r), 1).entry for r in ("2", "31/16", "4")]
    assert entries == [detail.upper.entry, None, detail.upper.entry] and detail.upper.entry
