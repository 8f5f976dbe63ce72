"""Trains the embedded model's transformer from nothing, and LoRA adapters of both stages, by flow matching.

Every step draws its samples, noise and sigmas from (seed, step) alone, so a run resumed from a checkpoint goes on as if
it had never stopped. Samples come precomputed from `dataset`.
"""

import json
import math
import random
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from diffusers.training_utils import EMAModel
from peft import LoraConfig, get_peft_model_state_dict

from .checkpoint import load_checkpoint, save_checkpoint
from .machine import has_bfloat16
from .model import clip_forward, detail_forward, patchify, proxy_context, text_context
from .optim import Optimizer, learning_rate
from .presets import Layout, Training
from .schedule import shift_sigma
from .shapes import Grid
from .store import atomic, save_tensors

TEXT_LENGTH = 512
PATCH = 2
PROXY_DROP, TEXT_DROP = 0.05, 0.1  # DESIGN §4, so that guidance can act on either
PROXY_NOISE = 0.25  # the largest sigma that the proxy is noised with, so that an imperfect one still guides
CHECKPOINT_STEPS, VALIDATION_STEPS, LOG_STEPS = 200, 100, 25
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]

MUON = Training()

Embed = Callable[[str], torch.Tensor]


def lora_config(rank: int) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=rank, target_modules=LORA_TARGETS, init_lora_weights=True)


def draw_sigma(generator: torch.Generator, shift: float, mean: float = 0.0) -> float:
    """A logit-normal sigma under the flow-matching time shift, rounded as schedulers do to a whole timestep."""
    plain = torch.sigmoid(torch.randn((), generator=generator) + mean).item()
    return max(1, int(1000 * shift_sigma(plain, shift))) / 1000


def grid_of(latents: torch.Tensor) -> Grid:
    _, t, h, w = latents.shape
    return Grid(t, h // PATCH, w // PATCH)


def clip_loss(
    model: WanTransformer3DModel,
    samples: list[torch.Tensor],
    prompts: list[torch.Tensor],
    generator: torch.Generator,
    time_ratio: int,
    shift: float,
) -> torch.Tensor:
    """Flow-matching loss of stage 1 on latents of one shape: predict noise - latents."""
    clean = torch.stack([patchify(s, PATCH) for s in samples])
    noise = torch.randn(clean.shape, generator=generator)
    sigma = torch.tensor([draw_sigma(generator, shift) for _ in samples])
    noisy = torch.lerp(clean, noise, sigma.view(-1, 1, 1))
    text = text_context(model, prompts, TEXT_LENGTH)
    out = clip_forward(model, noisy, grid_of(samples[0]), (sigma * 1000).floor(), text, time_ratio)
    return (out - (noise - clean)).square().mean()


def detail_loss(
    model: WanTransformer3DModel,
    proxy_model: WanTransformer3DModel,
    sample: dict,
    prompt: torch.Tensor,
    rng: random.Random,
    generator: torch.Generator,
    layouts: Sequence[Layout],
    margin: tuple[int, int, int],
    shift: float,
    time_ratios: tuple[int, int],
    proxy_window: tuple[int, int, int],
    proxy_centre: bool,
) -> torch.Tensor:
    """Flow-matching loss of stage 2 on one crop with its aligned proxy, at one of the two ratios of time."""
    time_ratio = rng.choice(time_ratios)
    proxy = sample[f"proxy_{time_ratio}"].float()
    clean = patchify(sample["latents"].float(), PATCH)
    noise = torch.randn(clean.shape, generator=generator)
    sigma = draw_sigma(generator, shift)
    strength = rng.random() * PROXY_NOISE
    proxy = torch.lerp(proxy, torch.randn(proxy.shape, generator=generator), strength)
    context = None
    keep_proxy = rng.random() >= PROXY_DROP
    if keep_proxy or proxy_model is not model:  # an adapter of the proxy stream alone has nothing to learn without
        context = proxy_context(
            proxy_model,
            patchify(proxy, PATCH),
            grid_of(proxy),
            text_context(proxy_model, [prompt], TEXT_LENGTH),
            Fraction(sample["ratio"]),
            time_ratio,
            margin,
            proxy_window,
            proxy_centre,
        )
    out = detail_forward(
        model,
        torch.lerp(clean, noise, sigma),
        grid_of(sample["latents"]),
        int(sigma * 1000),
        text_context(model, [prompt], TEXT_LENGTH),
        context,
        layouts,
        chunk=64,
        phase=rng.randrange(len(layouts)),
    )
    return (out - (noise - clean)).square().mean()


def by_shape(data: list[dict]) -> list[list[dict]]:
    """Samples in groups whose latents have one shape, so that they can share a batch."""
    groups: dict[tuple, list[dict]] = {}
    for sample in data:
        groups.setdefault(tuple(sample["latents"].shape), []).append(sample)
    return [groups[shape] for shape in sorted(groups)]


def draw_batch(groups: list[list[dict]], rng: random.Random, tokens: int) -> tuple[list[dict], list[torch.Tensor]]:
    """Samples of one shape, drawn by how many have it, and their latents, which hold about `tokens` tokens in all.

    Half of the batches of clips are cut to a shorter length: a causal VAE's prefix is a shorter clip.
    """
    group = rng.choices(groups, [len(g) for g in groups])[0]
    grid = grid_of(group[0]["latents"])
    length = rng.randint(2, grid.t) if grid.t > 1 and rng.random() < 0.5 else grid.t
    picked = rng.choices(group, k=max(1, tokens // (length * grid.h * grid.w)))
    return picked, [s["latents"][:, :length].float() for s in picked]


def draw_crops(data: list[dict], rng: random.Random, time_ratio: int) -> list[dict]:
    """Crops of stage 2 of one length, together at most half as long as the longest or just one, and their proxies.

    Every length that the proxy can have is as likely, a still too: several stills show more than a clip of their cost.
    """
    longest = max(s["latents"].shape[1] for s in data)
    length = rng.choice(range(1, longest + 1, time_ratio))
    long_enough = [s for s in data if s["latents"].shape[1] >= length]
    lengths = {"latents": length, "proxy_1": length, f"proxy_{time_ratio}": (length - 1) // time_ratio + 1}
    return [
        picked | {name: picked[name][:, :n] for name, n in lengths.items()}
        for picked in rng.choices(long_enough, k=max(1, round(longest / length / 2)))
    ]


def run(
    model: WanTransformer3DModel,
    folder: Path,
    steps: int,
    lr: float,
    seed: int,
    loss_at: Callable[[int, random.Random, torch.Generator], torch.Tensor],
    accumulate: int = 1,
    validate: Callable[[], float | None] = lambda: None,
    on_step: Callable[[int], None] = lambda done: None,
    training: Training = MUON,
) -> None:
    """The loop: `loss_at(step, rng, generator)` over `accumulate` draws a step; logs and checkpoints to `folder`.

    On a CPU the draws of a step run side by side, a thread each: small models keep more cores busy so than by splitting
    every product over all of them. `validate()` is the loss on held-out samples, None without any; `on_step` gets the
    steps newly known to be done. Where `training` asks for an average of the weights, that is validated and what the
    model ends with.
    """
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    trained = [p for _, p in named]
    threads = torch.get_num_threads()
    on_cpu = trained[0].device.type == "cpu"
    workers = min(accumulate, threads) if on_cpu else 1

    def bfloat16() -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=on_cpu and has_bfloat16())

    def gradients(draw: str) -> tuple[float, tuple[torch.Tensor | None, ...]]:
        rng = random.Random(draw)
        generator = torch.Generator().manual_seed(rng.getrandbits(60))
        with bfloat16():
            loss = loss_at(step, rng, generator) / accumulate
        return loss.item(), torch.autograd.grad(loss, trained, allow_unused=True)

    heads = ("patch_embedding", "condition_embedder", "proj_out", "scale_shift_table")

    def averaged_loss() -> float | None:
        """`validate()` of the average, where there is one."""
        if average:
            average.store(trained)
            average.copy_to(trained)
        try:
            with bfloat16():
                return validate()
        finally:
            if average:
                average.restore(trained)

    optimizer = Optimizer(named, lr, heads, training.optimizer)
    average = EMAModel(trained, decay=training.ema) if training.ema else None
    step = load_checkpoint(folder, model, optimizer, average)
    _cut_log(folder / "log.jsonl", step)
    on_step(step)
    started, recent = time.monotonic(), []
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads // workers,)) as pool:
        while step < steps:
            draws = [f"{seed}/{step}/{part}" for part in range(accumulate)]
            total = 0.0
            for loss, grads in pool.map(gradients, draws):
                total += loss
                for p, grad in zip(trained, grads, strict=True):
                    if grad is not None:
                        p.grad = grad if p.grad is None else p.grad.add_(grad)
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step(learning_rate(step, steps, lr))
            if average:
                average.step(trained)
            step += 1
            on_step(1)
            recent.append(total)
            if step % LOG_STEPS == 0 or step == steps:
                row = {"step": step, "loss": round(sum(recent) / len(recent), 5)}
                recent.clear()
                if (step % VALIDATION_STEPS == 0 or step == steps) and (held_out := averaged_loss()) is not None:
                    row["validation_loss"] = round(held_out, 5)
                with (folder / "log.jsonl").open("a") as log:
                    log.write(json.dumps(row | {"seconds": round(time.monotonic() - started, 1)}) + "\n")
            if step % CHECKPOINT_STEPS == 0 or step == steps:
                save_checkpoint(folder, model, optimizer, step, average)
    if average:
        average.copy_to(trained)


def _cut_log(path: Path, step: int) -> None:
    """Drops what an interrupted run logged after its last checkpoint, and will log again."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines()
        with atomic(path) as file:
            file.writelines(f"{line}\n".encode() for line in lines if json.loads(line)["step"] <= step)


def pick_prompt(sample: dict, embed: Embed, rng: random.Random) -> torch.Tensor:
    return embed("" if rng.random() < TEXT_DROP else sample["caption"])


def train_clips(
    model: WanTransformer3DModel,
    folder: Path,
    images: list[dict],
    clips: list[dict],
    embed: Embed,
    steps: int,
    lr: float,
    time_ratio: int,
    tokens: int,
    stills: tuple[float, float] = (0.0, 0.0),
    shift_of: Callable[[int], float] = lambda latents: 3.0,
    accumulate: int = 1,
    seed: int = 0,
    held_out: Sequence[dict] = (),
    on_step: Callable[[int], None] = lambda done: None,
    training: Training = MUON,
) -> None:
    """Stage 1 training on clips, and on single `images` at a share of draws going from `stills[0]` to `stills[1]`.

    A step sees `accumulate` batches of about `tokens` tokens; `shift_of` gives a clip's shift by its latent frames.
    """
    stills_by_shape, clips_by_shape = by_shape(images), by_shape(clips)

    def loss_at(step: int, rng: random.Random, generator: torch.Generator) -> torch.Tensor:
        still = rng.random() < stills[0] + (stills[1] - stills[0]) * step / steps
        picked, latents = draw_batch(stills_by_shape if still else clips_by_shape, rng, tokens)
        prompts = [pick_prompt(s, embed, rng) for s in picked]
        return clip_loss(model, latents, prompts, generator, time_ratio, shift_of(latents[0].shape[1]))

    def held_out_loss(sample: dict, rng: random.Random, generator: torch.Generator) -> torch.Tensor:
        latents = sample["latents"].float()
        shift = shift_of(latents.shape[1])
        return clip_loss(model, [latents], [embed(sample["caption"])], generator, time_ratio, shift)

    run(model, folder, steps, lr, seed, loss_at, accumulate, validation(held_out, held_out_loss), on_step, training)


def train_detail(
    model: WanTransformer3DModel,
    proxy_model: WanTransformer3DModel,
    folder: Path,
    data: list[dict],
    embed: Embed,
    steps: int,
    lr: float,
    layouts: Sequence[Layout],
    margin: tuple[int, int, int],
    shift: float = 3.0,
    accumulate: int = 3,
    seed: int = 0,
    time_ratio: int = 4,
    proxy_window: tuple[int, int, int] = (13, 9, 9),
    proxy_centre: bool = False,
    held_out: Sequence[dict] = (),
    on_step: Callable[[int], None] = lambda done: None,
    training: Training = MUON,
) -> None:
    """Stage 2 training of `proxy_model`, which is `model` itself where the adapter acts on both streams."""
    figures = layouts, margin, shift, (time_ratio, 1), proxy_window, proxy_centre

    def loss_at(step: int, rng: random.Random, generator: torch.Generator) -> torch.Tensor:
        losses = [
            detail_loss(model, proxy_model, sample, pick_prompt(sample, embed, rng), rng, generator, *figures)
            for sample in draw_crops(data, rng, time_ratio)
        ]
        return torch.stack(losses).mean()

    def held_out_loss(sample: dict, rng: random.Random, generator: torch.Generator) -> torch.Tensor:
        return detail_loss(model, proxy_model, sample, embed(sample["caption"]), rng, generator, *figures)

    run(
        proxy_model,
        folder,
        steps,
        lr,
        seed,
        loss_at,
        accumulate,
        validation(held_out, held_out_loss),
        on_step,
        training,
    )


def validation(
    held_out: Sequence[dict], loss_of: Callable[[dict, random.Random, torch.Generator], torch.Tensor]
) -> Callable[[], float | None]:
    """The mean loss of held-out samples, each at noise and a sigma that are its own and never change."""

    @torch.no_grad()
    def validate() -> float | None:
        losses = []
        for i, sample in enumerate(held_out):
            rng = random.Random(f"held out/{i}")
            losses.append(loss_of(sample, rng, torch.Generator().manual_seed(rng.getrandbits(60))).item())
        return sum(losses) / len(losses) if losses else None

    return validate


def adapter_metadata(
    stage: str,
    base: str,
    time_ratio: int,
    ratios: Iterable[Any] = (),
    windows: Sequence[Sequence[int]] = (),
    streams: str = "both",
) -> dict[str, str]:
    """What an adapter says of itself: its stage, the hash of the base that it fits, and what it was trained for."""
    metadata = {"stage": stage, "base": base, "time_ratio": str(time_ratio)}
    if stage == "detail":
        metadata |= {
            "time_ratio": f"{time_ratio},1",
            "ratio": ",".join(map(str, sorted(set(ratios)))),
            "windows": json.dumps(windows),
            "streams": streams,
        }
    return metadata


def save_adapter(model: WanTransformer3DModel, path: Path, metadata: dict[str, str]) -> None:
    """The active LoRA in the layout that `WanPipeline.load_lora_weights` reads, fp16."""
    state = get_peft_model_state_dict(model, adapter_name="default")
    rank = next(v.shape[0] for k, v in state.items() if "lora_A" in k)
    assert math.isclose(model.peft_config["default"].lora_alpha, rank)  # so that no scale needs to be stored
    save_tensors(path, {f"transformer.{k}": v.half() for k, v in state.items()}, metadata)
