"""Makes the embedded model `tiny` from nothing: text encoder, VAE, latents, base, proxy adapter, detail adapter.

`atlasvid train tiny` (`make tiny`) runs this. Each part resumes from its checkpoint in the work folder and is skipped
once it is finished; the result is a plain diffusers folder that `WanPipeline.from_pretrained` loads. Expected figures
are in docs/LOG.md.
"""

import json
import random
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from transformers import AutoTokenizer, UMT5EncoderModel

from . import dataset, train, train_text, train_vae
from .text import encode_prompts

VAE_STEPS, BASE_STEPS, PROXY_STEPS, DETAIL_STEPS = 2200, 1500, 600, 150
SAMPLES = {"image": 2400, "clip": 300, "proxy": 160, "detail": 60}
LORA_RANK = 64
WINDOWS = ((7, 8, 8), (13, 6, 6))
MARGIN = (0, 1, 1)

VAE_CONFIG = {
    "base_dim": 32,
    "decoder_base_dim": 32,
    "z_dim": 32,
    "dim_mult": [1, 2, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [True, True],
    "is_residual": True,
    "in_channels": 48,
    "out_channels": 48,
    "patch_size": 4,
    "scale_factor_temporal": 4,
    "scale_factor_spatial": 16,
    "latents_mean": [0.0] * 32,
    "latents_std": [1.0] * 32,
}
TRANSFORMER_CONFIG = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 3,
    "attention_head_dim": 64,
    "in_channels": 32,
    "out_channels": 32,
    "text_dim": 128,
    "freq_dim": 256,
    "ffn_dim": 768,
    "num_layers": 6,
}


def finish_vae(vae: AutoencoderKLWan, folder: Path) -> None:
    """Measures the latents' mean and spread per channel and saves the VAE in fp16."""
    encode = dataset.Encoder(vae)
    samples = []
    for i in range(60):
        pixels, _ = dataset.whole_frame(random.Random(f"statistics/{i}"), 9, dataset.FPS)
        samples.append(encode(pixels).flatten(1))
    values = torch.cat(samples, dim=1)
    vae.register_to_config(latents_mean=values.mean(1).tolist(), latents_std=values.std(1).tolist())
    vae.half().save_pretrained(folder / "vae")


def embedder(folder: Path) -> Callable[[str], torch.Tensor]:
    """Caption -> embedding by the saved text encoder, remembered."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    encoder = UMT5EncoderModel.from_pretrained(folder / "text_encoder")
    return lru_cache(maxsize=None)(lambda prompt: encode_prompts([prompt], tokenizer, encoder)[0])


def base_model(folder: Path) -> WanTransformer3DModel:
    return WanTransformer3DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float32)


def make(work: Path, out: Path) -> None:
    """Trains what is missing of the model folder `out`; checkpoints, latents and logs go to `work`."""
    if not (out / "text_encoder").exists():
        accuracy = train_text.train(out)
        (work / "text.json").write_text(json.dumps({"accuracy": accuracy}))
    if not (out / "vae").exists():
        vae = train_vae.train(VAE_CONFIG, work / "vae", VAE_STEPS, lr=3e-3, count=3, size=96, frames=9)
        finish_vae(vae, out)
    vae = AutoencoderKLWan.from_pretrained(out / "vae", torch_dtype=torch.float32)
    embed = embedder(out)

    if not (out / "transformer").exists():
        for kind in ("image", "clip"):
            dataset.build(kind, SAMPLES[kind], work / "data", vae)
        torch.manual_seed(0)
        model = WanTransformer3DModel(**TRANSFORMER_CONFIG)
        images, clips = (dataset.load(kind, work / "data") for kind in ("image", "clip"))
        train.train_clips(model, work / "base", images, clips, embed, BASE_STEPS, lr=3e-3, time_ratio=1)
        model.half().save_pretrained(out / "transformer")
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    tokenizer = AutoTokenizer.from_pretrained(out / "tokenizer")
    encoder = UMT5EncoderModel.from_pretrained(out / "text_encoder")
    WanPipeline(tokenizer, encoder, vae, scheduler, base_model(out)).save_config(out)
    scheduler.save_pretrained(out / "scheduler")

    if not (out / "proxy_lora.safetensors").exists():
        dataset.build("proxy", SAMPLES["proxy"], work / "data", vae)
        model = base_model(out)
        torch.manual_seed(1)
        model.add_adapter(train.lora_config(LORA_RANK))
        data = dataset.load("proxy", work / "data")
        train.train_clips(model, work / "proxy", [], data, embed, PROXY_STEPS, lr=3e-3, time_ratio=4, tokens=2600)
        train.save_adapter(model, out / "proxy_lora.safetensors", {"stage": "proxy", "time_ratio": "4"})
    if not (out / "detail_lora.safetensors").exists():
        dataset.build("detail", SAMPLES["detail"], work / "data", vae)
        model = base_model(out)
        torch.manual_seed(2)
        model.add_adapter(train.lora_config(LORA_RANK))
        data = dataset.load("detail", work / "data")
        train.train_detail(model, model, work / "detail", data, embed, DETAIL_STEPS, 3e-3, WINDOWS, MARGIN)
        metadata = {"stage": "detail", "windows": json.dumps(WINDOWS), "streams": "both"}
        train.save_adapter(model, out / "detail_lora.safetensors", metadata)
