"""The command that trains."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options as opt
from .errors import UsageError
from .parse import check_finite
from .targets import check_writable

if TYPE_CHECKING:
    from .console import Console


def train(
    what: Annotated[str, typer.Argument(help="tiny: the embedded model, from nothing; proxy or detail: an adapter.")],
    data: opt.Data = None,
    preset: opt.TrainedPreset = None,
    model_path: opt.ModelPath = None,
    work: Annotated[Path, typer.Option("--work", help="Checkpoints, latents, logs; resumed from.")] = Path("training"),
    output: opt.Trained = None,
    steps: opt.TrainSteps = None,
    lr: opt.Rate = None,
    rank: opt.Rank = None,
    seed: opt.TrainSeed = None,
    expert: opt.TrainedExpert = None,
    debug: opt.Debug = False,
) -> None:
    """Train an adapter for a stage on captioned clips, or the embedded model itself; the same command resumes.

    An adapter on several GPUs: accelerate launch -m atlasvid_cli train ...
    """
    from .console import Console

    check_finite("--lr", lr, 0)
    given = {"data": data, "steps": steps, "lr": lr, "rank": rank, "seed": seed, "expert": expert}
    given |= {"preset": preset, "model-path": model_path}
    console = Console(quiet=os.environ.get("RANK", "0") != "0")  # as accelerate and torchrun number processes
    console.emit({}, str(train_part(what, work, output, given, console)))


def train_part(what: str, work: Path, output: Path | None, given: dict[str, Any], console: "Console") -> Path:
    """Trains `tiny`, or the adapter of stage `proxy` or `detail` with what is `given` of its options; where it lies."""
    if what not in ("tiny", "proxy", "detail"):
        raise UsageError(
            f"there is no training called {what!r}; choose tiny, proxy or detail, as in atlasvid train tiny"
        )
    given = {name: value for name, value in given.items() if value is not None}
    if what == "tiny":
        if given:
            raise UsageError(f"train tiny has a recipe of its own; leave --{next(iter(given))} out")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UsageError("train tiny is one process's work; run it without accelerate launch")
        from . import train_tiny
        from .store import lock

        output = output or work / "tiny"
        for folder in (work, output):
            check_writable(folder.absolute() / "log.jsonl", "--work" if folder is work else "--output")
        with lock(work):
            train_tiny.make(work, output, console)
        return output
    if given.get("expert", "low") not in ("high", "low"):
        raise UsageError(f"--expert {given['expert']!r} is none; give high or low")
    if "data" not in given:
        raise UsageError(f"train {what} needs clips: give --data, a folder of clip.mp4 + clip.txt")
    from . import train_adapter
    from .presets import load_preset
    from .train_job import Job, check, check_files

    preset, model_path = given.pop("preset", "tiny"), given.pop("model-path", None)
    of_expert = f"_{given['expert']}" if "expert" in given else ""
    target = (output or Path(f"{what}{of_expert}_lora.safetensors")).absolute()
    job = Job(what, output=target, work=work, **given)
    loaded = load_preset(preset)
    check(loaded, job)  # before weights are fetched
    check_files(loaded, job, model_path)
    check_writable(target)
    check_writable(work.absolute() / "log.jsonl", "--work")
    from .session import Session

    return train_adapter.make(Session(preset, model_path), job, console)
