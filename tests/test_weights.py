"""Weights are found, checked and refused before anything is computed."""

import json
import shutil

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from safetensors.torch import load_file, save_file

from atlasvid_cli.causal import last_blocks, make_idle
from atlasvid_cli.errors import InputError
from atlasvid_cli.presets import load_preset, preset_names
from atlasvid_cli.weights import (
    check_config,
    check_entry,
    load_half_encoder,
    load_scheduler,
    load_text,
    load_transformer,
    load_vae,
    model_hash,
)


def shards(folder):
    return sorted((folder / "transformer").glob("*.safetensors"))


def test_sharded_weights_load_whole(stock):
    assert len(shards(stock)) > 1
    saved = {k: v for file in shards(stock) for k, v in load_file(file).items()}
    loaded = load_transformer(stock).state_dict()
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[k], saved[k]) for k in saved)


def test_the_dtype_is_the_asked_one_but_for_what_wan_keeps_in_fp32(stock):
    model = load_transformer(stock, dtype=torch.bfloat16)
    assert model.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    assert model.blocks[0].scale_shift_table.dtype == torch.float32


def damage(folder, change):
    """Rewrites one shard and the index that belongs to it."""
    file = shards(folder)[0]
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    index = next((folder / "transformer").glob("*.index.json"))
    table = json.loads(index.read_text())
    table["weight_map"] = {k: f.name for f in shards(folder) for k in load_file(f)}
    index.write_text(json.dumps(table))


def test_missing_weights_are_named(stock):
    lost = sorted(load_file(shards(stock)[0]))[0]
    damage(stock, lambda tensors: tensors.pop(lost))
    with pytest.raises(InputError, match=f"missing keys: {lost}"):
        load_transformer(stock)


def test_unknown_weights_are_named(stock):
    damage(stock, lambda tensors: tensors.update({"blocks.0.attn9.weight": torch.zeros(1)}))
    with pytest.raises(InputError, match=r"unexpected keys: blocks\.0\.attn9\.weight"):
        load_transformer(stock)


def test_a_text_encoders_weights_are_named_too(stock):
    """What is missing would be random, and its embeddings kept."""
    load_text(stock)
    file = stock / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    lost = next(k for k in tensors if k.endswith("SelfAttention.q.weight"))
    save_file({k: v for k, v in tensors.items() if k != lost}, file, {"format": "pt"})
    with pytest.raises(InputError, match=f"text_encoder in .* has missing keys: {lost}"):
        load_text(stock)
    save_file(tensors | {"bogus.weight": torch.zeros(1)}, file, {"format": "pt"})
    with pytest.raises(InputError, match=r"unexpected keys: bogus\.weight"):
        load_text(stock)


def test_cut_off_weights_are_refused(stock):
    file = shards(stock)[0]
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match="cannot be read"):
        load_transformer(stock)


def test_pickled_weights_are_never_loaded(stock):
    for file in shards(stock):
        torch.save(load_file(file), file.with_name("diffusion_pytorch_model.bin"))
        file.unlink()
    next((stock / "transformer").glob("*.index.json")).unlink()
    with pytest.raises(InputError, match="cannot be read"):
        load_transformer(stock)


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [("transformer", "ffn_dim", 64), ("vae", "base_dim", 96), ("vae", "scale_factor_spatial", 16)],
)
def test_a_model_of_another_size_is_refused_by_what_differs(stock, stock_preset, part, field, value):
    path = stock / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(InputError, match=f"the {part} in .* = {value}"):
        check_config(stock, load_preset(str(stock_preset)))


def test_an_adapter_may_have_any_layout_and_one_that_fits_nothing_is_refused(stock, tmp_path):
    shutil.copytree(stock, folder := tmp_path / "copy")
    layer = load_transformer(folder).blocks[0].attn1.to_q
    down, up = torch.randn(2, layer.weight.shape[1]), torch.randn(layer.weight.shape[0], 2)
    for name, prefix in (("good", "diffusion_model.blocks.0.self_attn.q"), ("bad", "diffusion_model.blocks.0.q")):
        save_file({f"{prefix}.lora_down.weight": down, f"{prefix}.lora_up.weight": up}, folder / f"{name}.safetensors")
    changed = load_transformer(folder, "good.safetensors", "proxy").blocks[0].attn1.to_q.weight
    torch.testing.assert_close(changed, layer.weight + up @ down)
    with pytest.raises(InputError, match="fit no layer"):
        load_transformer(folder, "bad.safetensors", "proxy")


def test_a_vae_that_looks_at_the_past_is_not_taken_for_a_still_one(random_preset):
    folder = random_preset.with_suffix("")
    assert load_vae(folder, still=2).config.z_dim == 4
    with pytest.raises(InputError, match=r"past frames in the 3 levels.*leave `still` out"):
        load_vae(folder, still=3)


def test_a_vae_whose_blocks_all_work_is_not_taken_for_one_with_idle_ones(random_preset, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(random_preset.parent / random_preset.stem / "vae", folder / "vae")
    vae = load_vae(folder)
    torch.nn.init.ones_(last_blocks(vae, 1)[0].conv2.weight)
    vae.save_pretrained(folder / "vae")
    with pytest.raises(InputError, match=r"works in the 1 blocks.*leave `idle` out"):
        load_vae(folder, idle=1)
    make_idle(vae, 1)
    vae.save_pretrained(folder / "vae")
    assert load_vae(folder, idle=1).config.z_dim == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_entry_is_what_its_file_holds(random_preset, dtype):
    folder, name = random_preset.with_suffix(""), load_preset(str(random_preset)).detail.upper.entry
    half, tensors = load_half_encoder(folder, name, load_vae(folder, dtype)), load_file(folder / name)
    assert set(half.own()) == set(tensors)
    for key, parameter in half.own().items():
        assert parameter.dtype == dtype and torch.equal(parameter, tensors[key].to(dtype))


def test_an_entry_that_does_not_fit_is_refused_from_its_header(random_preset, tmp_path):
    folder = shutil.copytree(random_preset.with_suffix(""), tmp_path / "model")
    name = load_preset(str(random_preset)).detail.upper.entry
    tensors, fits = load_file(folder / name), {"stage": "entry", "base": model_hash(folder, "vae")}
    check_entry(folder, name)
    for wrong in ({}, {**fits, "stage": "detail"}, {**fits, "base": "0" * 16}):
        save_file(tensors, folder / name, wrong)
        with pytest.raises(InputError, match=r"no first level for the vae.*leave `entry` out"):
            check_entry(folder, name)
    for value in (torch.zeros(3).half(), tensors["conv_in.bias"].float()):
        save_file({**tensors, "conv_in.bias": value}, folder / name, fits)
        with pytest.raises(InputError, match=r"conv_in\.bias"):
            check_entry(folder, name)
    (folder / name).unlink()
    with pytest.raises(InputError, match="does not exist; leave `entry` out"):
        check_entry(folder, name)


def test_a_part_without_safetensors_has_no_identity(stock):
    for file in (stock / "text_encoder").glob("*.safetensors"):
        file.rename(file.with_suffix(".bin"))
    with pytest.raises(InputError, match="holds no safetensors"):
        model_hash(stock, "text_encoder")


def test_the_hash_follows_the_bytes_and_the_hubs_names_stand_for_them(stock, tmp_path):
    before = model_hash(stock, "transformer")
    blob = tmp_path / ("0" * 64)
    shards(stock)[0].rename(blob)
    (stock / "transformer" / "a.safetensors").symlink_to(blob)
    assert model_hash(stock, "transformer") != before  # named by the hub, so not read


@pytest.mark.parametrize("name", preset_names())
def test_every_shipped_preset_states_sizes_that_fit_together(name):
    preset = load_preset(name)
    assert preset.transformer.dim % preset.transformer.heads == 0
    assert preset.vae.z_dim == preset.transformer.channels
    levels = len(preset.vae.dim_mult) - 1
    assert preset.geometry.spatial == 2**levels * (preset.vae.patch_size or 1)
    assert preset.geometry.temporal == 2 ** sum(preset.vae.temperal_downsample)


def test_a_scheduler_of_another_class_is_replaced_by_the_models_own_kind(tmp_path):
    """As of a fine-tuned model that was saved with another one; its config knows nothing of UniPC's settings."""
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(tmp_path / "scheduler")
    scheduler = load_scheduler(tmp_path, 5.0, "unipc")
    scheduler.set_timesteps(4)
    expected = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
    expected.set_timesteps(4)
    assert torch.equal(scheduler.sigmas, expected.sigmas) and torch.equal(scheduler.timesteps, expected.timesteps)
    assert scheduler.config.prediction_type == "flow_prediction"
