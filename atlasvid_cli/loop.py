"""The loop of training: draws, gradients side by side, steps, logs, checkpoints.

Every draw takes its samples, noise and sigmas from (seed, step, its number) alone, so a run resumed from a checkpoint
goes on as if it had never stopped, and draws may be shared among processes, as `accelerate launch` starts them.
"""

import json
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from diffusers import WanTransformer3DModel
from diffusers.training_utils import EMAModel

from .checkpoint import load_checkpoint, save_checkpoint
from .errors import RenderError
from .machine import cpu_autocast
from .optim import Optimizer, learning_rate
from .presets import Training
from .store import atomic
from .tensor_file import read_header

CHECKPOINT_SECONDS = 600
CHECKPOINT_STEPS, SAMPLE_STEPS, VALIDATION_STEPS, LOG_STEPS = 200, 500, 100, 25

HEADS = ("patch_embedding", "condition_embedder", "proj_out", "scale_shift_table")  # matrices that Muon leaves

HeldOutLoss = Callable[[dict, random.Random, torch.Generator], torch.Tensor]


@dataclass(frozen=True)
class Run:
    """Where a training lies, how long it is, and who watches.

    Checkpoint, log and events are in `folder`. `lr` is the peak of the rate over all `steps`, each of `accumulate`
    draws from `seed`. `held_out` samples are validated with. `on_step` gets the steps newly known to be done, with
    `before=True` those of an earlier run; `show(step)` is called now and then, to sample.
    """

    folder: Path
    steps: int
    lr: float
    seed: int = 0
    accumulate: int = 1
    training: Training = field(default_factory=Training)
    held_out: Sequence[dict] = ()
    on_step: Callable[..., None] = lambda done, before=False: None
    show: Callable[[int], None] = lambda step: None


def all_processes() -> PartialState:
    """This process among those that accelerate or torchrun started together, or alone.

    The others wait for the first one for as long as it encodes the data or samples what it has learnt.
    """
    return PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=7))


def run(
    model: WanTransformer3DModel,
    told: Run,
    loss_at: Callable[[int, random.Random, torch.Generator], torch.Tensor],
    held_out_loss: HeldOutLoss,
) -> None:
    """The loop: the mean of `loss_at(step, rng, generator)` over the draws of a step; logs and checkpoints, and losses
    for TensorBoard where it is installed. `RenderError` where a loss is not finite.

    On a CPU the draws of a step run side by side, a thread each: small models keep more cores busy so than by splitting
    every product over all of them. Several processes share the draws, which are as many more as leave none idle, and
    the first one logs, validates and saves. Where `told.training` asks for an average of the weights, that is
    validated, shown, and what the model ends with.
    """
    processes, folder, steps = all_processes(), told.folder, told.steps
    draws = -(-told.accumulate // processes.num_processes) * processes.num_processes
    mine = range(processes.process_index, draws, processes.num_processes)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    trained = [p for _, p in named]
    threads, on_cpu = torch.get_num_threads(), trained[0].device.type == "cpu"
    workers = min(len(mine), threads) if on_cpu else 1
    validate = validation(told.held_out, held_out_loss)
    optimizer = Optimizer(named, told.lr, HEADS, told.training.optimizer)
    average = EMAModel(trained, decay=told.training.ema) if told.training.ema else None
    step, recent = load_checkpoint(folder, model, optimizer, average)

    def gradients(draw: str) -> tuple[float, tuple[torch.Tensor | None, ...]]:
        rng = random.Random(draw)
        generator = torch.Generator().manual_seed(rng.getrandbits(60))
        with cpu_autocast(on_cpu):
            loss = loss_at(step, rng, generator) / draws
        return loss.item(), torch.autograd.grad(loss, trained, allow_unused=True)

    processes.wait_for_everyone()  # who is ahead must not save what another has yet to read
    told.on_step(step, before=True)
    started = saved = time.monotonic()
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads // workers,))
    with _log(folder, step) if processes.is_main_process else nullcontext(lambda row: None) as log, pool:
        while step < steps:
            total = 0.0
            for loss, grads in pool.map(gradients, [f"{told.seed}/{step}/{part}" for part in mine]):
                total += loss
                _add(trained, grads)
            if processes.num_processes > 1:
                total = _summed(trained, total)
            norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
            if not math.isfinite(total + norm.item()):
                raise RenderError(
                    f"the loss or its gradient is not finite at step {step + 1}; {_saved(folder)}: give a smaller --lr,"
                    " with which training starts anew"
                )
            optimizer.step(learning_rate(step, steps, told.lr))
            if average:
                average.step(trained)
            step += 1
            told.on_step(1)
            if not processes.is_main_process:
                continue
            recent.append(total)
            if step % LOG_STEPS == 0 or step == steps:
                row = {"step": step, "loss": round(sum(recent) / len(recent), 5)}
                recent.clear()
                if step % VALIDATION_STEPS == 0 or step == steps:
                    with _averaged(trained, average), cpu_autocast(on_cpu):
                        held_out = validate()
                    row |= {} if held_out is None else {"validation_loss": round(held_out, 5)}
                log(row | {"seconds": round(time.monotonic() - started, 1)})
            due = time.monotonic() - saved > CHECKPOINT_SECONDS
            shown = step % SAMPLE_STEPS == 0 or step == steps
            if step % CHECKPOINT_STEPS == 0 or shown or due:  # first: who dies of showing would die there every time
                save_checkpoint(folder, model, optimizer, step, average, recent)
                saved = time.monotonic()
            if shown:
                with _averaged(trained, average), cpu_autocast(on_cpu):
                    told.show(step)
    if average:
        average.copy_to(trained)


def _add(trained: list[torch.nn.Parameter], grads: Sequence[torch.Tensor | None]) -> None:
    for p, grad in zip(trained, grads, strict=True):
        if grad is not None:
            p.grad = grad if p.grad is None else p.grad.add_(grad)


@contextmanager
def _averaged(trained: list[torch.nn.Parameter], average: EMAModel | None) -> Iterator[None]:
    """The model with the average of its weights, where there is one."""
    if not average:
        yield
        return
    average.store(trained)
    average.copy_to(trained)
    try:
        yield
    finally:
        average.restore(trained)


@contextmanager
def _log(folder: Path, step: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Gives what appends a row to log.jsonl and its losses to TensorBoard, which go on after `step`."""
    path, board = folder / "log.jsonl", _board(folder, step)
    cut_log(path, step)

    def append(row: dict[str, Any]) -> None:
        with path.open("a") as log:
            log.write(json.dumps(row) + "\n")
        for name in row.keys() & {"loss", "validation_loss"} if board else ():
            board.add_scalar(name, row[name], row["step"])

    with closing(board) if board else nullcontext():
        yield append


def _saved(folder: Path) -> str:
    """Which step a training goes on from: as its file says, since of several processes only the first one saves."""
    path = folder / "checkpoint.safetensors"
    if not path.exists():
        return "nothing is saved yet"
    return f"the weights of step {read_header(path)[0]['step']} are in {folder}"


def _board(folder: Path, step: int) -> Any:
    """TensorBoard's writer of losses after `step` into `folder`, or None where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    # TensorBoard hides the points from this step on: those that will be written again, not the last that is kept
    return SummaryWriter(str(folder), purge_step=step + 1 if step else 0)


def _summed(trained: list[torch.nn.Parameter], loss: float) -> float:
    """Adds up all processes' gradients, in one message, and losses."""
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    flat = torch.cat([*(g.flatten().float() for g in grads), torch.tensor([loss], device=grads[0].device)])
    flat = reduce(flat, "sum")
    for p, part in zip(trained, flat[:-1].split([p.numel() for p in trained]), strict=True):
        p.grad = part.view_as(p).to(p.dtype)
    return flat[-1].item()


def cut_log(path: Path, step: int) -> None:
    """Drops what an interrupted run logged after its last checkpoint, and will log again, and a line cut short."""
    if path.exists():
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            with suppress(ValueError, KeyError, TypeError):
                kept += [line] if json.loads(line)["step"] <= step else []
        with atomic(path) as file:
            file.writelines(f"{line}\n".encode() for line in kept)


def validation(held_out: Sequence[dict], loss_of: HeldOutLoss) -> Callable[[], float | None]:
    """The mean loss of held-out samples, each at noise and a sigma that are its own and never change; None of none."""

    @torch.no_grad()
    def validate() -> float | None:
        losses = []
        for i, sample in enumerate(held_out):
            rng = random.Random(f"held out/{i}")
            losses.append(loss_of(sample, rng, torch.Generator().manual_seed(rng.getrandbits(60))).item())
        return sum(losses) / len(losses) if losses else None

    return validate
