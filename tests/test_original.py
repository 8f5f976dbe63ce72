"""Wan's original checkpoints give the models that their converted forms give.

The names are those of Wan's own code (`wan/modules/model.py`, `vae.py`, `t5.py`).
"""

import json
import re
import shutil
from fractions import Fraction

import pytest
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from safetensors.torch import save_file
from transformers import UMT5Config, UMT5EncoderModel

from atlasvid_cli import original, pipeline
from atlasvid_cli.console import Console
from atlasvid_cli.errors import InputError
from atlasvid_cli.hub import is_whole, model_folder
from atlasvid_cli.plan import Request, make_plan
from atlasvid_cli.presets import load_preset
from atlasvid_cli.session import Session
from atlasvid_cli.train_text import build_tokenizer
from atlasvid_cli.video import probe
from atlasvid_cli.weights import (
    check_config,
    load_scheduler,
    load_text,
    load_transformer,
    load_vae,
)

RESIDUAL = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6"}


def transformer_name(name):
    for ours, theirs in (
        ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
        ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
        ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
        ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
        ("condition_embedder.time_proj", "time_projection.1"),
        ("attn1", "self_attn"),
        ("attn2", "cross_attn"),
        ("to_out.0", "o"),
        ("to_q", "q"),
        ("to_k", "k"),
        ("to_v", "v"),
        ("ffn.net.0.proj", "ffn.0"),
        ("ffn.net.2", "ffn.2"),
        ("proj_out", "head.head"),
        (".norm2.", ".norm3."),
    ):
        name = name.replace(ours, theirs)
    return "head.modulation" if name == "scale_shift_table" else name.replace("scale_shift_table", "modulation")


def vae_name(name):
    name = re.sub(r"^quant_conv", "conv1", re.sub(r"^post_quant_conv", "conv2", name))
    name = name.replace("coder.conv_in", "coder.conv1").replace("conv_out", "head.2").replace("norm_out", "head.0")
    name = name.replace("mid_block.attentions.0", "middle.1").replace("mid_block.resnets.0", "middle.0")
    name = name.replace("mid_block.resnets.1", "middle.2").replace("encoder.down_blocks", "encoder.downsamples")
    name = name.replace("conv_shortcut", "shortcut")
    name = re.sub(
        r"decoder\.up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"decoder.upsamples.{4 * int(m[1]) + int(m[2])}", name
    )
    name = re.sub(r"decoder\.up_blocks\.(\d)\.upsamplers\.0", lambda m: f"decoder.upsamples.{4 * int(m[1]) + 3}", name)
    if "middle" in name or "samples" in name:
        for ours, theirs in RESIDUAL.items():
            name = re.sub(rf"\.{ours}\.", f".{theirs}.", name)
    return name


def text_name(name):
    for ours, theirs in (
        ("shared", "token_embedding"),
        ("encoder.final_layer_norm", "norm"),
        ("encoder.block", "blocks"),
        ("layer.0.layer_norm", "norm1"),
        ("layer.1.layer_norm", "norm2"),
        ("layer.0.SelfAttention.relative_attention_bias", "pos_embedding.embedding"),
        ("layer.0.SelfAttention", "attn"),
        ("layer.1.DenseReluDense.wi_0", "ffn.gate.0"),
        ("layer.1.DenseReluDense.wi_1", "ffn.fc1"),
        ("layer.1.DenseReluDense.wo", "ffn.fc2"),
    ):
        name = name.replace(ours, theirs)
    return name


@pytest.fixture(scope="module")
def parts():
    """Small models with random weights, of the classes that Wan's checkpoints are converted to."""
    torch.manual_seed(3)
    sizes = {"in_channels": 16, "out_channels": 16, "text_dim": 16, "freq_dim": 16, "ffn_dim": 32, "num_layers": 2}
    model = WanTransformer3DModel(num_attention_heads=2, attention_head_dim=12, **sizes)
    text = UMT5Config(vocab_size=80, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    vae = AutoencoderKLWan(base_dim=4)
    with torch.no_grad():  # biases that begin at zero would hide a mistake
        for parameter in (*model.parameters(), *vae.parameters()):
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model.eval(), vae.eval(), UMT5EncoderModel(text).eval()


@pytest.fixture(scope="module")
def checkpoint(parts, tmp_path_factory):
    """The same weights as Wan's authors would publish them, the transformer in two shards."""
    folder = tmp_path_factory.mktemp("original")
    model, vae, text = parts
    tensors = {transformer_name(k): v.contiguous() for k, v in model.state_dict().items()}
    assert {"blocks.0.self_attn.norm_q.weight", "blocks.1.modulation", "blocks.0.norm3.bias"} <= tensors.keys()
    names = sorted(tensors)
    for i, some in enumerate((names[::2], names[1::2])):
        path = folder / f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors"
        save_file({k: tensors[k] for k in some}, path)
    said = {"dim": 24, "num_heads": 2, "in_dim": 16, "out_dim": 16, "freq_dim": 16, "ffn_dim": 32, "num_layers": 2}
    (folder / "config.json").write_text(json.dumps(said | {"eps": 1e-6, "model_type": "t2v", "text_len": 512}))
    state = {vae_name(k): v for k, v in vae.state_dict().items()}
    assert {"decoder.upsamples.4.shortcut.weight", "decoder.middle.1.to_qkv.weight", "encoder.head.0.gamma"} <= set(
        state
    )
    torch.save(state, folder / original.VAE)
    state = {text_name(k): v for k, v in text.state_dict().items() if "embed_tokens" not in k}
    torch.save(state, folder / original.TEXT)
    build_tokenizer().save_pretrained(folder / original.TOKENIZER)
    return folder


@pytest.fixture
def preset(stock_preset, tmp_path):
    """The stock preset with the sizes of `parts`."""
    text = stock_preset.read_text()
    for old, new in (
        ("channels = 4", "channels = 16"),
        ("base_dim = 8", "base_dim = 4"),
        ("z_dim = 4", "z_dim = 16"),
        ("dim_mult = [1, 1, 1, 1]", "dim_mult = [1, 2, 4, 4]"),
        ("num_res_blocks = 1", "num_res_blocks = 2"),
    ):
        assert old in text, old
        text = text.replace(old, new)
    path = tmp_path / "original.toml"
    path.write_text(text)
    return path


def test_every_weight_arrives(parts, checkpoint):
    model, vae, text = parts
    for ours, loaded in (
        (model, load_transformer(checkpoint)),
        (vae, load_vae(checkpoint)),
        (text, load_text(checkpoint)[1]),
    ):
        expected, found = ours.state_dict(), loaded.state_dict()
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(found[name], value), name


def test_the_models_compute_the_same(parts, checkpoint):
    model, vae, text = parts
    x, ids = torch.randn(1, 16, 2, 4, 4), torch.tensor([[5, 9, 1]])
    call = {"timestep": torch.tensor([300]), "encoder_hidden_states": torch.randn(1, 5, 16), "return_dict": False}
    with torch.no_grad():
        torch.testing.assert_close(load_transformer(checkpoint)(x, **call)[0], model(x, **call)[0])
        torch.testing.assert_close(load_vae(checkpoint).decode(x).sample, vae.decode(x).sample)
        encoder = load_text(checkpoint)[1]
        torch.testing.assert_close(encoder(ids).last_hidden_state, text(ids).last_hidden_state)
    assert load_vae(checkpoint).config.latents_mean == AutoencoderKLWan().config.latents_mean


def test_the_dtype_is_the_asked_one_but_for_what_wan_keeps_in_fp32(checkpoint):
    model = load_transformer(checkpoint, dtype=torch.bfloat16)
    assert model.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    assert model.blocks[0].scale_shift_table.dtype == model.condition_embedder.time_embedder.linear_1.weight.dtype
    assert model.blocks[0].scale_shift_table.dtype == torch.float32


def test_it_renders(checkpoint, preset, tmp_path):
    session = Session(str(preset), str(checkpoint))
    plan = make_plan(Request(str(preset), 240, 128, Fraction(1), "a red ball", seed=3))
    pipeline.render(session, plan, tmp_path / "run", tmp_path / "a.mp4", Console(interactive=False))
    assert probe(tmp_path / "a.mp4")["frames"] == 16


def test_the_scheduler_is_that_of_the_converted_repositories(checkpoint):
    scheduler = load_scheduler(checkpoint, 5.0, "unipc")
    assert isinstance(scheduler, UniPCMultistepScheduler)
    found = scheduler.config
    assert (found.prediction_type, found.use_flow_sigmas, found.flow_shift) == ("flow_prediction", True, 5.0)


def test_a_snapshot_with_parts_missing_is_not_whole(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "one")
    shards = sorted(folder.glob("*.safetensors"))
    index = {"weight_map": {str(i): shard.name for i, shard in enumerate(shards)}}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    assert is_whole(folder)
    for part in (shards[1], folder / original.TOKENIZER, folder / original.TEXT):
        part.rename(tmp_path / "away")
        assert not is_whole(folder)
        (tmp_path / "away").rename(part)
    (folder / original.EXPERTS["transformer"]).mkdir()
    assert not is_whole(folder)


def test_two_experts_lie_in_their_own_folders(parts, checkpoint, preset, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "experts")
    for i, name in enumerate(("high_noise_model", "low_noise_model")):
        (folder / name).mkdir()
        shutil.copy(folder / "config.json", folder / name)
        tensors = {transformer_name(k): v + i for k, v in parts[0].state_dict().items()}
        save_file(
            {k: v.contiguous() for k, v in tensors.items()}, folder / name / "diffusion_pytorch_model.safetensors"
        )
    for file in (*folder.glob("*.safetensors"), folder / "config.json"):
        file.unlink()
    high, low = (load_transformer(folder, part=part) for part in ("transformer", "transformer_2"))
    assert torch.equal(high.proj_out.bias + 1, low.proj_out.bias)
    assert len({tuple(original.files(folder, part)) for part in ("transformer", "transformer_2")}) == 2
    with pytest.raises(InputError, match="has two experts"):
        check_config(folder, load_preset(str(preset)))
    shutil.rmtree(folder / "low_noise_model")
    for model in (folder, checkpoint):  # the one there is is never taken for both
        with pytest.raises(InputError, match="transformer_2"):
            load_transformer(model, part="transformer_2")


def test_other_sizes_than_the_presets_are_refused(checkpoint, preset):
    check_config(checkpoint, load_preset(str(preset)))
    with pytest.raises(InputError, match=r"the transformer in .* has dim = 24"):
        check_config(checkpoint, load_preset("wan2.1-1.3b"))


@pytest.mark.parametrize("lost", ["blocks.1.ffn.fc2.weight", "token_embedding.weight", None])
def test_a_damaged_text_encoder_is_refused(checkpoint, tmp_path, lost):
    folder = shutil.copytree(checkpoint, tmp_path / "damaged")
    weights = folder / original.TEXT
    state = torch.load(weights, weights_only=True)
    if lost:
        torch.save({k: v for k, v in state.items() if k != lost}, weights)
    else:
        weights.unlink()
    with pytest.raises(InputError, match=r"text encoder .* cannot be read"):
        load_text(folder)


@pytest.mark.parametrize("change", ["lost", "unknown", "cut", "hostile"])
def test_damaged_weights_are_refused_by_name(parts, checkpoint, preset, tmp_path, change):
    folder = shutil.copytree(checkpoint, tmp_path / "damaged")
    weights = folder / original.VAE
    state = torch.load(weights, weights_only=True)
    if change == "lost":
        del state["decoder.head.0.gamma"]
        torch.save(state, weights)
    elif change == "unknown":
        torch.save(state | {"decoder.nothing": torch.zeros(1)}, weights)
    elif change == "cut":
        weights.write_bytes(weights.read_bytes()[:5000])
    else:
        torch.save({"conv2.weight": print}, weights)
    shown = {"lost": r"decoder\.norm_out\.gamma", "unknown": r"decoder\.nothing"}.get(change, "cannot be read")
    with pytest.raises(InputError, match=shown):
        check_config(folder, load_preset(str(preset)))
        load_vae(folder)


def vae22_name(name):
    name = re.sub(r"(down|up)_blocks\.(\d)\.resnets\.(\d)", r"\1samples.\2.\1samples.\3", name)
    name = re.sub(r"down_blocks\.(\d)\.downsampler", r"downsamples.\1.downsamples.2", name)
    name = re.sub(r"up_blocks\.(\d)\.upsampler", r"upsamples.\1.upsamples.3", name)
    return vae_name(name)


def test_the_vae_of_wan22_5b_arrives(tmp_path):
    torch.manual_seed(4)
    preset = load_preset("wan2.2-5b").vae
    layout = {
        "z_dim": preset.z_dim,
        "dim_mult": list(preset.dim_mult),
        "num_res_blocks": preset.num_res_blocks,
        "temperal_downsample": list(preset.temperal_downsample),
        "is_residual": preset.is_residual,
        "in_channels": preset.out_channels,
        "out_channels": preset.out_channels,
        "patch_size": preset.patch_size,
    }
    vae = AutoencoderKLWan(base_dim=4, decoder_base_dim=8, **layout, latents_mean=[0.0] * 48, latents_std=[1.0] * 48)
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    state = {vae22_name(k): v for k, v in vae.state_dict().items()}
    assert len(state) == len(vae.state_dict())
    assert {
        "encoder.downsamples.1.downsamples.0.shortcut.weight",
        "encoder.downsamples.0.downsamples.2.resample.1.weight",
        "decoder.upsamples.1.upsamples.3.time_conv.weight",
        "decoder.upsamples.3.upsamples.2.residual.6.bias",
        "decoder.middle.0.residual.3.gamma",
        "decoder.head.2.weight",
    } <= state.keys()
    torch.save(state, tmp_path / original.VAE22)
    assert model_folder(load_preset("wan2.2-5b"), str(tmp_path)) == tmp_path
    loaded = load_vae(tmp_path)
    for name, value in vae.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    z = torch.randn(1, 48, 2, 2, 2)
    with torch.no_grad():
        torch.testing.assert_close(loaded.decode(z).sample, vae.decode(z).sample)
    mean, std = loaded.config.latents_mean, loaded.config.latents_std
    assert len(mean) == len(std) == 48 and (mean[0], mean[-1], std[0], std[-1]) == (-0.2289, -0.0667, 0.4765, 0.7744)
    assert min(std) > 0.3 > max(map(abs, mean)) - 0.3
    for name, value in layout.items():
        assert loaded.config[name] == value, name
    del state["encoder.middle.1.proj.bias"]
    torch.save(state, tmp_path / original.VAE22)
    with pytest.raises(InputError, match=r"encoder\.mid_block\.attentions\.0\.proj\.bias"):
        load_vae(tmp_path)


def test_the_vae_of_an_original_is_enough_to_decode(checkpoint, preset, tmp_path):
    (tmp_path / "vae").mkdir()
    shutil.copy(checkpoint / original.VAE, tmp_path / "vae")
    whole, alone = Session(str(preset), str(checkpoint)), Session(str(preset), str(tmp_path / "vae"), only="vae")
    assert alone.vae_hash == whole.vae_hash
    assert torch.equal(alone.vae().encoder.conv_in.weight, whole.vae().encoder.conv_in.weight)
