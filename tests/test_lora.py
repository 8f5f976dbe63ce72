"""LoRAs merge to the same weights whatever layout their keys have, and no key is lost in silence."""

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file

from atlasvid_cli.errors import InputError
from atlasvid_cli.lora import check_lora, merge_lora
from atlasvid_cli.parse import Lora

RANK, ALPHA = 3, 1.5
PEFT_FILE = "adapter_model.safetensors"
# a self-attention, a cross-attention and a feed-forward layer, by diffusers' and by the original names
LAYERS = {
    "blocks.0.attn1.to_q": "blocks.0.self_attn.q",
    "blocks.1.attn2.to_out.0": "blocks.1.cross_attn.o",
    "blocks.2.ffn.net.0.proj": "blocks.2.ffn.0",
    "condition_embedder.time_proj": "time_projection.1",
}
LAYOUTS = {
    "diffusers": lambda ours, theirs: (f"transformer.{ours}", "lora_A", "lora_B"),
    "peft": lambda ours, theirs: (f"base_model.model.{ours}", "lora_A", "lora_B"),
    "comfyui": lambda ours, theirs: (f"diffusion_model.{theirs}", "lora_down", "lora_up"),
    "musubi": lambda ours, theirs: ("lora_unet_" + theirs.replace(".", "_"), "lora_down", "lora_up"),
}


def fresh(transformer):
    model = type(transformer).from_config(transformer.config)
    model.load_state_dict(transformer.state_dict())
    return model


def factors(model):
    generator = torch.Generator().manual_seed(0)
    made = {}
    for name in LAYERS:
        out, into = model.get_submodule(name).weight.shape
        made[name] = torch.randn(RANK, into, generator=generator), torch.randn(out, RANK, generator=generator)
    return made


def write(path, model, layout, alpha=True, **more):
    tensors = dict(more)
    for name, (down, up) in factors(model).items():
        key, a, b = LAYOUTS[layout](name, LAYERS[name])
        tensors |= {f"{key}.{a}.weight": down, f"{key}.{b}.weight": up}
        if alpha:
            tensors[f"{key}.alpha"] = torch.tensor(ALPHA)
    save_file({k: v.contiguous() for k, v in tensors.items()}, path)
    return path


def no_warning(text):
    raise AssertionError(text)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_changes_the_same_weights(transformer, tmp_path, layout):
    model = fresh(transformer)
    path = write(tmp_path / "a.safetensors", model, layout)
    assert merge_lora(model, Lora(path, 0.5), strict=True, warn=no_warning) == len(LAYERS)
    before, after = transformer.state_dict(), model.state_dict()
    for name, (down, up) in factors(transformer).items():
        before[f"{name}.weight"] = before[f"{name}.weight"] + 0.5 * ALPHA / RANK * up @ down
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, atol=1e-5, rtol=0)


def test_the_diffusers_layout_equals_peft_fused(transformer, tmp_path):
    ours, theirs = fresh(transformer), fresh(transformer)
    path = write(tmp_path / "a.safetensors", ours, "diffusers", alpha=False)
    merge_lora(ours, Lora(path), strict=True, warn=no_warning)
    theirs.load_lora_adapter(path, prefix="transformer")
    theirs.fuse_lora()
    theirs.unload_lora()
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, atol=1e-5, rtol=0)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"alpha_pattern": {"attn1.to_q": 5}}], ids=str)
def test_what_diffusers_and_peft_say_of_alpha_is_heeded(transformer, tmp_path, options):
    """In the header, and in the config beside the file, as diffusers itself merges it."""
    theirs = fresh(transformer)
    targets = ["attn1.to_q", "attn2.to_out.0"]
    theirs.add_adapter(LoraConfig(r=4, lora_alpha=9, target_modules=targets, init_lora_weights=False, **options))
    theirs.save_lora_adapter(tmp_path / "diffusers", weight_name="a.safetensors")
    state = get_peft_model_state_dict(theirs, adapter_name="default")
    (tmp_path / "peft").mkdir()
    save_file({f"base_model.model.{k}": v.contiguous() for k, v in state.items()}, tmp_path / "peft" / PEFT_FILE)
    theirs.peft_config["default"].save_pretrained(tmp_path / "peft")
    theirs.fuse_lora()
    theirs.unload_lora()
    for path in (tmp_path / "diffusers" / "a.safetensors", tmp_path / "peft" / PEFT_FILE):
        ours = fresh(transformer)
        merge_lora(ours, Lora(path), strict=True, warn=no_warning)
        for name, value in theirs.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[name], value, atol=1e-5, rtol=0)


@pytest.mark.parametrize("wrong", ['{"lora_alpha": "x"}', '{"alpha_pattern": {"(": 2}}', "[]", "no json"])
def test_a_header_that_says_no_alpha_is_refused(transformer, tmp_path, wrong):
    path, name = tmp_path / "a.safetensors", "transformer.blocks.0.attn1.to_q"
    factors = {f"{name}.lora_A.weight": torch.zeros(2, 48), f"{name}.lora_B.weight": torch.zeros(48, 2)}
    save_file(factors, path, {"lora_adapter_metadata": wrong})
    with pytest.raises(InputError, match="fetch"):
        merge_lora(fresh(transformer), Lora(path), strict=False, warn=no_warning)


def test_norms_modulations_and_the_bias_of_factors_are_changed_too(transformer, tmp_path):
    model, path = fresh(transformer), tmp_path / "a.safetensors"
    block, before = model.blocks[1], transformer.blocks[1]
    scale = torch.randn_like(block.norm2.weight)
    table, head = torch.randn_like(block.scale_shift_table), torch.randn_like(model.scale_shift_table)
    down, up, bias = torch.randn(2, 48), torch.randn(48, 2), torch.randn(48)
    tensors = {
        "diffusion_model.blocks.1.norm3.diff": scale,
        "diffusion_model.blocks.1.norm3.diff_b": 2 * scale,
        "diffusion_model.blocks.1.diff_m": table,
        "diffusion_model.head.diff_m": head,
        "lora_unet__blocks_1_self_attn_v.lora_down.weight": down,
        "lora_unet__blocks_1_self_attn_v.lora_up.weight": up,
        "lora_unet__blocks_1_self_attn_v.lora_B.bias": bias,
    }
    save_file(tensors, path)
    merge_lora(model, Lora(path, 0.5), strict=True, warn=no_warning)
    for ours, was, change in (
        (block.norm2.weight, before.norm2.weight, scale),
        (block.norm2.bias, before.norm2.bias, 2 * scale),
        (block.scale_shift_table, before.scale_shift_table, table),
        (model.scale_shift_table, transformer.scale_shift_table, head),
        (block.attn1.to_v.weight, before.attn1.to_v.weight, up @ down),
        (block.attn1.to_v.bias, before.attn1.to_v.bias, bias),
    ):
        torch.testing.assert_close(ours, was + 0.5 * change, atol=1e-5, rtol=0)


def test_whole_changes_of_weight_and_bias_are_added(transformer, tmp_path):
    model = fresh(transformer)
    layer = model.blocks[1].attn1.to_k
    weight, bias = torch.randn_like(layer.weight), torch.randn_like(layer.bias)
    path = tmp_path / "a.safetensors"
    save_file({"diffusion_model.blocks.1.self_attn.k.diff": weight, "blocks.1.self_attn.k.diff_b": bias}, path)
    assert merge_lora(model, Lora(path), strict=True, warn=no_warning) == 1
    torch.testing.assert_close(layer.weight, transformer.blocks[1].attn1.to_k.weight + weight)
    torch.testing.assert_close(layer.bias, transformer.blocks[1].attn1.to_k.bias + bias)


def test_keys_that_fit_nothing_are_named_and_fatal_when_strict(transformer, tmp_path):
    path = write(tmp_path / "a.safetensors", transformer, "comfyui", img_emb=torch.zeros(1))
    said = []
    assert merge_lora(fresh(transformer), Lora(path), strict=False, warn=said.append) == len(LAYERS)
    assert "img_emb" in said[0]
    with pytest.raises(InputError, match="img_emb"):
        merge_lora(fresh(transformer), Lora(path), strict=True, warn=no_warning)


def test_a_lora_of_another_model_is_refused_and_changes_nothing_of_another_layer(transformer, tmp_path):
    path = tmp_path / "a.safetensors"
    name = "transformer.blocks.0.attn1.to_q"
    save_file({f"{name}.lora_A.weight": torch.zeros(2, 7), f"{name}.lora_B.weight": torch.zeros(9, 2)}, path)
    with pytest.raises(InputError, match=r"2 keys fit no layer \(blocks.0.attn1.to_q \((down|up)\)"):
        merge_lora(fresh(transformer), Lora(path), strict=False, warn=no_warning)
    save_file({"transformer.blocks.99.attn1.to_q.lora_A.weight": torch.zeros(2, 7)}, path)
    with pytest.raises(InputError, match="fit no layer"):
        merge_lora(fresh(transformer), Lora(path), strict=False, warn=no_warning)


def test_a_layer_of_another_shape_is_left_out_whole(transformer, tmp_path):
    """As of an image-to-video LoRA, whose patches have more channels."""
    path, name = tmp_path / "a.safetensors", "transformer.blocks.0.attn1"
    fits = {f"{name}.to_k.lora_A.weight": torch.ones(2, 48), f"{name}.to_k.lora_B.weight": torch.ones(48, 2)}
    other = {f"{name}.to_q.lora_A.weight": torch.ones(2, 50), f"{name}.to_q.lora_B.weight": torch.ones(48, 2)}
    save_file({**fits, **other, f"{name}.to_q.diff_b": torch.ones(48)}, path)
    model, said = fresh(transformer), []
    assert merge_lora(model, Lora(path), strict=False, warn=said.append) == 1
    assert "3 keys fit no layer" in said[0] and "blocks.0.attn1.to_q" in said[0]
    attn, before = model.blocks[0].attn1, transformer.blocks[0].attn1
    assert torch.equal(attn.to_q.weight, before.to_q.weight) and torch.equal(attn.to_q.bias, before.to_q.bias)
    torch.testing.assert_close(attn.to_k.weight, before.to_k.weight + 2)
    with pytest.raises(InputError, match="to_q"):
        merge_lora(fresh(transformer), Lora(path), strict=True, warn=no_warning)


@pytest.mark.parametrize("more", ["dora_scale", "lora_magnitude_vector.default.weight", "lora_mid.weight"])
def test_what_is_more_than_two_factors_is_refused_from_its_header(tmp_path, more):
    path, name = tmp_path / "a.safetensors", "transformer.blocks.0.attn1.to_q"
    factors = {f"{name}.lora_A.weight": torch.zeros(2, 48), f"{name}.lora_B.weight": torch.zeros(48, 2)}
    save_file({**factors, f"{name}.{more}": torch.ones(48)}, path)
    with pytest.raises(InputError, match=r"DoRA or a Tucker LoRA"):
        check_lora(path)


def test_half_a_lora_is_refused(transformer, tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"transformer.blocks.0.attn1.to_q.lora_A.weight": torch.zeros(2, 48)}, path)
    with pytest.raises(InputError, match="half a LoRA"):
        merge_lora(fresh(transformer), Lora(path), strict=False, warn=no_warning)


def test_what_is_no_lora_is_refused_from_its_header(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"\x80\x04pickle")
    with pytest.raises(InputError, match="safetensors"):
        check_lora(path)
    save_file({"weight": torch.zeros(1)}, path)
    with pytest.raises(InputError, match="no LoRA"):
        check_lora(path)


@pytest.mark.parametrize("wrong", [{"alpha": torch.ones(2)}, {"lora_A.weight": torch.zeros(48)}])
def test_factors_of_the_wrong_shape_are_refused(transformer, tmp_path, wrong):
    path, name = tmp_path / "a.safetensors", "transformer.blocks.0.attn1.to_q"
    parts = {"lora_A.weight": torch.zeros(2, 48), "lora_B.weight": torch.zeros(48, 2), **wrong}
    save_file({f"{name}.{part}": tensor for part, tensor in parts.items()}, path)
    with pytest.raises(InputError, match="do not fit"):
        merge_lora(fresh(transformer), Lora(path), strict=False, warn=no_warning)
