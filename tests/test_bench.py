"""The bench's arithmetic is exact and its arms are what they claim; no time is asserted."""

import json
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from diffusers.configuration_utils import FrozenDict

from atlasvid_cli import arms, bench, measure
from atlasvid_cli.console import Console
from atlasvid_cli.errors import ResourceError
from atlasvid_cli.plan import Request, make_plan
from atlasvid_cli.presets import load_preset
from atlasvid_cli.shapes import Grid
from atlasvid_cli.timing import Timing

KEYS = (  # what a reader of --json may rely on
    "speedup speedup_denoise projected projection_error growth_exponent gemm_fraction peak_bytes stages tokens frames"
    " steps model baseline device backend versions few_step attention_free_ceiling flops"
)


def timing(seconds, fraction=1.0):
    return Timing(seconds, seconds / 2, seconds * 2, 3, fraction)


@pytest.mark.parametrize("grid", [Grid(4, 40, 40), Grid(9, 68, 120)])
def test_a_native_sample_scales_by_rows_heads_layers_and_tokens(monkeypatch, ticks, grid):
    """With a clock that counts operations, the projection equals the true count."""
    size = load_preset("tiny").transformer
    linear, row, head_token = 7.0, 3.0, 1e-6  # seconds of a token in a block, of a token outside, of a pair a head

    class Model:
        device, dtype = torch.device("cpu"), torch.float32
        config = type("Config", (), {"in_channels": 16, "text_dim": 8})
        blocks = tuple(range(size.layers))

        def __call__(self, latents, timestep, states, return_dict):
            tokens = latents[0, 0].numel() // 4
            assert states.shape[1] == 512
            ticks(tokens * (row + linear * len(self.blocks)))

    def attention(q, k, v, **options):
        assert k.shape == v.shape and k.shape[1] == grid.tokens and q.shape[1] <= grid.tokens
        ticks(head_token * q.shape[1] * k.shape[1] * q.shape[2])

    monkeypatch.setattr(measure, "dispatch_attention_fn", attention)
    monkeypatch.setattr(measure, "KEY_BYTES", 8 * 64 * grid.tokens)  # one head of three
    found = measure.native_sample(Model(), size, 2, grid, 1e9, 1.0, 1)
    tokens = grid.tokens
    whole = tokens * (row + linear * size.layers) + head_token * tokens**2 * size.heads * size.layers
    assert found.seconds == pytest.approx(whole) and 0 < found.fraction < 1


def test_a_detail_sample_scales_by_the_flops_it_did(monkeypatch, ticks):
    plan = make_plan(Request("tiny", 1920, 1080, Fraction(2)))
    stage, preset = plan.levels[-1], plan.preset
    model = measure.random_model(preset.transformer, 2)
    seen = []

    def forward(model, tokens, grid, *rest, kernels):
        assert kernels == measure.KERNELS
        seen.append((grid, len(model.blocks)))
        assert len(tokens) == grid.tokens
        ticks(4.0)

    monkeypatch.setattr(measure, "detail_forward", forward)
    found = measure.detail_sample(model, plan, stage, 1e9, 1.0, 3)
    (grid, layers), *others = seen
    assert others == [(grid, layers)] * 3 and layers == 4 and (grid.t, grid.h, grid.w) == (9, 8, 8)
    assert found.seconds == pytest.approx(4.0 / found.fraction) and found.fraction < 0.01
    assert len(model.blocks) == preset.transformer.layers, "the model is whole again"


@pytest.mark.parametrize(("rate", "sampled"), [(1e16, False), (1e6, True)])
def test_a_native_decode_scales_by_latents_after_the_first_and_by_area(monkeypatch, ticks, rate, sampled):
    monkeypatch.setattr(measure, "conv_rate", lambda dtype: rate)
    config = json.loads((load_preset("tiny").folder / "vae" / "config.json").read_text())
    sizes = set()

    class Vae:
        device, dtype = torch.device("cpu"), torch.float32

        def decode(self, z):
            count, area = z.shape[2], z.shape[3] * z.shape[4]
            sizes.add((count, area))
            ticks(area * (3.0 + 5.0 * (count - 1)))

    Vae.config = FrozenDict(config)
    found = measure.native_decode(Vae(), Grid(9, 34, 60), 2, 1.0, 1)
    whole = 4 * 34 * 60
    assert found.seconds == pytest.approx(whole * (3 + 5 * 8))
    assert ({area for _, area in sizes} == {whole}) is not sampled and {n for n, _ in sizes} == {1, 2}
    assert found.fraction == pytest.approx(2 / 9 * max(area for _, area in sizes) / whole)


@pytest.mark.parametrize("tile", [None, 8])
def test_a_decode_sample_scales_by_latents_or_where_tiles_come_first_by_frames(monkeypatch, ticks, tmp_path, tile):
    plan = make_plan(Request("tiny", 960, 540, Fraction(4)))

    def write(path, frames, *, frame_count, on_frame, **rest):
        assert frame_count == 9
        for i in range(frame_count):
            ticks(10.0 if i == 0 else 4.0)
            on_frame(i + 1)
        ticks(0.5)

    monkeypatch.setattr(measure, "write_video", write)
    decode, mux = measure.decode_sample(None, torch.zeros(16, 3, 34, 60), plan, tile, tmp_path, 2)
    assert mux.seconds == 0.5 and decode.runs == 2 and decode.fraction == 3 / 17
    whole = 42.5 * 64 / 9 if tile else 10 + 32.5 * 16 / 2
    assert decode.seconds + mux.seconds == pytest.approx(whole)


def test_self_attention_alone_is_left_out_and_comes_back(transformer, padded):
    latents = torch.randn(1, 4, 3, 8, 8)
    before = transformer(latents, torch.tensor([3]), padded, return_dict=False)[0]
    with measure._without_self_attention():
        without = transformer(latents, torch.tensor([3]), padded, return_dict=False)[0]
        other = transformer(latents, torch.tensor([3]), padded * 2, return_dict=False)[0]
    after = transformer(latents, torch.tensor([3]), padded, return_dict=False)[0]
    assert torch.equal(before, after) and not torch.allclose(before, without)
    assert not torch.equal(without, other), "the text is still attended to"


def test_muxing_a_part_of_the_frames_scales_by_number_and_area(tmp_path, monkeypatch):
    plan = make_plan(Request("tiny", 960, 540, Fraction(1)))
    monkeypatch.setattr(measure, "timed", lambda run, repeats, warm_up: run() or timing(1.0))
    frames = [torch.rand(3, 270, 480)] * 2
    assert measure.mux_alone(frames, plan, tmp_path, 1).seconds == pytest.approx(16 / 2 * 4)


def test_random_weights_stand_at_every_layer_and_have_the_presets_sizes():
    size = replace(load_preset("tiny").transformer, layers=40)
    model = measure.random_model(size, 2)
    assert len(model.blocks) == 40 and model.blocks[0] is model.blocks[39]
    assert model.blocks[0].ffn.net[0].proj.out_features == size.ffn
    assert model.blocks[0].attn1.heads == size.heads and model.blocks[0].attn1.to_q.out_features == size.dim


@pytest.mark.parametrize("tokens", [1, 50, 700, 10**9])
def test_a_crop_is_within_its_tokens_or_a_single_window(tokens):
    grid = Grid(9, 17, 30)
    assert measure.crop(grid, tokens).tokens <= max(tokens, 1)
    windows = measure.crop(grid, tokens, 8)
    assert windows.tokens <= tokens or (windows.t, windows.h, windows.w) == (9, 8, 8)
    assert measure.crop(grid, grid.tokens) == grid


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
    result = bench.result(plan, 20, found, {"native": -0.25, "detail": 0.1}, [point], (1e12, 1e10, 4e11), True)
    assert result["speedup"] == 9040 / 72 and result["speedup_denoise"] == 9000 / 60
    assert result["few_step"]["speedup"] == 9040 / 20 and result["few_step"]["speedup_denoise"] == 9000 / 8
    assert result["projected"] is True and result["projection_error"] == 0.25
    assert result["ceiling_fraction"] == pytest.approx(150 / plan.attention_free_ceiling)
    assert result["gemm_fraction"] == pytest.approx(sum(plan.flops(s) for s in plan.levels) / 6 / 1e12)
    assert result["gemm_fraction_float32"] == pytest.approx(2.5 * result["gemm_fraction"])
    assert result["growth_exponent"] is None and result["peak_bytes"]["atlasvid"] == 7
    assert point["atlasvid_seconds"] == 18 and point["native_seconds"] == 9030
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
    assert capsys.readouterr().out == ""


def test_a_preset_without_weights_is_projected_from_random_ones(random_preset, tmp_path):
    path = tmp_path / "bare.toml"
    path.write_text(random_preset.read_text().replace('model = "random"', 'model = "nothing"'))
    result = bench.run(small(path), 2, 1, 1.0, Console())
    assert result["speedup"] > 0 and result["speedup_denoise"] > 0 and result["projected"]
    assert "random" in result["model"] and set(result["stages"]["native"]) == {"denoise", "decode", "mux"}
    start = result["stages"]["few-step"]["detail 1/1 start"]
    assert start["seconds"] > 0  # of so short a video timed in full


def test_a_job_that_does_not_fit_is_refused_before_loading(random_preset, monkeypatch):
    monkeypatch.setattr(bench, "available_ram", lambda: 1 << 20)
    monkeypatch.setattr(bench, "_load", None)
    with pytest.raises(ResourceError, match="--budget-seconds"):
        bench.run(small(random_preset), 2, 1, 1e9, Console())
