"""Makes the embedded model `tiny` from nothing: text encoder, VAE, latents, base, proxy adapter, detail adapter.

`atlasvid train tiny` (`make tiny`) runs this. Each part is skipped once it is finished, and all but the first (of some
twenty minutes) resume from their checkpoints in the work folder; the result is a plain diffusers folder that
`WanPipeline.from_pretrained` loads. Expected figures are in docs/LOG.md.
"""

import math
import random
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from transformers import AutoTokenizer, UMT5EncoderModel

from . import dataset, train, train_encoder, train_text, train_vae, world
from .causal import hold_still, make_idle
from .checkpoint import save_folder
from .encode import encode_clips
from .presets import load_preset
from .store import artefact_hash, write_json
from .tensor_file import save_tensors
from .text import encode_prompts
from .wear import add_enlarged, add_worn
from .weights import load_transformer, model_hash

VAE_STEPS, COMPRESSED_STEPS, SETTLED_STEPS, SHARPENED_STEPS = 2200, 1400, 1100, 9000
STILL_ENCODER_STEPS, STILL_DECODER_STEPS, ENTRY_STEPS = 2500, 6000, 6000
PROXY_STEPS, DETAIL_STEPS = 10000, 4500
# cosines, each (steps, peak learning rate, share of single images at its start and end): colours, shapes and grounds,
# then motion
BASE_CYCLES = (
    (1700, 3e-3, (0.9, 0.4)),
    (2200, 3e-3, (0.4, 0.2)),
    (3600, 3e-3, (0.5, 0.2)),
    (1500, 2e-3, (0.5, 0.3)),
    (5000, 2e-3, (0.5, 0.3)),
    (4000, 1.5e-3, (0.5, 0.3)),
    (4000, 1.5e-3, (0.5, 0.3)),
    (5000, 1.5e-3, (0.5, 0.3)),
)
# fewer are learnt by heart: of 800 clips the loss on fresh ones was 15 % above that on its own (docs/LOG.md)
SAMPLES = {
    "image": 24000,
    "clip": 12000,
    "proxy": 5000,
    "first_still": 4000,
    "first": 1000,
    "upper_still": 6000,
    "upper": 600,
}
LATENT_CHANNELS = 16  # what is left of the VAE's first 32
LONG_CLIPS = ((3, 96, 9), (2, 96, 17), (2, 64, 29))  # of the VAE's last training: clips, pixels a side, frames
ENTRY_CLIPS = ((4, 96, 9), (1, 160, 17), (2, 64, 29))
ENTRY = "half_entry.safetensors"
PROXY_RANK, DETAIL_RANK = 96, 64
DECODER = "decoder.", "post_quant_conv."

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
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "text_dim": 128,
    "freq_dim": 256,
    "ffn_dim": 768,
    "num_layers": 6,
}


def finish_vae(vae: AutoencoderKLWan, folder: Path) -> None:
    """Measures the latents' mean per channel and their spread over all channels, and saves the VAE in fp16.

    The spread is one number: channels that hold little stay small, so that flow matching resolves them last.
    """
    samples = []
    for i in range(15):
        rng = random.Random(f"statistics/{i}")
        scenes = [dataset.whole_frame(rng, (5, 8), 9, dataset.FPS)[:2] for _ in range(4)]
        pixels = [world.render(scene, times, 5 * dataset.TOKEN, 8 * dataset.TOKEN) for scene, times in scenes]
        samples.append(encode_clips(vae, torch.stack(pixels)).transpose(0, 1).flatten(1))
    values = torch.cat(samples, dim=1)
    spread = values.var(dim=1).mean().sqrt().item()
    vae.register_to_config(latents_mean=values.mean(1).tolist(), latents_std=[spread] * len(values))
    save_folder(vae.half(), folder / "vae")


def embedder(folder: Path) -> Callable[[str], torch.Tensor]:
    """Caption -> embedding by the saved text encoder, remembered."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    encoder = UMT5EncoderModel.from_pretrained(folder / "text_encoder")
    return lru_cache(maxsize=None)(lambda prompt: encode_prompts([prompt], tokenizer, encoder)[0])


def clip_shift(latents: int) -> float:
    """The flow shift of a clip of so many latent frames.

    Frames of a clip repeat each other, so noise hides what a clip shows later than what a frame does, by about the root
    of their number (as with more pixels: SD3, arXiv 2403.03206, §5.3.2). Where the object is and which way it moves is
    decided there.
    """
    return 2.5 * math.sqrt(latents)


def make(work: Path, out: Path) -> None:
    """Trains what is missing of the model folder `out`; checkpoints, latents and logs go to `work`."""
    if not (out / "text_encoder").exists():
        figures = train_text.train(out)
        write_json(work / "text.json", figures)
    if not (out / "vae").exists():
        vae = train_vae.train(train_vae.build(VAE_CONFIG, seed=0), work / "vae", VAE_STEPS, lr=3e-3)
        vae = train_vae.compress(vae, LATENT_CHANNELS)
        vae = train_vae.train(vae, work / "vae-compressed", COMPRESSED_STEPS, lr=2.5e-3, noise=0.25, seed=1)
        teacher, run = deepcopy(vae).requires_grad_(False), work / "vae-settled"
        vae = train_vae.train(vae, run, SETTLED_STEPS, lr=2e-3, noise=0.25, seed=2, shapes=LONG_CLIPS, teacher=teacher)
        sharpened = partial(train_vae.train, lr=2e-3, noise=0.25, shapes=LONG_CLIPS, slopes=5.0, cut=True)
        vae = sharpened(train_vae.let_learn(vae, *DECODER), work / "vae-sharpened", steps=SHARPENED_STEPS, seed=3)
        teacher, run = deepcopy(vae), work / "vae-still-encoder"
        hold_still(vae, load_preset("tiny").vae.still)
        make_idle(vae, load_preset("tiny").vae.idle)
        vae = train_encoder.distil_encoder(vae, teacher, run, STILL_ENCODER_STEPS, lr=2e-3, seed=12, shapes=LONG_CLIPS)
        vae = sharpened(train_vae.let_learn(vae, *DECODER), work / "vae-still", steps=STILL_DECODER_STEPS, seed=11)
        finish_vae(vae, out)
    vae = AutoencoderKLWan.from_pretrained(out / "vae", torch_dtype=torch.float32)
    if not (out / ENTRY).exists():
        fits = model_hash(out, "vae")
        run = work / f"vae-entry-{fits}"
        half = train_encoder.distil_entry(vae, run, ENTRY_STEPS, lr=2e-3, seed=13, shapes=ENTRY_CLIPS)
        metadata = {"stage": "entry", "base": fits}
        save_tensors(out / ENTRY, {name: p.detach().half() for name, p in half.own().items()}, metadata)
    embed = embedder(out)
    latents = dataset.folder_of(work, model_hash(out, "vae"))

    if not (out / "transformer").exists():
        images, clips = (dataset.build(kind, SAMPLES[kind], latents, vae) for kind in ("image", "clip"))
        torch.manual_seed(0)
        model = WanTransformer3DModel(**TRANSFORMER_CONFIG)
        for i, (steps, lr, stills) in enumerate(BASE_CYCLES):
            run = work / f"base-{latents.name}" / str(i)
            train.train_clips(
                model,
                run,
                images,
                clips,
                embed,
                steps,
                lr,
                time_ratio=1,
                tokens=1440,
                stills=stills,
                shift_of=clip_shift,
                accumulate=2,
                seed=i,
            )
        save_folder(model.half(), out / "transformer")
    base = model_hash(out, "vae", "transformer")
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    tokenizer = AutoTokenizer.from_pretrained(out / "tokenizer")
    encoder = UMT5EncoderModel.from_pretrained(out / "text_encoder")
    WanPipeline(tokenizer, encoder, vae, scheduler, load_transformer(out)).save_config(out)
    scheduler.save_pretrained(out / "scheduler")

    if not (out / "proxy_lora.safetensors").exists():
        data = dataset.build("proxy", SAMPLES["proxy"], latents, vae)
        model = load_transformer(out)
        torch.manual_seed(1)
        model.add_adapter(train.lora_config(PROXY_RANK))
        train.train_clips(
            model,
            work / f"proxy-{base}-{PROXY_STEPS}",
            [],
            data,
            embed,
            PROXY_STEPS,
            2.5e-3,
            time_ratio=4,
            tokens=2200,
            shift_of=clip_shift,
            accumulate=2,
        )
        metadata = train.adapter_metadata("proxy", model_hash(out, "transformer"), 4)
        train.save_adapter(model, out / "proxy_lora.safetensors", metadata)
    if not (out / "detail_lora.safetensors").exists():
        data = []
        for kind in ("first_still", "first", "upper_still", "upper"):
            data += dataset.build(kind, SAMPLES[kind], latents, vae)
        guidance = load_preset("tiny").proxy.guidance_scale
        for time_ratio, adapter, scale in ((1, None, 1.0), (4, "proxy_lora.safetensors", guidance)):
            stage1 = load_transformer(out, adapter, "proxy")
            add_worn(stage1, data, embed, time_ratio, clip_shift, guidance_scale=scale)
        detail = load_preset("tiny").detail
        for level, time_ratio in ((detail.upper, 1), (detail.first, 4)):
            if level.upsample == "pixels":
                add_enlarged(vae, data, time_ratio)
        model = load_transformer(out)
        torch.manual_seed(2)
        model.add_adapter(train.lora_config(DETAIL_RANK))
        told = {"steps": DETAIL_STEPS, "detail": asdict(detail), "samples": SAMPLES, "rank": DETAIL_RANK}
        weights = model_hash(out, "vae", "transformer", "proxy_lora.safetensors")
        run = work / f"detail-{weights}-{artefact_hash(told)}"
        train.train_detail(model, model, run, data, embed, DETAIL_STEPS, 3e-3, detail, accumulate=4)
        fits = model_hash(out, "transformer")
        metadata = train.adapter_metadata("detail", fits, 4, dataset.DETAIL_RATIOS, detail.windows)
        train.save_adapter(model, out / "detail_lora.safetensors", metadata)
