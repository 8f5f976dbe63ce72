"""Arms that are sampled are of the same stages as measured ones, and what is checked is what is sampled."""

from fractions import Fraction

import pytest
import torch

from atlasvid_cli import arms, measure
from atlasvid_cli.flops import full_flops
from atlasvid_cli.plan import Request, make_plan
from atlasvid_cli.timing import Timing


@pytest.mark.parametrize(("rate", "whole"), [(1e15, True), (3e9, False)])
def test_a_sampled_arm_has_a_preview_projected_as_the_video_is(monkeypatch, ticks, tmp_path, rate, whole):
    """With a clock that counts pixels, both are of all their frames, also where parts of frames are timed."""
    plan = make_plan(Request("tiny", 960, 540, Fraction(4)))
    for name in ("proxy_sample", "detail_sample", "enlarge_sample"):
        monkeypatch.setattr(arms, name, lambda *a: Timing(1.0, 1.0, 1.0, 2))
    monkeypatch.setattr(arms, "conv_rate", lambda dtype: rate)
    written = []

    def write(path, frames, *, width, height, fps, frame_count, on_frame):
        written.append((width, height, fps))
        for i in range(frame_count):
            ticks(width * height)
            on_frame(i + 1)
        path.touch()

    monkeypatch.setattr(measure, "write_video", write)
    vae = type("Vae", (), {"dtype": torch.float32})
    stages, peak = arms.few_step_arm(arms.Bench(None, None, None, None, vae, tmp_path, 1e9, 4.0, 2), plan, 2)
    assert set(stages) == {"proxy", "preview", "detail 1/1 start", "detail 1/1", "decode", "mux"} and peak is None
    width, height = plan.proxy_size
    sizes = [(width, height, plan.proxy_fps)] * 2 + [(960, 540, plan.fps)] * 2
    assert (written == sizes) == whole and [fps for *_, fps in written] == [fps for *_, fps in sizes]
    frames = (plan.proxy.grid.t - 1) * plan.preset.geometry.temporal + 1
    shown = 0 if whole else 0.05  # parts count the rows below what is shown
    assert stages["preview"].seconds == pytest.approx(frames * width * height, rel=max(shown, 1e-6))
    assert stages["decode"].seconds == pytest.approx(65 * 960 * 540, rel=max(shown, 1e-6))
    assert stages["preview"].runs == 2 and (stages["preview"].fraction == 3 / plan.proxy.grid.t) == whole
    assert (tmp_path / "video.mp4").exists(), "whose frames native encodes"


def test_projections_are_of_every_step_pass_and_frame(monkeypatch, ticks, tmp_path):
    plan, one = make_plan(Request("tiny", 960, 540, Fraction(4))), Timing(2.0, 1.0, 3.0, 2)
    assert (plan.proxy.passes, plan.proxy.is_autoguided, plan.target.t) == (2, True, 17)
    for module in (arms, measure):
        monkeypatch.setattr(module, "native_pass", lambda *a: one)
    monkeypatch.setattr(arms, "native_decode", lambda *a: one)
    bench = arms.Bench(None, None, None, None, None, tmp_path, 1e9, 4.0, 2)
    assert arms._native_denoise(bench, plan, 20, None).seconds == 20 * 2 * 2
    assert arms.native_point(bench, plan, 20)["denoise"].seconds == 20 * 2 * 2
    assert measure.proxy_sample(None, plan, None).seconds == plan.proxy.steps * 3 * 2
    monkeypatch.setattr(measure, "HalfEncoder", lambda encoder: None)
    monkeypatch.setattr(measure, "enlarge", lambda vae, low, ratio, by, size, frames, *a, **k: ticks(frames))
    vae = type("Vae", (), {"encoder": None})
    made = measure.enlarge_sample(vae, plan, plan.levels[0], tmp_path, 2)
    assert made.seconds == pytest.approx(65) and made.fraction == 17 / 65


def test_an_error_is_what_is_projected_beyond_what_was_timed(monkeypatch, ticks, tmp_path):
    plan, five = make_plan(Request("tiny", 960, 540, Fraction(4))), Timing(5.0, 5.0, 5.0, 3)
    monkeypatch.setattr(arms, "native_forward", lambda *a: lambda: ticks(4.0))
    for name in ("native_sample", "detail_sample"):
        monkeypatch.setattr(arms, name, lambda *a: five)
    monkeypatch.setattr(arms, "decode_sample", lambda *a: (Timing(3.0, 3.0, 3.0, 3), Timing(2.0, 2.0, 2.0, 3)))
    monkeypatch.setattr(arms, "read_latents", lambda *a: (torch.zeros(16, 17, 34, 60), {}))
    bench = arms.Bench(object(), None, None, None, None, tmp_path, 1e12, 4.0, 1)
    assert arms.native_error(bench, plan).error == pytest.approx(0.25)
    measured = {name: Timing(4.0, 4.0, 4.0, 3) for name in ("detail 1/1", "decode", "mux")}
    errors = arms.detail_error(bench, plan, measured)
    assert errors["detail"].error == pytest.approx(0.25) and errors["decode"].error == pytest.approx(-3 / 8)


def test_equal_steps_scaled_from_measured_ones_are_never_measured_in_full(tmp_path):
    """As many steps of the proxy without autoguidance are two thirds of the work."""
    plan = make_plan(Request("tiny", 960, 540, Fraction(4)))
    assert plan.proxy.is_autoguided
    few = {name: Timing(6.0, 5.0, 7.0, 2) for name in ("text", *dict(plan.named_stages()), "decode")}
    bench = arms.Bench(None, None, None, None, None, tmp_path, 1e9, 4.0, 2)
    equal = arms.equal_arm(bench, plan, plan.proxy.steps, few)
    assert set(equal) == set(few)
    assert equal["proxy"].seconds == pytest.approx(4.0, rel=0.01) and equal["proxy"].fraction == 1
    assert equal["detail 1/1"].fraction < 1 and equal["text"] == equal["decode"] == few["text"]
    assert {name for name, timing in equal.items() if timing.projected} == set(dict(plan.named_stages()))


@pytest.mark.parametrize(("threads", "heads"), [(1, 1), (2, 2), (64, 3)])
def test_natives_sample_is_checked_with_the_heads_that_it_takes_at_the_full_size(
    monkeypatch, ticks, tmp_path, threads, heads
):
    """There keys leave room for one; more are taken only where the few rows of the check would leave threads idle."""
    plan, taken = make_plan(Request("tiny", 960, 540, Fraction(4))), set()
    size, patch = plan.preset.transformer, plan.preset.geometry.patch

    def attention(q, k, v, **options):
        taken.add((q.shape[2], k.shape[1]))
        ticks(1.0)

    for module in (arms, measure):
        monkeypatch.setattr(module, "native_forward", lambda *a: lambda: ticks(1.0))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(measure, "dispatch_attention_fn", attention)
    monkeypatch.setattr(measure, "KEY_BYTES", 8 * size.dim // size.heads * plan.native_grid.tokens)
    model = type("Model", (), {"device": torch.device("cpu"), "dtype": torch.float32, "blocks": (1, 2)})()
    rate = 4 * full_flops(size, patch, 1200, size.text_length) / arms.EFFICIENCY  # a warm-up and three in a second
    found = arms.native_error(arms.Bench(None, None, None, model, None, tmp_path, rate, 4.0, 1), plan)
    assert taken == {(heads, found.tokens)} and 1024 < found.tokens <= 1200
