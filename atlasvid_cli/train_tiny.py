"""Makes the embedded model `tiny` from nothing: text encoder, VAE, latents, base, proxy adapter, detail adapter.

`atlasvid train tiny` (`make tiny`) runs this. Each part is skipped once it is finished, and all but the first (of some
twenty minutes) resume from what the work folder holds of the same recipe; the result is a plain diffusers folder that
`WanPipeline.from_pretrained` loads. Expected figures are in docs/LOG.md.
"""

import math
import random
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from transformers import AutoTokenizer, UMT5EncoderModel

from . import dataset, train, train_encoder, train_text, train_vae, wear, world
from .causal import hold_still, make_idle
from .checkpoint import save_folder
from .console import Console
from .encode import encode_clips
from .loop import Run
from .presets import load_preset
from .shapes import NATIVE
from .store import artefact_hash, write_json
from .tensor_file import save_tensors
from .text import encode_prompts
from .wear import Stage1
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
PROXY_ADAPTER, DETAIL_ADAPTER = "proxy_lora.safetensors", "detail_lora.safetensors"
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


@dataclass(frozen=True)
class Runs:
    """Names the folders of runs that build on each other by all that decides them: what was `told` so far, first what
    they begin with. So a run is gone on with, or taken as done, only where its whole recipe is the same."""

    work: Path
    told: list[dict[str, Any]]

    def folder(self, name: str, settings: dict[str, Any]) -> Path:
        """The folder of the next run, which does not depend on those after it."""
        self.told.append({name: settings})
        return self.work / f"{name}-{artefact_hash({'runs': self.told})}"


def make(work: Path, out: Path, console: Console) -> None:
    """Trains what is missing of the model folder `out`; checkpoints, latents and logs go to `work`."""
    if not (out / "text_encoder").exists():
        figures = train_text.train(out)
        write_json(work / "text.json", figures)
    if not (out / "vae").exists():
        finish_vae(trained_vae(work), out)
    vae = AutoencoderKLWan.from_pretrained(out / "vae", torch_dtype=torch.float32)
    if not (out / ENTRY).exists():
        make_entry(work, out, vae)
    embed = embedder(out)
    if not (out / "transformer").exists():
        make_base(work, out, vae, embed)
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    tokenizer = AutoTokenizer.from_pretrained(out / "tokenizer")
    encoder = UMT5EncoderModel.from_pretrained(out / "text_encoder")
    WanPipeline(tokenizer, encoder, vae, scheduler, load_transformer(out)).save_config(out)
    scheduler.save_pretrained(out / "scheduler")
    if not (out / PROXY_ADAPTER).exists():
        make_proxy_adapter(work, out, vae, embed)
    if not (out / DETAIL_ADAPTER).exists():
        make_detail_adapter(work, out, vae, embed, console)


def trained_vae(work: Path) -> AutoencoderKLWan:
    """The VAE after all its runs, each from the weights that the one before ended with."""
    weights = [train_vae.KL_WEIGHT, train_vae.DRIFT_WEIGHT, train_vae.HELD_FRAMES]
    seen = [world.SHAPE_SHARES, world.GROUND_SHARES]
    runs = Runs(work, [{"config": VAE_CONFIG, "weights": weights, "world": seen}])

    def trained(
        vae: AutoencoderKLWan, name: str, teacher: AutoencoderKLWan | None = None, **settings: Any
    ) -> AutoencoderKLWan:
        return train_vae.train(vae, runs.folder(name, settings), teacher=teacher, **settings)

    sharpened = partial(trained, lr=2e-3, noise=0.25, shapes=LONG_CLIPS, slopes=5.0, cut=True)
    vae = trained(train_vae.build(VAE_CONFIG, seed=0), "vae", steps=VAE_STEPS, lr=3e-3)
    vae = train_vae.compress(vae, LATENT_CHANNELS)
    runs.told.append({"channels": LATENT_CHANNELS})
    vae = trained(vae, "vae-compressed", steps=COMPRESSED_STEPS, lr=2.5e-3, noise=0.25, seed=1)
    teacher = deepcopy(vae).requires_grad_(False)
    settled: dict[str, Any] = {"steps": SETTLED_STEPS, "lr": 2e-3, "noise": 0.25, "seed": 2, "shapes": LONG_CLIPS}
    vae = trained(vae, "vae-settled", teacher, **settled)
    vae = sharpened(train_vae.let_learn(vae, *DECODER), "vae-sharpened", steps=SHARPENED_STEPS, seed=3)
    teacher, preset = deepcopy(vae), load_preset("tiny").vae
    hold_still(vae, preset.still)
    make_idle(vae, preset.idle)
    runs.told.append({"still": preset.still, "idle": preset.idle})
    settings: dict[str, Any] = {"steps": STILL_ENCODER_STEPS, "lr": 2e-3, "seed": 12, "shapes": LONG_CLIPS}
    vae = train_encoder.distil_encoder(vae, teacher, runs.folder("vae-still-encoder", settings), **settings)
    return sharpened(train_vae.let_learn(vae, *DECODER), "vae-still", steps=STILL_DECODER_STEPS, seed=11)


def make_entry(work: Path, out: Path, vae: AutoencoderKLWan) -> None:
    """Trains the encoder for frames half as large, and saves it in fp16."""
    fits = model_hash(out, "vae")
    settings: dict[str, Any] = {"steps": ENTRY_STEPS, "lr": 2e-3, "seed": 13, "shapes": ENTRY_CLIPS}
    folder = Runs(work, [{"weights": fits}]).folder("vae-entry", settings)
    half = train_encoder.distil_entry(vae, folder, **settings)
    metadata = {"stage": "entry", "base": fits}
    save_tensors(out / ENTRY, {name: p.detach().half() for name, p in half.own().items()}, metadata)


def learnt_from(work: Path, out: Path, kinds: Sequence[str], *weights: str | None) -> dict[str, Any]:
    """What decides a training of the transformer beside its settings: the samples of some kinds, the folder's text
    encoder, VAE and other `weights`, and how a draw is made of a sample."""
    return {
        "weights": model_hash(out, "text_encoder", "vae", *weights),
        "samples": [samples_folder(work, out).name, [(kind, SAMPLES[kind]) for kind in kinds]],
        "draws": train.recipe(),
        "shifts": [clip_shift(latents) for latents in (1, 9)],
    }


def samples_folder(work: Path, out: Path) -> Path:
    return dataset.folder_of(work, model_hash(out, "vae"))


def make_base(work: Path, out: Path, vae: AutoencoderKLWan, embed: train.Embed) -> None:
    """Trains the transformer from nothing, and saves it in fp16."""
    kinds = "image", "clip"
    images, clips = (dataset.build(kind, SAMPLES[kind], samples_folder(work, out), vae) for kind in kinds)
    runs = Runs(work, [{"config": TRANSFORMER_CONFIG, **learnt_from(work, out, kinds)}])
    torch.manual_seed(0)
    model = WanTransformer3DModel(**TRANSFORMER_CONFIG)
    for i, (steps, lr, stills) in enumerate(BASE_CYCLES):
        course: dict[str, Any] = {"steps": steps, "lr": lr, "seed": i, "accumulate": 2}
        seen: dict[str, Any] = {"tokens": 1440, "stills": stills}
        told = Run(runs.folder(f"base-{i}", course | seen), **course)
        train.train_clips(model, told, images, clips, embed, shift_of=clip_shift, **seen)
    save_folder(model.half(), out / "transformer")


def trainable(out: Path, rank: int, seed: int) -> WanTransformer3DModel:
    """The base with a fresh adapter, which alone learns."""
    model = load_transformer(out)
    torch.manual_seed(seed)
    model.add_adapter(train.lora_config(rank))
    return model


def make_proxy_adapter(work: Path, out: Path, vae: AutoencoderKLWan, embed: train.Embed) -> None:
    """Trains stage 1's adapter on clips at a quarter of the frame rate, and saves it."""
    data = dataset.build("proxy", SAMPLES["proxy"], samples_folder(work, out), vae)
    model = trainable(out, PROXY_RANK, seed=1)
    runs = Runs(work, [{"rank": PROXY_RANK, **learnt_from(work, out, ["proxy"], "transformer")}])
    course: dict[str, Any] = {"steps": PROXY_STEPS, "lr": 2.5e-3, "accumulate": 2}
    proxy = load_preset("tiny").proxy
    seen: dict[str, Any] = {"spacing": proxy.spacing, "tokens": 2200}
    told = Run(runs.folder("proxy", course | seen), **course)
    train.train_clips(model, told, [], data, embed, shift_of=clip_shift, **seen)
    metadata = train.adapter_metadata("proxy", model_hash(out, "transformer"), proxy)
    train.save_adapter(model, out / PROXY_ADAPTER, metadata)


def make_detail_adapter(work: Path, out: Path, vae: AutoencoderKLWan, embed: train.Embed, console: Console) -> None:
    """Trains stage 2's adapter on crops with their true and worn proxies, and saves it."""
    preset = load_preset("tiny")
    detail, kinds = preset.detail, ("first_still", "first", "upper_still", "upper")
    data = [s for kind in kinds for s in dataset.build(kind, SAMPLES[kind], samples_folder(work, out), vae)]
    guided = Stage1(preset.proxy.spacing, clip_shift, PROXY_ADAPTER, preset.proxy.guidance_scale)
    proxies = []
    for level, stage1 in ((detail.upper, Stage1(NATIVE, clip_shift)), (detail.first, guided)):
        source = learnt_from(work, out, kinds, "transformer", stage1.adapter)
        settings = {"spacing": stage1.spacing, "guidance": stage1.guidance_scale, "wear": wear.recipe()}
        folder = Runs(work, [source]).folder("proxies", settings)
        proxies.append(folder.name)
        wear.complete_proxies(
            folder,
            data,
            embed,
            stage1,
            partial(load_transformer, out, stage1.adapter, "proxy"),
            (lambda: vae) if level.upsample == "pixels" else None,
            console,
        )
    model = trainable(out, DETAIL_RANK, seed=2)
    runs = Runs(work, [{"rank": DETAIL_RANK, "proxies": proxies, **learnt_from(work, out, kinds, "transformer")}])
    course: dict[str, Any] = {"steps": DETAIL_STEPS, "lr": 3e-3, "accumulate": 4}
    seen = {"detail": asdict(detail)}
    told = Run(runs.folder("detail", course | seen), **course)
    train.train_detail(model, model, told, data, embed, detail)
    fits = model_hash(out, "transformer")
    metadata = train.adapter_metadata("detail", fits, preset.proxy, dataset.DETAIL_RATIOS, detail.windows)
    train.save_adapter(model, out / DETAIL_ADAPTER, metadata)
