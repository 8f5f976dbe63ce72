"""What is counted is what was rendered: prompts are held out, and true renders would pass."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from atlasvid_cli import captions, pipeline, quality, world
from atlasvid_cli.console import Console
from atlasvid_cli.errors import UsageError
from atlasvid_cli.plan import Request, make_plan
from tests.test_captions import EVERY_FORM


def test_the_prompts_are_held_out_and_stay_the_same():
    prompts = quality.held_out_prompts(40)
    assert prompts[:10] == quality.held_out_prompts(10)
    assert all(world.is_held_out(attributes) for _, attributes in prompts)
    plain = [prompt == captions.sentence(attributes) for prompt, attributes in prompts]
    assert plain == [True, False] * 20
    held_out = [form for form in EVERY_FORM if world.is_held_out(form)]
    for prompt, attributes in prompts[1::2]:
        assert any(captions.sentence(attributes, form) == prompt for form in held_out)


def test_a_run_counts_its_videos_and_is_kept(random_preset, tmp_path, monkeypatch):
    request = Request(str(random_preset), 200, 120, Fraction(2))
    found = quality.run(request, 2, tmp_path, Console(interactive=False))
    assert len(list(tmp_path.glob("*.mp4"))) == found["prompts"] == 2
    assert set(found["right"]) == {"colour", "shape", "direction", "count", "ground colour", "ground", "all of these"}
    assert all(0 <= n <= 2 for n in found["right"].values())
    monkeypatch.setattr(pipeline, "render", lambda *a: pytest.fail("rendered again"))
    assert quality.run(request, 2, tmp_path, Console(interactive=False)) == found


def test_a_run_sums_up_what_it_saw_of_each_video(random_preset, tmp_path, monkeypatch):
    def seen(right, repetition, coherence, width, unsteady):
        energy = np.ones(3)
        return quality.Assessment(right, repetition, energy, energy, coherence, width, unsteady)

    all_right, some = {"colour": True, "shape": True}, {"colour": True, "shape": False}
    videos = iter(
        [
            seen(all_right, 0, 30.0, 3.0, 0.1),
            seen(some, -1, 20.0, None, None),  # nothing there is nothing repeated
            seen(some, 1, 40.0, 4.0, 0.2),
            seen(some, 0, 30.0, 11.0, 0.15),
        ]
    )
    monkeypatch.setattr(quality.pipeline, "render", lambda *a: None)
    monkeypatch.setattr(quality, "frames_at", lambda *a: [])
    monkeypatch.setattr(quality, "assess", lambda *a: next(videos))
    request = Request(str(random_preset), 200, 120, Fraction(2))
    found = quality.run(request, 4, tmp_path, Console(interactive=False))
    assert found["right"] == {"colour": 4, "shape": 1, "all of these": 1}
    assert (found["not_repeated"], found["steady"]) == (3, 2)
    assert (found["coherence_db"], found["edge_width_px"], found["seam"]) == (30.0, 4.0, 1.0)


def rendered(plan, attributes):
    """The frames to look at of a true render."""
    times = torch.tensor(quality.looked_at(plan)) / plan.fps
    pixels = world.render(quality.true_scene(plan, attributes), times, plan.request.height, plan.request.width)
    return [((x + 1) * 127.5).byte().permute(1, 2, 0).numpy() for x in pixels.unbind(1)]


def shrunk(frames, plan):
    """Frames in the size of the plan's proxy."""
    size = plan.request.width, plan.request.height
    x, y = (np.arange(b) * a // b for a, b in zip(size, plan.proxy_size, strict=True))
    return [frame[y][:, x] for frame in frames]


@pytest.mark.parametrize("seconds", [2, 4, 12])
def test_true_renders_pass_and_are_steady(seconds):
    plan = make_plan(Request("tiny", 960, 540, Fraction(seconds)))
    for _, attributes in quality.held_out_prompts(6):
        frames = rendered(plan, attributes)
        seen = quality.assess(plan, frames, shrunk(frames, plan), attributes)
        assert all(seen.right.values()) and seen.unsteady <= quality.STEADY


def test_a_video_of_few_frames_is_looked_at_once_each():
    plan = make_plan(Request("tiny", 480, 272, Fraction(1, 2)))
    assert quality.looked_at(plan) == [0, 4]


def test_true_renders_have_no_seams():
    plan = make_plan(Request("tiny", 480, 272, Fraction(4)))
    (_, attributes), *_ = quality.held_out_prompts(1)
    frames = rendered(plan, attributes)
    proxy = shrunk(frames, plan)
    true, inner, chance = quality.seams([quality.assess(plan, frames, proxy, attributes)])
    assert abs(true - 1) < 3 * chance and abs(inner - 1) < 3 * chance
    for place, (_, columns) in enumerate(quality.token_borders(plan)):
        cut = [frame.copy() for frame in frames]
        for frame in cut:
            frame[:, columns] = 255 - frame[:, columns]
        *seen, _ = quality.seams([quality.assess(plan, cut, proxy, attributes)])
        assert seen[place] > 1 + 10 * chance and seen[1 - place] < 1 + 3 * chance


@pytest.mark.parametrize(("width", "height", "third"), [(960, 540, [32, 64, 96]), (320, 180, [10, 21, 32])])
def test_tokens_meet_at_windows_borders_or_within_windows(width, height, third):
    """A small video is made several times as large, three times the second one, and filtered down."""
    plan = make_plan(Request("tiny", width, height, Fraction(4)))
    meet, within = quality.token_borders(plan)
    for axis, size in enumerate((plan.target.h, plan.target.w)):
        places = sorted(meet[axis] + within[axis])
        assert meet[axis] and within[axis] and len(places) == size - 1
        assert places[:3] == third and places[-1] == (size - 1) * 32 // plan.scale


def test_what_chance_does_to_seams_is_how_the_lines_beside_borders_differ():
    def seen(energy):
        return quality.Assessment({}, 0, np.array(energy), np.array([3.0, 2.0, 2.0]), 30.0, None)

    assert quality.seams([seen([3.0, 1.0, 1.0]), seen([1.0, 1.0, 1.0])]) == [2.0, 1.5, 0.0]
    assert quality.seams([seen([2.0, 1.0, 3.0])]) == [1.0, 1.5, round(1.4826 / 2, 3)]
    rng = np.random.default_rng(0)
    lines = 1 + 0.1 * rng.standard_normal(1000)
    lines[8::8] += 1.0  # a lattice, which is no chance
    assert quality.seams([seen(lines)])[2] == pytest.approx(0.1, rel=0.2)
    assert quality.seams([seen([0.0, 0.0, 0.0])]) == [0.0, 1.5, 0.0]
    assert quality.seams([seen([np.nan] * 3)]) == [None, 1.5, None]


def test_coherence_is_the_likeness_to_the_proxy():
    plan = make_plan(Request("tiny", 480, 270, Fraction(4)))
    width, height = plan.proxy_size
    rng = np.random.default_rng(0)
    proxy = rng.integers(40, 200, (height, width, 3), np.uint8)
    shown = np.zeros((270, 480, 3), np.uint8)
    rows, columns = (np.arange(a) * b // a for a, b in ((270, height), (480, width)))
    shown[:] = proxy[rows][:, columns]
    close = quality.coherence(plan, [shown], [proxy])
    assert quality.coherence(plan, [shown], [proxy[:-1, :-1]]) == pytest.approx(close, abs=0.1)  # an even preview
    assert close > quality.coherence(plan, [np.roll(shown, 40, 1)], [proxy]) + 3


def test_another_world_is_refused(stock_preset):
    with pytest.raises(UsageError, match="tiny only"):
        quality.run(Request(str(stock_preset), 200, 120, Fraction(1)), 1, None, None)
