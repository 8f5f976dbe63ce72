"""Samples scale by exact counts, and are of the work that they stand for; no time is asserted."""

import json
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from diffusers.configuration_utils import FrozenDict

from atlasvid_cli import measure
from atlasvid_cli.plan import Request, make_plan
from atlasvid_cli.presets import load_preset
from atlasvid_cli.shapes import Grid
from atlasvid_cli.timing import Timing


def timing(seconds):
    return Timing(seconds, seconds / 2, seconds * 2, 3)


@pytest.fixture
def native(monkeypatch, ticks):
    """tiny's model and attention by diffusers, as a clock that counts operations; and what attention was asked for."""
    size = load_preset("tiny").transformer
    seen = []

    class Model:
        device, dtype = torch.device("cpu"), torch.float32
        config = type("Config", (), {"in_channels": 16, "text_dim": 8})
        blocks = tuple(range(size.layers))

        def __call__(self, latents, timestep, states, return_dict):
            tokens = latents[0, 0].numel() // 4
            assert states.shape[1] == 512
            ticks(tokens * (3.0 + 7.0 * len(self.blocks)))

    def attention(q, k, v, **options):
        assert k.shape == v.shape and q.shape[1] <= k.shape[1]
        seen.append((q.shape[2], q.shape[1], k.shape[1]))
        ticks(1e-6 * q.shape[1] * k.shape[1] * q.shape[2])

    monkeypatch.setattr(measure, "dispatch_attention_fn", attention)
    return Model(), size, seen


@pytest.mark.parametrize("grid", [Grid(4, 40, 40), Grid(9, 68, 120)])
def test_a_native_sample_scales_by_rows_heads_layers_and_tokens(native, grid):
    """With a clock that counts operations, the projection equals the true count."""
    model, size, _ = native
    found = measure.native_sample(model, size, 2, grid, 1, measure.Budget(1e9, 1.0, 1))
    whole = grid.tokens * (3 + 7 * size.layers) + 1e-6 * grid.tokens**2 * size.heads * size.layers
    assert found.seconds == pytest.approx(whole) and 0 < found.fraction < 1


def test_a_native_sample_never_takes_as_many_tokens_as_text(native, monkeypatch):
    """Its attention to itself could not be told from that to the text."""
    (model, size, _), taken, forward = native, [], measure.native_forward
    monkeypatch.setattr(measure, "native_forward", lambda *a: taken.append(a[-1].tokens) or forward(*a))
    measure.native_sample(model, size, 2, Grid(1, 16, 32), 1, measure.Budget(1e12, 1.0, 1))
    assert taken == [496]


@pytest.mark.parametrize("threads", [2, 64])
@pytest.mark.parametrize("grid", [Grid(9, 68, 120), Grid(2, 20, 30), Grid(1, 8, 8)])
def test_a_native_sample_keeps_every_thread_busy_where_all_of_attention_would(native, monkeypatch, threads, grid):
    """PyTorch's CPU kernel gives a thread 256 rows of one head at a time."""
    model, size, seen = native
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    measure.native_sample(model, size, 2, grid, 1, measure.Budget(1e6, 1.0, 1))
    heads, rows, keys = seen[0]
    assert keys == grid.tokens
    assert heads * rows / 256 >= 4 * threads or (heads, rows) == (size.heads, grid.tokens)
    assert heads == 1 or grid.tokens < 4 * threads * 256, "more heads cost memory for keys"


def test_a_native_sample_holds_as_many_heads_as_its_keys_leave_room_for(native, monkeypatch):
    model, size, seen = native
    monkeypatch.setattr(measure, "KEY_BYTES", 2 * 8 * 64 * 4 * 40 * 40)  # two of three
    measure.native_pass(model, size, 2, Grid(4, 40, 40), measure.Budget(1e9, 0.1, 1))
    assert seen[0][0] == 2


def test_the_spread_of_a_difference_has_its_median_within(monkeypatch):
    """One slow run of the shorter clip would else make the longest time shorter than the median."""
    times = iter((Timing(2.0, 1.0, 4.0, 3), Timing(6.0, 5.0, 6.5, 3)))
    monkeypatch.setattr(measure, "timed", lambda run, repeats: next(times))
    config = json.loads((load_preset("tiny").folder / "vae" / "config.json").read_text())
    vae = type("Vae", (), {"device": "cpu", "dtype": torch.float32, "config": FrozenDict(config), "decode": print})
    found = measure.native_decode(vae, Grid(9, 2, 2), 2, 1e3, 3)
    assert (found.seconds, found.low, found.high) == (2 + 8 * 4, 1 + 8 * 1, 4 + 8 * 5.5)


def test_a_detail_sample_scales_by_the_flops_it_did(monkeypatch, ticks):
    plan = make_plan(Request("tiny", 1920, 1080, Fraction(2)))
    stage, preset = plan.levels[-1], plan.preset
    model = measure.random_model(preset.transformer, 2)
    seen = []

    def forward(model, tokens, grid, *rest, kernels, states):
        assert kernels == measure.KERNELS and states is None
        seen.append((grid, len(model.blocks)))
        assert len(tokens) == grid.tokens
        ticks(4.0)

    monkeypatch.setattr(measure, "detail_forward", forward)
    found = measure.detail_sample(model, plan, stage, measure.Budget(1e9, 1.0, 3))
    (grid, layers), *others = seen
    assert others == [(grid, layers)] * 3 and layers == 4 and (grid.t, grid.h, grid.w) == (9, 8, 8)
    assert found.seconds == pytest.approx(4.0 / found.fraction) and found.fraction < 0.01
    assert len(model.blocks) == preset.transformer.layers, "the model is whole again"


def test_a_detail_sample_has_its_states_where_a_render_keeps_them(monkeypatch):
    plan = make_plan(Request("tiny", 1920, 1080, Fraction(2), offload="host"))
    seen = []

    def notes(run):
        def noted(*arguments, states, **options):
            seen.append(states)
            return run(*arguments, states=states, **options)

        return noted

    for name in ("proxy_context", "detail_forward"):
        monkeypatch.setattr(measure, name, notes(getattr(measure, name)))
    model = measure.random_model(replace(plan.preset.transformer, layers=2), 2)
    measure.detail_sample(model, plan, plan.levels[-1], measure.Budget(1e9, 0.01, 1))
    assert seen == [torch.device("cpu")] * 3, "the context, a warm-up and a run"


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
    latents, level = torch.zeros(16, 3, 34, 60), plan.levels[-1]
    decode, mux = measure.decode_sample(None, latents, plan, level, tile, tmp_path, 2)
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
