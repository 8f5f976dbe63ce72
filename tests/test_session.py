"""A session loads each part once, for the whole batch, and says what stock weights cost."""

import json
import shutil
from dataclasses import replace
from fractions import Fraction
from importlib.metadata import PackageNotFoundError

import pytest
import torch
from safetensors.torch import load_file, save_file

from atlasvid_cli import above, artefacts, digests, machine, pipeline, session, tensor_file
from atlasvid_cli.block import Kernels
from atlasvid_cli.errors import InputError, UsageError
from atlasvid_cli.machine import Device
from atlasvid_cli.model import text_context
from atlasvid_cli.offload import stored
from atlasvid_cli.parse import Lora
from atlasvid_cli.plan import Request, make_plan
from atlasvid_cli.session import Session, check_session
from atlasvid_cli.shapes import Grid
from atlasvid_cli.streams import detail_forward
from atlasvid_cli.video import probe
from atlasvid_cli.weights import model_hash


@pytest.mark.parametrize("native", [True, False])
def test_a_cpu_computes_in_bfloat16_where_it_has_it_and_the_vae_bears_it(stock_preset, monkeypatch, native):
    monkeypatch.setattr(machine, "has_bfloat16", lambda: native)
    machine.compute_device.cache_clear()
    try:
        fastest = torch.bfloat16 if native else torch.float32
        assert Session(str(stock_preset)).dtype == fastest
        assert Session(str(stock_preset)).vae().dtype == torch.float32
        assert Session("tiny").vae().dtype == fastest
    finally:
        machine.compute_device.cache_clear()


def test_how_values_are_computed_is_part_of_what_a_job_is(random_preset, monkeypatch):
    """Of a finished job, one in another dtype, by another attention or with compiled blocks is another job."""
    monkeypatch.setattr(session, "check_compiler", lambda device: None)
    plan = make_plan(Request(str(random_preset), 256, 192, Fraction(1)))
    seen = set()
    native = Kernels("native"), Kernels("native", compiled=True)
    for dtype, kernels in ((torch.float32, Kernels()), *((torch.bfloat16, k) for k in (Kernels(), *native))):
        ours = Session(str(random_preset), kernels=kernels)
        monkeypatch.setattr(ours, "dtype", dtype)
        proxy = artefacts.stage_metadata(ours, plan, plan.proxy, "proxy", "a", "")
        seen.add((artefacts.job_hash(ours, plan), proxy["key"], proxy["dtype"], proxy["attention"]))
    assert all(len(set(values)) == 4 for values in list(zip(*seen, strict=True))[:2])
    assert {s[2:] for s in seen} == {
        ("float32", "native"),
        ("bfloat16", "products"),
        ("bfloat16", "native"),
        ("bfloat16", "native+compiled"),
    }


@pytest.mark.parametrize("kept", ["int8", "fp8"])
def test_weights_in_eight_bits_take_less_memory_and_change_little(kept, console):
    """Adapters are merged before; the layer that computes is widened; the job is another one."""
    grid, velocities, sizes, jobs = Grid(3, 6, 6), [], [], set()
    generator = torch.Generator().manual_seed(0)
    tokens, prompt = (torch.randn(*shape, generator=generator) for shape in ((grid.tokens, 64), (4, 128)))
    plan = make_plan(Request("tiny", 256, 160, Fraction(1)))
    for dtype in ("auto", kept):
        ours = Session("tiny", weight_dtype=dtype)
        model = ours.transformer("detail", "none", console)
        text = text_context(model, [prompt], 512)
        layouts = ours.preset.detail.layouts
        velocities += [detail_forward(model, tokens, grid, 500, text, None, layouts, 8).float() for _ in range(2)]
        sizes.append(sum(part.nbytes for p in model.blocks.parameters() for part in stored(p)))
        jobs.add(artefacts.job_hash(ours, plan))
    plain, _, narrow, again = velocities
    assert torch.equal(narrow, again)  # what is widened is narrowed again without loss
    assert 0.001 < (narrow - plain).norm() / plain.norm() < {"int8": 0.05, "fp8": 0.1}[kept]
    assert sizes[1] < 0.55 * sizes[0] and len(jobs) == 2


def test_int8_without_torchao_is_refused_before_anything_loads(monkeypatch):
    monkeypatch.setattr("atlasvid_cli.session.model_folder", None)

    def absent(name):
        raise PackageNotFoundError(name)

    for found in (absent, lambda name: "0.17.1"):
        monkeypatch.setattr("atlasvid_cli.offload.version", found)
        with pytest.raises(UsageError, match=r"pip install .torchao>="):
            Session("tiny", weight_dtype="int8")


def test_stock_weights_render_training_free_and_say_what_it_costs(stock_preset, console, tmp_path, capsys):
    ours = Session(str(stock_preset))
    plan = make_plan(Request(str(stock_preset), 240, 128, Fraction(1), "a red ball", seed=3))
    assert [s.time_ratio for s in (plan.proxy, *plan.levels)] == [1] * (1 + len(plan.levels))
    pipeline.render(ours, plan, tmp_path / "run", tmp_path / "a.mp4", console)
    found = probe(tmp_path / "a.mp4")
    assert (found["width"], found["height"], found["frames"]) == (240, 128, 16)
    said = capsys.readouterr().err
    assert said.count("no proxy adapter") == said.count("no detail adapter") == 1


def test_both_models_of_one_stream_are_loaded_once_a_batch(random_preset, console, monkeypatch):
    ours = Session(str(random_preset))
    monkeypatch.setattr(ours, "preset", replace(ours.preset, detail=replace(ours.preset.detail, streams="proxy")))
    loads, load = [], session.load_transformer
    monkeypatch.setattr(session, "load_transformer", lambda *a: loads.append(a) or load(*a))
    first = ours.detail_models("none", console)
    assert first[0] is not first[1] and ours.detail_models("none", console) == first and len(loads) == 2


STAGES = ["proxy", "proxy", "detail"]  # as adapted, and for autoguidance without


def test_a_gpu_without_room_leaves_prompts_to_the_cpu(random_preset, console, tmp_path, monkeypatch):
    """In fp32, and kept apart from what a GPU makes of them in another dtype. How much of it is free decides nothing:
    an interrupted job would go on with other embeddings."""
    names, dtypes, load = {}, [], session.load_text
    monkeypatch.setattr(session, "load_text", lambda folder, dtype: dtypes.append(dtype) or load(folder, dtype))
    for memory in (1 << 10, 1 << 40):
        ours = Session(str(random_preset), cache=tmp_path)
        gpu = Device("cuda", "a GPU", "bfloat16", 2, "test", memory)
        monkeypatch.setattr(session, "compute_device", lambda gpu=gpu: gpu)
        monkeypatch.setattr(ours, "device", torch.device("cuda"))
        names[memory] = ours.text_name
        if memory == 1 << 10:
            ours.embeddings(("a red ball",), console)
    assert dtypes == [torch.float32] and [p.name for p in tmp_path.iterdir()] == [names[1 << 10]]
    assert "-cpu-" in names[1 << 10] and "-cuda-" in names[1 << 40]


@pytest.mark.parametrize(("small", "loads"), [(1 << 30, STAGES), (0, STAGES * 2)])
def test_a_batch_keeps_small_models_and_lets_large_ones_go(random_preset, console, tmp_path, monkeypatch, small, loads):
    monkeypatch.setattr(session, "SMALL", small)
    ours, seen, load = Session(str(random_preset)), [], session.load_transformer
    monkeypatch.setattr(session, "load_transformer", lambda *a: seen.append(a[2]) or load(*a))
    for seed in (1, 2):
        plan = make_plan(Request(str(random_preset), 256, 192, Fraction(1, 2), "a red ball", seed=seed))
        run = tmp_path / str(seed)
        pipeline.render(ours, plan, run, run / "a.mp4", console)
    assert seen == loads


def test_training_free_detail_starts_from_the_proxy(stock_preset, console, tmp_path):
    """Windows do not see the proxy, so all that the detail can have of it is where it starts."""
    ours = Session(str(stock_preset))
    results = []
    for seed in (3, 4):
        plan = make_plan(Request(str(stock_preset), 240, 128, Fraction(1), "a red ball", seed=seed))
        run = tmp_path / str(seed)
        proxy = pipeline.make_proxy(ours, plan, run, console)
        same_noise = make_plan(Request(str(stock_preset), 240, 128, Fraction(1), "a red ball", seed=9))
        made = pipeline.refine(ours, same_noise, proxy, run, console)
        results.append(tensor_file.open_tensors(made)[0]["latents"])
    assert (results[0] - results[1]).abs().max() > 1e-3


@pytest.fixture
def loaded(monkeypatch, tmp_path):
    """Grows with each loading of the text encoder; no embedding is cached yet."""
    monkeypatch.setenv("ATLASVID_CACHE", str(tmp_path / "cache"))
    times, load = [], session.load_text
    monkeypatch.setattr(session, "load_text", lambda *a: times.append(a) or load(*a))
    return times


def test_what_of_a_prompt_is_not_read_is_said_once(console, capsys, tmp_path):
    ours = Session("tiny", cache=tmp_path)
    for prompt in ("a red ball " * 170, "a red ball " * 170 + "and a blue star moving left over a green gradient"):
        for _ in range(2):
            ours.embeddings((prompt,), console)
    said = capsys.readouterr().err
    assert said.count("512 tokens") == 1 and "star moving left over" in said


def test_the_text_encoder_is_loaded_once_for_a_batch(stock_preset, console, loaded, capsys):
    ours = Session(str(stock_preset))
    ours.expect(["a red ball", "a blue star", ""])
    first = ours.embeddings(("a blue star", ""), console)
    assert len(loaded) == 1 and len(first) == 2
    assert "text: 4/4" in capsys.readouterr().err  # its loading, and three prompts
    ours.embeddings(("a red ball", ""), console)
    assert len(loaded) == 1
    ours.embeddings(("a green ring",), console)
    assert len(loaded) == 2


def test_prompts_seen_by_an_earlier_run_need_no_text_encoder(stock_preset, console, loaded, capsys):
    made = Session(str(stock_preset)).embeddings(("a red zebra", ""), console)
    assert capsys.readouterr().err.count("zebra") == 1
    again = Session(str(stock_preset)).embeddings(("a red zebra", ""), console)
    assert len(loaded) == 1 and all(a.equal(b) for a, b in zip(again, made, strict=True))
    assert capsys.readouterr().err.count("zebra") == 1


def test_an_interrupted_text_stage_keeps_what_it_encoded(stock_preset, console, loaded, monkeypatch):
    real, encoded = session.encode_prompts, []

    def stopped_at_the_third(prompts, *rest):
        encoded.extend(prompts)
        if len(encoded) == 3:
            raise KeyboardInterrupt
        return real(prompts, *rest)

    monkeypatch.setattr(session, "encode_prompts", stopped_at_the_third)
    prompts = "a red ball", "a blue star", "a green ring", ""
    with pytest.raises(KeyboardInterrupt):
        Session(str(stock_preset)).embeddings(prompts, console)
    Session(str(stock_preset)).embeddings(prompts, console)
    assert encoded == [*prompts[:3], *prompts[2:]] and len(loaded) == 2


def test_a_cache_that_cannot_be_written_stops_nothing(stock_preset, console, loaded, tmp_path, capsys):
    (tmp_path / "cache").write_text("in the way")
    assert len(Session(str(stock_preset)).embeddings(("a red ball", ""), console)) == 2
    assert "not kept" in capsys.readouterr().err


def test_large_weights_are_identified_once_and_not_for_a_plan(random_preset, console, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(digests, "LARGE", 1)
    monkeypatch.setenv("ATLASVID_CACHE", str(tmp_path))
    request = Request(str(random_preset), 200, 120, Fraction(1))
    digests._digest.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(digests, "_digest", lambda *file: pytest.fail(f"{file} was read"))
        assert check_session(request, console) is not None
    Session.of(request, console)
    files = len(list(random_preset.with_suffix("").rglob("*.safetensors"))) - 1  # without the entry
    assert f"checksums: {files}/{files}" in capsys.readouterr().err
    Session.of(request, console)
    assert "checksums" not in capsys.readouterr().err


def test_a_lora_changes_the_identity_of_the_latents(stock_preset, console, tmp_path):
    bare = Session(str(stock_preset))
    model = bare.transformer("proxy", "none", console)
    path = _small_lora(tmp_path / "a.safetensors", model)
    loras = [Session(str(stock_preset), loras=(Lora(path, w),)) for w in (1.0, 0.5)]
    hashes = {s.hash("proxy") for s in (bare, *loras)}
    assert len(hashes) == 3
    changed = loras[0].transformer("proxy", "none", console)
    assert not changed.blocks[0].attn1.to_q.weight.equal(model.blocks[0].attn1.to_q.weight)


def test_a_lora_is_in_both_models_of_a_stage_and_told_once(random_preset, console, tmp_path, capsys):
    plain = Session(str(random_preset))
    path = _small_lora(tmp_path / "a.safetensors", plain.transformer("proxy", "none", console))
    ours = Session(str(random_preset), loras=(Lora(path),))
    ours.transformer("proxy", "none", console)
    bare, base = (s.without_adapter("proxy", "none", console) for s in (ours, plain))
    assert any(not torch.equal(a, b) for a, b in zip(bare.parameters(), base.parameters(), strict=True))
    assert capsys.readouterr().err.count("layers changed in the proxy stage") == 1


def _small_lora(path, model):
    out, into = model.blocks[0].attn1.to_q.weight.shape
    name = "transformer.blocks.0.attn1.to_q"
    save_file({f"{name}.lora_A.weight": torch.ones(1, into), f"{name}.lora_B.weight": torch.ones(out, 1)}, path)
    return path


def test_what_cannot_run_is_refused_before_weights_load(stock_preset, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="no attention backend"):
        Session(str(stock_preset), kernels=Kernels("warp"))
    with pytest.raises(UsageError, match="--attention-backend"):
        Session(str(stock_preset), kernels=Kernels("flash"))
    monkeypatch.setattr(torch, "compile", lambda *_, **__: 1 / 0)
    with pytest.raises(UsageError, match="leave --compile out"):
        Session(str(stock_preset), kernels=Kernels(compiled=True))
    with pytest.raises(UsageError, match="take int8"):
        Session(str(stock_preset), kernels=Kernels(compiled=True), weight_dtype="fp8")
    broken = tmp_path / "a.safetensors"
    broken.write_bytes(b"no")
    with pytest.raises(InputError, match="safetensors"):
        Session(str(stock_preset), loras=(Lora(broken),))


def test_what_a_later_stage_would_refuse_is_said_before_the_first(stock_preset, random_preset, tmp_path):
    """An adapter of another base, a LoRA of another model, one of the second expert's alone."""
    shutil.copytree(random_preset.parent, tmp_path, dirs_exist_ok=True)
    preset = Session(str(tmp_path / random_preset.name))
    preset.check_adapters()
    adapter = preset.folder / preset.preset.detail.lora
    tensors = load_file(adapter)
    save_file(tensors, adapter, {"stage": "detail", "base": "0" * 16})
    with pytest.raises(InputError, match="trained for base"):
        preset.check_adapters()
    for figure, other in (("time_ratio", "2,1"), ("windows", "[[1, 2, 2]]"), ("streams", "proxy")):
        save_file(tensors, adapter, {"stage": "detail", figure: other})
        with pytest.raises(InputError, match=f"trained for {figure}"):
            preset.check_adapters()
    save_file(tensors, adapter, {})
    whole, first = preset.preset, preset.folder / preset.preset.proxy.lora
    save_file(load_file(first), first, {"stage": "proxy"})  # as before positions had a scale
    preset.preset = replace(whole, proxy=replace(whole.proxy, position_scale=0.5))
    with pytest.raises(InputError, match=r"trained for position_scale 1\.0"):
        preset.check_adapters()
    preset.preset = replace(whole, proxy=replace(whole.proxy, position_scale=1.0))
    preset.check_adapters()
    preset.preset = whole
    save_file(load_file(first), first, {})
    entry = preset.folder / preset.preset.detail.upper.entry
    kept = entry.read_bytes()
    save_file(load_file(entry), entry, {"stage": "entry", "base": "0" * 16})
    with pytest.raises(InputError, match="no first level"):
        preset.check_adapters()
    entry.write_bytes(kept)
    largest = preset.preset.training_ratios[-1]
    for ratios, message in (("1,3/2", "ratios up to 1.5"), ("2,x", "no numbers"), ("1/0", "no numbers")):
        save_file(tensors, adapter, {"stage": "detail", "ratio": ratios})
        with pytest.raises(InputError, match=message):
            preset.check_adapters()
    save_file(tensors, adapter, {"stage": "detail", "ratio": f"2,{largest}"})
    preset.check_adapters()
    name = "transformer.blocks.0.attn1.to_q"
    path = tmp_path / "other.safetensors"
    save_file({f"{name}.lora_A.weight": torch.zeros(2, 7), f"{name}.lora_B.weight": torch.zeros(9, 2)}, path)
    with pytest.raises(InputError, match="fit no layer"):
        Session(str(stock_preset), loras=(Lora(path),)).check_loras()
    good = {f"{name}.lora_A.weight": torch.zeros(2, 24), f"{name}.lora_B.weight": torch.zeros(24, 2)}
    save_file(good | {f"{name}.alpha": torch.tensor(1.0), "unknown": torch.zeros(1)}, path)
    Session(str(stock_preset), loras=(Lora(path),)).check_loras()
    with pytest.raises(InputError, match="unknown"):
        Session(str(stock_preset), loras=(Lora(path),), strict=True).check_loras()


def test_the_detail_of_two_experts_needs_the_second_alone(experts_preset, console, tmp_path, monkeypatch):
    ours, loaded, load = Session(str(experts_preset)), [], session.load_transformer
    monkeypatch.setattr(session, "load_transformer", lambda *a: loaded.append(a[-1]) or load(*a))
    plan = make_plan(Request(str(experts_preset), 240, 128, Fraction(1), "a red ball", seed=3))
    proxy = pipeline.make_proxy(ours, plan, tmp_path, console)
    assert loaded == ["transformer", "transformer_2"]
    pipeline.refine(Session(str(experts_preset)), plan, proxy, tmp_path, console)
    assert loaded[2:] == ["transformer_2"]


def test_a_lora_may_be_for_one_expert(experts_preset, stock_preset, console, tmp_path):
    bare = Session(str(experts_preset))
    models = [bare.transformer("proxy", "none", console, second) for second in (False, True)]
    path = _small_lora(tmp_path / "a.safetensors", models[0])
    ours = Session(str(experts_preset), loras=(Lora(path, expert="low"),))
    found = [ours.transformer("proxy", "none", console, second) for second in (False, True)]
    weights = [[m.blocks[0].attn1.to_q.weight for m in pair] for pair in zip(models, found, strict=True)]
    assert weights[0][0].equal(weights[0][1]) and not weights[1][0].equal(weights[1][1])
    with pytest.raises(UsageError, match="without @low"):
        Session(str(stock_preset), loras=(Lora(path, expert="low"),))


def test_a_lora_without_an_expert_is_said_to_change_both(experts_preset, console, tmp_path, capsys):
    bare = Session(str(experts_preset))
    path = _small_lora(tmp_path / "a.safetensors", bare.transformer("proxy", "none", console))
    ours = Session(str(experts_preset), loras=(Lora(path),))
    for second in (False, True):
        ours.transformer("proxy", "none", console, second)
    assert capsys.readouterr().err.count("changes both experts") == 1


def test_refine_says_of_a_lora_of_the_first_expert_that_it_changes_nothing(
    experts_preset, console, tmp_path, monkeypatch, capsys
):
    request = Request(str(experts_preset), 240, 128, Fraction(1), "a red ball")
    bare = Session(str(experts_preset))
    proxy = pipeline.make_proxy(bare, make_plan(request), tmp_path / "run", console)
    path = _small_lora(tmp_path / "a.safetensors", bare.transformer("proxy", "none", console))
    monkeypatch.setattr(above, "check_resources", lambda *a: None)  # counts Wan's text encoder, of 22 GiB
    monkeypatch.setattr(pipeline, "refine", lambda *a: None)
    monkeypatch.setattr(pipeline, "finish", lambda *a: None)
    monkeypatch.setattr(pipeline, "keep_record", lambda *a: None)
    for expert, count in (("high", 1), ("low", 0)):
        plan = above.plan_from_proxy(proxy, replace(request, loras=(Lora(path, expert=expert),)))
        above.refine_saved(proxy, plan, tmp_path / "a.mp4", None, console)
        assert capsys.readouterr().err.count("changes nothing here") == count


def test_what_pefts_config_says_of_a_lora_is_part_of_its_identity(random_preset, console, tmp_path):
    plain = Session(str(random_preset))
    path = _small_lora(tmp_path / "adapter_model.safetensors", plain.transformer("proxy", "none", console))
    hashes = set()
    for alpha in (None, 1, 2):
        if alpha:
            (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": alpha}))
        hashes.add(Session(str(random_preset), loras=(Lora(path),)).hash("proxy"))
    assert len(hashes) == 3


def test_each_expert_has_an_adapter_of_its_own(experts_preset, console, tmp_path):
    bare = Session(str(experts_preset))
    models = [bare.transformer("proxy", "none", console, second) for second in (False, True)]
    shutil.copytree(experts_preset.parent, tmp_path, dirs_exist_ok=True)
    path = _small_lora(tmp_path / "stock" / "second.safetensors", models[1])
    preset = tmp_path / "experts.toml"
    preset.write_text(experts_preset.read_text() + f'lora = "{path.name}"\n')
    ours = Session(str(preset))
    ours.check_adapters()
    found = [ours.transformer("proxy", "none", console, second) for second in (False, True)]
    same = [
        a.blocks[0].attn1.to_q.weight.equal(b.blocks[0].attn1.to_q.weight) for a, b in zip(models, found, strict=True)
    ]
    assert same == [True, False]
    assert ours.hash("proxy") != bare.hash("proxy") and ours.hash("detail") == bare.hash("detail")
    save_file(load_file(path), path, {"stage": "proxy", "base": model_hash(ours.folder, "transformer")})
    with pytest.raises(InputError, match="trained for base"):  # of the first expert
        Session(str(preset)).check_adapters()


def test_a_second_expert_that_is_missing_is_said(experts_preset, tmp_path):
    shutil.copytree(experts_preset.parent, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "stock" / "transformer_2")
    with pytest.raises(InputError, match="transformer_2"):
        Session(str(tmp_path / "experts.toml"))
    text = experts_preset.read_text().replace("strength = 0.875", "strength = 0.95")
    (tmp_path / "experts.toml").write_text(text)
    with pytest.raises(UsageError, match="boundary"):
        Session(str(tmp_path / "experts.toml"))
