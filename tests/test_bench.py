"""What the bench reports follows from its times; no time is asserted."""

import json
from fractions import Fraction

import pytest

from atlasvid_cli import arms, bench
from atlasvid_cli.arms import Check
from atlasvid_cli.console import Console
from atlasvid_cli.errors import ResourceError
from atlasvid_cli.plan import Request, make_plan
from atlasvid_cli.timing import Rates, Timing

KEYS = (  # what a reader of --json may rely on
    "speedup speedup_denoise projected projection_error growth_exponent gemm_fraction peak_bytes stages tokens frames"
    " steps model baseline device backend versions few_step attention_free_ceiling flops offload gemm_tflops"
)


def timing(seconds, fraction=1.0):
    return Timing(seconds, seconds / 2, seconds * 2, 3, fraction)


def test_the_growth_exponent_is_that_of_a_power():
    points = [(n, 3e-7 * n**1.7) for n in (100, 250, 900)]
    assert bench.growth_exponent(points) == pytest.approx(1.7)
    assert bench.growth_exponent(points[:1]) is None


def test_sizes_of_the_fit_have_the_depth_of_the_target():
    plan = make_plan(Request("tiny", 3840, 2160, Fraction(12)))
    plans = bench.smaller_plans(plan)
    tokens = [p.target.tokens for p in plans]
    assert len(plans) >= 4 and tokens == sorted(set(tokens)) and tokens[-1] < plan.target.tokens
    assert {(len(p.levels), p.scale) for p in plans} == {(2, 1)}


def test_speedups_follow_from_the_stages():
    plan = make_plan(Request("tiny", 3840, 2160, Fraction(12)))
    ours = {"text": timing(1), "proxy": timing(2), "decode": timing(10), "mux": timing(1)}
    found = {
        "native": {"text": timing(1), "denoise": timing(9000, 0.001), "decode": timing(30), "mux": timing(9)},
        "equal steps": ours | {"detail 1/2": timing(8), "detail 2/2": timing(50, 0.5)},
        "few-step": ours | {"detail 1/2": timing(1), "detail 2/2": timing(5)},
    }
    point = bench._point(plan, found["few-step"], found["native"], 7, None)
    checks = {"native": Check(-0.25, 300), "detail": Check(0.1, 5000)}
    rates = Rates({"before": 9e11, "few-step": 1e12, "equal steps": 8e11, "native": 9e11}, 1e10, 4e11)
    result = bench.result(plan, 20, found, checks, [point], rates, True)
    assert result["speedup"] == 9040 / 72 and result["speedup_denoise"] == 9000 / 60
    assert result["few_step"]["speedup"] == 9040 / 20 and result["few_step"]["speedup_denoise"] == 9000 / 8
    # `timing` is from half to twice its seconds
    assert result["totals_range"]["native"] == [9040 / 2, 9040 * 2]
    assert result["speedup_range"] == pytest.approx([9040 / 72 / 4, 9040 / 72 * 4])
    assert result["few_step"]["speedup_range"] == pytest.approx([9040 / 20 / 4, 9040 / 20 * 4])
    assert result["few_step"]["speedup_denoise_range"] == pytest.approx([9000 / 8 / 4, 9000 / 8 * 4])
    assert result["projected"] is True and result["projection_error"] == 0.25
    assert result["projection_errors"] == {"native": -0.25, "detail": 0.1}
    assert result["projection_tokens"] == {"native": 300, "detail": 5000}
    assert result["gemm_tflops"] == {"before": 0.9, "few-step": 1.0, "equal steps": 0.8, "native": 0.9}
    assert result["ceiling_fraction"] == pytest.approx(150 / plan.attention_free_ceiling)
    assert result["gemm_fraction"] == pytest.approx(sum(plan.flops(s) for s in plan.levels) / 6 / 1e12)
    assert result["gemm_fraction_float32"] == pytest.approx(2.5 * result["gemm_fraction"])
    assert result["growth_exponent"] is None and result["peak_bytes"]["atlasvid"] == 7
    assert point["atlasvid_seconds"] == 18 and point["native_seconds"] == 9030
    assert result["offload"] == "none"
    assert set(KEYS.split()) <= set(result) and json.loads(json.dumps(result)) == result


def small(preset):
    return Request(str(preset), 256, 192, Fraction(1, 2))


def test_both_arms_are_measured_in_full_where_the_budget_allows(random_preset, capsys, monkeypatch):
    lengths = []
    monkeypatch.setattr(arms, "WARM_UP", (256, 192))
    monkeypatch.setattr(arms, "expected_seconds", lambda plan: 0.0)
    monkeypatch.setattr(arms, "EFFICIENCY", 1e9)  # what is expected of both arms takes no time
    monkeypatch.setattr(arms, "STOCK_CONV_RATE", 1e9)
    monkeypatch.setattr(bench, "SIZES", ((1, "1/2"),))
    rates = iter((0.1e12, 0.12e12, 0.15e12, 0.12e12))
    monkeypatch.setattr(bench, "_gemm_rate", lambda dtype="own": next(rates) if dtype == "own" else 1e11)
    plain = arms.WanPipeline.__call__

    def call(self, *args, **kwargs):
        lengths.append((kwargs["height"], kwargs["width"], kwargs["num_frames"], kwargs["num_inference_steps"]))
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(arms.WanPipeline, "__call__", call)
    result = bench.run(small(random_preset), 2, 2, 20.0, Console())
    assert lengths == [(192, 256, 9, steps) for steps in (1, 2, 2)], "warm-up, then two runs"
    assert not any(t["projected"] for t in result["stages"]["native"].values())
    assert set(result["stages"]["few-step"]) == {
        "text", "proxy", "preview", "detail 1/1 start", "detail 1/1", "decode", "mux", "rest",
    }  # fmt: skip
    assert all(t["runs"] == 2 for t in result["stages"]["few-step"].values())
    assert result["speedup"] == result["totals"]["native"] / result["totals"]["equal steps"]
    assert result["projected"] is False and set(result["projection_errors"]) == {"native", "detail"}
    assert len(result["growth"]) == 2 and result["frames"] == 8 and result["steps"] == 2
    assert result["peak_bytes"]["atlasvid"] > 0 and result["peak_bytes"]["native"] > 0
    said = capsys.readouterr()
    assert (
        said.out == ""
        and "warning: a big matrix product was 50 % faster beside one arm than beside another" in said.err
    )
    assert list(result["gemm_tflops"].values()) == [0.1, 0.12, 0.15, 0.12], "one before the arms and one after each"


def test_a_preset_without_weights_is_projected_from_random_ones(random_preset, tmp_path):
    path = tmp_path / "bare.toml"
    path.write_text(random_preset.read_text().replace('model = "random"', 'model = "nothing"'))
    result = bench.run(small(path), 2, 1, 1.0, Console())
    assert result["speedup"] > 0 and result["speedup_denoise"] > 0 and result["projected"]
    assert "random" in result["model"] and set(result["stages"]["native"]) == {"denoise", "decode", "mux"}
    assert set(result["stages"]["few-step"]) == {
        "proxy", "preview", "detail 1/1 start", "detail 1/1", "decode", "mux",
    }, "those of a measured arm, but for text and rest"  # fmt: skip
    start = result["stages"]["few-step"]["detail 1/1 start"]
    assert start["seconds"] > 0  # of so short a video timed in full


def test_a_job_that_does_not_fit_is_refused_before_loading(random_preset, monkeypatch):
    monkeypatch.setattr(bench, "available_ram", lambda: 1 << 20)
    monkeypatch.setattr(bench, "_load", None)
    with pytest.raises(ResourceError, match="--budget-seconds"):
        bench.run(small(random_preset), 2, 1, 1e9, Console())
