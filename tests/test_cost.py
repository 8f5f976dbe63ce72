"""Resources are refused before anything loads, each on the disk that it will be written to."""

import dataclasses
import math
from fractions import Fraction

import pytest
import torch
from transformers import UMT5EncoderModel

from atlasvid_cli import block, cost, vae_cost
from atlasvid_cli.cost import check_resources, rows
from atlasvid_cli.decode_cost import ENCODER_BYTES, VIDEO_BYTES
from atlasvid_cli.errors import ResourceError
from atlasvid_cli.machine import Device, Machine, machine_with_gpu, this_machine
from atlasvid_cli.memory import Placement, model_bytes
from atlasvid_cli.model import TextContext
from atlasvid_cli.plan import Request, make_plan
from atlasvid_cli.presets import load_preset
from atlasvid_cli.streams import detail_forward
from atlasvid_cli.video import CODECS
from atlasvid_cli.weights import load_transformer


def job(codec="h264"):
    return make_plan(Request("tiny", 3840, 2160, Fraction(12), codec=codec))


def test_every_codec_has_an_estimate():
    assert VIDEO_BYTES.keys() == ENCODER_BYTES.keys() == CODECS.keys()


@pytest.mark.parametrize(("full", "option"), [("videos", "--output"), ("runs", "--run-dir")])
def test_each_disk_is_asked_for_what_goes_there(tmp_path, monkeypatch, full, option):
    monkeypatch.setattr(cost, "disk_of", lambda p: (p.name == "runs", 1000 if p.name == full else 1 << 50))
    monkeypatch.setattr(cost, "available_ram", lambda: 1 << 40)
    with pytest.raises(ResourceError, match=option):
        check_resources(job("prores"), tmp_path / "videos", tmp_path / "runs")


def test_one_disk_is_asked_for_both(tmp_path, monkeypatch):
    plan = job("prores")
    needed = sum(row.disk for row in rows(plan))
    monkeypatch.setattr(cost, "available_ram", lambda: 1 << 40)
    monkeypatch.setattr(cost, "disk_of", lambda p: (1, needed - 1))
    with pytest.raises(ResourceError, match="free"):
        check_resources(plan, tmp_path)
    monkeypatch.setattr(cost, "disk_of", lambda p: (1, needed))
    check_resources(plan, tmp_path)


def test_a_folder_that_is_not_there_yet_is_on_its_parents_disk(tmp_path):
    assert cost.disk_of(tmp_path / "a" / "b")[0] == tmp_path.stat().st_dev


def test_too_little_memory_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "available_ram", lambda: 1 << 28)
    with pytest.raises(ResourceError, match="memory"):
        check_resources(job(), tmp_path)


def test_a_batch_is_asked_for_the_disk_of_all_its_videos(monkeypatch, tmp_path):
    plan = job()
    once = sum(row.disk for row in rows(plan))
    monkeypatch.setattr(cost, "available_ram", lambda: 1 << 40)
    monkeypatch.setattr(cost, "disk_of", lambda p: (1, once))
    check_resources(plan, tmp_path)
    with pytest.raises(ResourceError, match="free some space"):
        check_resources(plan, tmp_path, videos=2)
    monkeypatch.setattr(cost, "disk_of", lambda p: (1, 2 * once))
    check_resources(plan, tmp_path, videos=2)


def test_a_clips_proxy_needs_no_text_encoder(tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "available_ram", lambda: 1)
    request = Request("wan2.1-1.3b", 832, 480, Fraction(1), proxy_only=True, clip=object())
    assert [row.stage for row in rows(make_plan(request))] == ["encode", "preview"]
    with pytest.raises(ResourceError, match=r"the (encode|preview) stage needs .* close other programs"):
        check_resources(make_plan(request), tmp_path)


def test_what_decoding_lacks_on_a_gpu_that_others_use_decode_gib_gives(monkeypatch, tmp_path):
    monkeypatch.setattr(cost, "this_machine", lambda: Machine(machine_with_gpu(9).device, 7 * cost.GIB))
    request = Request("wan2.1-1.3b", 3840, 2160, Fraction(1), offload="host")
    with pytest.raises(ResourceError, match=r"decode stage needs .* GPU memory .* decode_gib"):
        check_resources(make_plan(request), tmp_path)


def test_the_proxy_alone_is_asked_for_the_proxy_alone(tmp_path):
    plan = make_plan(Request("tiny", 16384, 9216, Fraction(600)))
    with pytest.raises(ResourceError, match="detail"):
        check_resources(plan, tmp_path)
    plan = make_plan(Request("tiny", 16384, 9216, Fraction(60), proxy_only=True))
    check_resources(plan, tmp_path)
    assert [row.stage for row in rows(plan)] == ["text", "proxy", "preview"]


def test_what_the_text_encoder_lacks_no_size_of_video_gives(tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "available_ram", lambda: 8 << 30)
    with pytest.raises(ResourceError, match=r"the text stage needs .* close other programs"):
        check_resources(make_plan(Request("wan2.1-1.3b", 832, 480, Fraction(1), proxy_only=True)), tmp_path)


def test_the_text_encoder_is_counted():
    """A laptop that holds the transformer of Wan2.1 1.3B does not hold its text encoder in fp32."""
    text, *others = rows(make_plan(Request("wan2.1-1.3b", 832, 480, Fraction(1))))
    assert text.stage == "text" and text.needed.ram > max(row.needed.ram for row in others)


def test_a_stage_takes_its_products_and_its_convolutions(monkeypatch):
    monkeypatch.setattr(cost, "gemm_rate", lambda: 1e9)
    monkeypatch.setattr(cost, "conv_rate", lambda dtype: 4e9)
    plan = make_plan(Request("tiny", 3840, 2160, Fraction(4)))
    found = {row.stage: row for row in rows(plan)}
    for name, stage in plan.named_stages():
        products, row = plan.flops(stage), found[name]
        convolutions = row.flops - products
        assert (convolutions > 0) == stage.in_pixels
        seconds = products / (1e9 * cost.EFFICIENCY) + convolutions / (4e9 * cost.DECODE_EFFICIENCY)
        assert row.seconds == pytest.approx(seconds, abs=0.06)
    decode = found["decode"]
    assert decode.seconds == pytest.approx(decode.flops / (4e9 * cost.DECODE_EFFICIENCY), abs=0.06)


def test_keys_and_values_of_the_proxy_are_counted():
    """DESIGN §4: in every block, of every proxy token, for each prompt."""
    preset, gpu = load_preset("wan2.1-1.3b"), machine_with_gpu(80)

    def needed(attends):
        changed = dataclasses.replace(preset, detail=dataclasses.replace(preset.detail, proxy_attention=attends))
        plan = make_plan(Request("wan2.1-1.3b", 3840, 2160, Fraction(4)), preset=changed)
        return plan, cost.memory(plan, plan.levels[-1], Placement("none"), gpu).device

    (plan, with_proxy), (_, without) = needed(True), needed(False)
    level, size = plan.levels[-1], preset.transformer
    kept = 2 * size.layers * plan.below(level).tokens * size.dim * 2 * level.passes
    assert kept <= with_proxy - without < 1.02 * kept


def adapted(fields, preset="wan2.1-1.3b"):
    """A plan of 4K x 12 s, of the whole method."""
    whole = load_preset(preset)
    detail = dataclasses.replace(whole.detail, proxy_attention=True)
    return make_plan(
        Request(preset, 3840, 2160, Fraction(12), **fields), preset=dataclasses.replace(whole, detail=detail)
    )


def test_a_proxy_stream_beside_the_detail_takes_a_block_of_it():
    plan, gpu = adapted({}), machine_with_gpu(80)
    level, size = plan.levels[-1], plan.preset.transformer
    states = plan.below(level).tokens * size.dim * 2
    kept, beside = (cost.memory(plan, level, Placement("none", keeps), gpu).device for keeps in (True, False))
    difference = 2 * size.layers * states * level.passes - 3 * states
    assert 0.98 * difference < kept - beside < difference  # rotations are beside them
    context = plan.flops(level, keeps=False) - plan.flops(level)
    assert 0 < context < 0.3 * plan.flops(level)


@pytest.mark.parametrize(
    ("gib", "fields", "offload", "keeps"),
    [
        (141, {}, "none", True),
        (80, {}, "none", False),
        (16, {}, "none", False),
        (12, {}, "block", False),
        (141, {"offload": "block"}, "block", True),
        (8, {}, "host", False),
    ],
)
def test_where_keys_of_the_proxy_have_no_room_they_are_computed_anew(gib, fields, offload, keeps):
    assert cost.placement_of(adapted(fields), machine_with_gpu(gib)) == Placement(offload, keeps)


def test_the_windows_of_a_proxy_stream_are_counted_where_they_are_larger_than_the_details():
    """As in docs/TRAINING.md's preset: with small windows, a few at a time, they are what computes most."""
    plan, gpu = adapted({"chunk": 1}), machine_with_gpu(80)
    small = dataclasses.replace(plan.preset.detail, windows=((13, 16, 16),))
    fine = dataclasses.replace(plan, preset=dataclasses.replace(plan.preset, detail=small))
    without = dataclasses.replace(small, proxy_window=(1, 1, 1))
    stock = dataclasses.replace(plan, preset=dataclasses.replace(plan.preset, detail=without))
    given = plan.levels[-1], Placement("none", keeps=False), gpu
    assert cost.memory(fine, *given).device - cost.memory(stock, *given).device > 2 * cost.GIB


def test_keys_of_the_proxy_go_to_host_memory_that_is_as_large(monkeypatch):
    """Whatever of it is free: that changes as models come and go, and the job would change its placement with it."""
    here = dataclasses.replace(machine_with_gpu(8), is_here=True)
    monkeypatch.setattr(cost, "available_ram", lambda: pytest.fail("free memory was asked for"))
    for gib, keeps in ((64, False), (512, True)):
        monkeypatch.setattr(cost, "total_ram", lambda gib=gib: gib * cost.GIB)
        assert cost.placement_of(adapted({}), here) == Placement("host", keeps)
    cpu = dataclasses.replace(this_machine(), device=Device("cpu", "cpu", "float32", 4, "test"), vram=0)
    for gib, keeps in ((64, False), (512, True)):
        monkeypatch.setattr(cost, "total_ram", lambda gib=gib: gib * cost.GIB)
        assert cost.placement_of(adapted({}), cpu) == Placement("none", keeps)


def test_the_embedded_text_encoder_is_as_large_as_its_preset_says():
    preset = load_preset("tiny")
    encoder = UMT5EncoderModel.from_pretrained(preset.folder / "text_encoder")
    assert sum(p.numel() for p in encoder.parameters()) == preset.text.parameters
    assert encoder.shared.weight.numel() == preset.text.looked_up


def test_a_proxy_is_not_asked_for_the_disk_of_its_video(tmp_path, monkeypatch):
    request = Request("tiny", 7680, 4320, Fraction(600), proxy_only=True)
    monkeypatch.setattr(cost, "available_ram", lambda: 1 << 40)
    monkeypatch.setattr(cost, "disk_of", lambda p: (1, cost.GIB))
    check_resources(make_plan(request), tmp_path)


def test_wan_14b_fits_a_48_gib_gpu_in_fp8_and_not_without():
    """4K x 12 s with nothing offloaded; DESIGN §4's goal is 80 GiB, 48 with fp8 weights."""
    needed = {}
    for dtype in ("auto", "fp8"):
        request = Request("wan2.1-14b", 3840, 2160, Fraction(12), offload="none", weight_dtype=dtype)
        plan = make_plan(request)
        needed[dtype] = max(
            cost.memory(plan, stage, Placement("none"), machine_with_gpu(80)).vram for _, stage in plan.own_stages()
        )
    assert needed["fp8"] < 48 * cost.GIB < needed["auto"] < 80 * cost.GIB


def test_guidance_in_one_batch_takes_another_hidden_state():
    preset = load_preset("wan2.1-1.3b")

    def needed(batch):
        first = dataclasses.replace(preset.detail.first, guidance_batch=batch)
        changed = dataclasses.replace(preset, detail=dataclasses.replace(preset.detail, first=first))
        plan = make_plan(Request("wan2.1-1.3b", 1920, 1080, Fraction(4)), preset=changed)
        return plan, cost.memory(plan, plan.levels[0], Placement("none"), machine_with_gpu(80)).device

    (plan, apart), (_, together) = needed(False), needed(True)
    assert together - apart == plan.levels[0].grid.tokens * preset.transformer.dim * 2


def test_autoguidance_takes_the_weights_twice():
    plan = make_plan(Request("tiny", 960, 544, Fraction(4)))
    gpu = machine_with_gpu(80)
    plain = dataclasses.replace(plan, proxy=dataclasses.replace(plan.proxy, autoguidance=0.0))
    two, one = (cost.memory(p, p.proxy, Placement("none"), gpu).device for p in (plan, plain))
    assert two - one == model_bytes(plan.preset, gpu.device)
    two, one = (cost.memory(p, p.proxy, Placement("block"), gpu) for p in (plan, plain))
    assert 0 < two.device - one.device < model_bytes(plan.preset, gpu.device)  # what is no block
    assert two.host - one.host >= 0.9 * model_bytes(plan.preset, gpu.device)


def test_a_fast_gpu_still_takes_a_while_for_each_chunk_of_windows(random_preset, monkeypatch):
    gpu = Machine(Device("cuda", "a GPU", "bfloat16", 2, "test"), 80 * cost.GIB)
    for rate in ("gemm_rate", "conv_rate"):
        monkeypatch.setattr(cost, rate, lambda *dtype: 1e18)
    plan = make_plan(Request(str(random_preset), 512, 384, Fraction(2), chunk=2))
    stage, calls = plan.levels[-1], []
    monkeypatch.setattr(block, "block_forward", lambda block, x, *rest, **named: calls.append(1) or (x, x, x))
    weights = load_transformer(random_preset.with_suffix(""))
    text = TextContext([(torch.empty(0),) * 2] * 2, torch.empty(0))
    tokens = torch.zeros(stage.grid.tokens, 16)
    with torch.no_grad():
        detail_forward(weights, tokens, stage.grid, 500, text, None, plan.preset.detail.layouts, plan.chunk)
    row = next(row for row in rows(plan, gpu) if row.stage == plan.named_stages()[-1][0])
    assert row.seconds == pytest.approx(cost.LAUNCH * len(calls) * stage.forwards(), abs=0.06)


@pytest.mark.parametrize(("gib", "offload"), [(16, "none"), (9, "block"), (8, "host"), (7, None)])
def test_a_plan_for_another_gpu_offloads_as_little_as_fits_it(tmp_path, monkeypatch, gib, offload):
    """Wan2.1 1.3B at 4K x 12 s: DESIGN §4's goal is 16 GiB. This machine's memory and disk are not asked for."""
    for name in ("available_ram", "disk_of", "gemm_rate", "conv_rate"):
        monkeypatch.setattr(cost, name, lambda *args: pytest.fail("this machine was asked"))
    plan, machine = make_plan(Request("wan2.1-1.3b", 3840, 2160, Fraction(12))), machine_with_gpu(gib)
    costs = rows(plan, machine)
    assert all(math.isnan(row.seconds) for row in costs)
    if offload:
        assert cost.placement_of(plan, machine).offload == offload
        check_resources(plan, tmp_path, costs=costs, machine=machine)
    else:
        with pytest.raises(ResourceError, match="GPU memory"):
            check_resources(plan, tmp_path, costs=costs, machine=machine)


@pytest.mark.parametrize(
    ("preset", "size", "seconds", "gib", "fields", "remedy"),
    [
        ("wan2.1-14b", (7680, 4320), 600, 80, {}, "fewer --seconds"),
        (
            "wan2.1-14b",
            (3840, 2160),
            12,
            12,
            {"weight_dtype": "int8", "offload": "host", "chunk": 1},
            "fewer --seconds",
        ),
        (
            "wan2.1-14b",
            (3840, 2160),
            12,
            40,
            {"offload": "none"},
            "--weight-dtype int8, --offload auto, a smaller --res or fewer --seconds",
        ),
        ("tiny", (7680, 4320), 600, 10, {"offload": "none"}, "--offload auto, a smaller --res or fewer --seconds"),
        ("tiny", (3840, 2160), 12, 64, {"offload": "host", "chunk": 10**6}, "a smaller --chunk"),
    ],
)
def test_the_remedy_names_what_saves_enough_and_is_not_in_use(tmp_path, preset, size, seconds, gib, fields, remedy):
    plan, machine = make_plan(Request(preset, *size, Fraction(seconds), **fields)), machine_with_gpu(gib)
    with pytest.raises(ResourceError) as said:
        check_resources(plan, tmp_path, machine=machine)
    assert str(said.value).split("; ")[1] == f"choose {remedy}"


def test_in_memory_of_the_cpu_eight_bits_of_a_small_model_save_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "available_ram", lambda: 8 * cost.GIB)
    with pytest.raises(ResourceError, match=r"free; choose a smaller --res or fewer --seconds$"):
        check_resources(make_plan(Request("tiny", 7680, 4320, Fraction(600))), tmp_path)


def test_a_saved_proxy_is_not_made_shorter_nor_a_regions_video_smaller(tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "available_ram", lambda: 2 * cost.GIB)
    request = Request("tiny", 7680, 4320, Fraction(60))
    proxy = make_plan(request).proxy
    whole = make_plan(request, proxy.grid, Fraction(4))
    part = make_plan(dataclasses.replace(request, region=(0, 0, 640, 360)), proxy.grid, Fraction(4))
    for plan, remedy in ((whole, "a smaller --res"), (part, "a machine with more memory")):
        with pytest.raises(ResourceError, match=f"free; choose {remedy}$"):
            check_resources(plan, tmp_path, costs=[row for row in rows(plan) if row.stage not in cost.DECODED])


def test_frames_half_as_large_are_planned_for():
    plan = make_plan(Request("tiny", 3840, 2160, Fraction(2)))
    level = plan.levels[-1]
    whole = dataclasses.replace(plan, levels=(*plan.levels[:-1], dataclasses.replace(level, entry=None)))
    (half_flops, half_bytes), (flops, held) = (cost._enlarging(p, p.levels[-1], this_machine()) for p in (plan, whole))
    grid = level.grid
    at = plan.preset.vae, 2 * grid.h, 2 * grid.w
    assert flops - half_flops == grid.t * (vae_cost.encode_flops(*at) - vae_cost.encode_flops(*at, half=True)) > 0
    assert half_bytes.host + half_bytes.device < held.host + held.device


@pytest.mark.parametrize("option", ["--output", "--run-dir"])
def test_a_file_in_place_of_a_folder_is_said(tmp_path, option):
    plan = make_plan(Request("tiny", 256, 160, Fraction(1)))
    (tmp_path / "a").touch()
    folders = (tmp_path / "a", None) if option == "--output" else (tmp_path, tmp_path / "a")
    with pytest.raises(ResourceError, match=f"it is a file.; choose another {option}"):
        check_resources(plan, *folders)
