"""The loop lowers a loss with every optimiser, goes on from a checkpoint as if never stopped, keeps an average."""

import json
import os
import random
import subprocess
import sys
import types

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from atlasvid_cli import loop
from atlasvid_cli.errors import RenderError
from atlasvid_cli.loop import Run
from atlasvid_cli.optim import learning_rate
from atlasvid_cli.presets import Training

KINDS = {"muon": 0.02, "adamw": 0.02, "prodigy": 1.0}


@pytest.fixture(autouse=True)
def often(monkeypatch):
    for name in ("CHECKPOINT_STEPS", "VALIDATION_STEPS", "LOG_STEPS"):
        monkeypatch.setattr(loop, name, 10)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))


def loss_of(model):
    def loss_at(step: int, rng: random.Random, generator: torch.Generator) -> torch.Tensor:
        x = torch.randn(32, 6, generator=generator)
        return (model(x) - x[:, :3].sin()).square().mean()

    return loss_at


def held_out_loss(sample, rng, generator):
    return torch.tensor(0.5)


def fit(folder, training, steps=40, held_out=()):
    model = network()
    told = Run(folder, steps, KINDS[training.optimizer], training=training, held_out=held_out)
    loop.run(model, told, loss_of(model), held_out_loss)
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return model.state_dict(), rows


@pytest.mark.parametrize("kind", KINDS)
def test_each_lowers_the_loss(tmp_path, kind):
    _, rows = fit(tmp_path, Training(kind), steps=150)
    assert rows[-1]["loss"] < 0.6 * rows[0]["loss"]


@pytest.fixture
def board(monkeypatch):
    """What TensorBoard is told."""
    told = []

    class Writer:
        def __init__(self, folder, purge_step):
            told.append((folder, purge_step))

        def add_scalar(self, *scalar):
            told.append(scalar)

        def close(self):
            told.append("closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    return told


def test_tensorboard_gets_the_losses_where_it_is_installed(tmp_path, board):
    _, rows = fit(tmp_path, Training("adamw"), steps=20, held_out=[{}])
    losses = [(name, row[name], row["step"]) for row in rows for name in ("loss", "validation_loss")]
    assert board[0] == (str(tmp_path), 0) and board[-1] == "closed" and sorted(board[1:-1]) == sorted(losses)


def test_tensorboard_keeps_the_point_at_which_a_training_goes_on(tmp_path, board):
    """It hides those from the step that it is given on."""
    fit(tmp_path, Training("adamw"), steps=20)
    board.clear()
    _, rows = fit(tmp_path, Training("adamw"), steps=40)
    assert board[0] == (str(tmp_path), 21)
    assert board[1:-1] == [("loss", row["loss"], row["step"]) for row in rows if row["step"] > 20]


def test_tensorboard_is_closed_by_an_interruption_too(tmp_path, board):
    def stop(step):
        raise KeyboardInterrupt

    model = network()
    with pytest.raises(KeyboardInterrupt):
        loop.run(model, Run(tmp_path, 10, 0.02, show=stop), loss_of(model), held_out_loss)
    assert ("loss", 10) in [(told[0], told[2]) for told in board[1:-1]] and board[-1] == "closed"


@pytest.mark.parametrize("ema", [0.0, 0.9])
@pytest.mark.parametrize("kind", KINDS)
def test_each_goes_on_from_a_checkpoint_as_if_never_stopped(tmp_path, monkeypatch, kind, ema):
    whole, _ = fit(tmp_path / "whole", Training(kind, ema))
    count = 0

    def dies(*arguments):
        nonlocal count
        count += 1
        if count == 27:
            raise KeyboardInterrupt
        return learning_rate(*arguments)

    monkeypatch.setattr(loop, "learning_rate", dies)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "killed", Training(kind, ema))
    monkeypatch.setattr(loop, "learning_rate", learning_rate)
    resumed, _ = fit(tmp_path / "killed", Training(kind, ema))
    again, _ = fit(tmp_path / "killed", Training(kind, ema))  # finished: nothing more to do
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, atol=1e-6, rtol=0)
        assert torch.equal(again[name], resumed[name])


def test_the_average_of_the_weights_is_validated_and_kept(tmp_path):
    """Validation sees the average, training goes on from the weights themselves."""
    seen = []
    model = network()

    def validate(sample, rng, generator):
        seen.append(model[0].weight.detach().clone())
        return torch.tensor(1.0)

    told = Run(tmp_path / "a", 40, 0.02, training=Training("adamw", 0.9), held_out=[{}])
    loop.run(model, told, loss_of(model), validate)
    plain, _ = fit(tmp_path / "b", Training("adamw"))
    assert not torch.equal(seen[-1], plain["0.weight"])
    assert torch.equal(model[0].weight, seen[-1])
    saved = load_file(tmp_path / "a" / "checkpoint.safetensors")
    assert torch.equal(saved["model.0.weight"], plain["0.weight"])
    assert torch.equal(saved["average.0.weight"], seen[-1])


@pytest.mark.parametrize("bad, saved", [(14, "the weights of step 10 are in"), (4, "nothing is saved yet")])
def test_a_loss_that_is_not_finite_ends_it_with_what_was_good(tmp_path, bad, saved):
    model = network()
    good = loss_of(model)

    def loss_at(step, rng, generator):
        return good(step, rng, generator) * (float("nan") if step == bad else 1)

    with pytest.raises(RenderError, match=rf"step {bad + 1}; {saved}.*smaller --lr, with which training starts anew"):
        loop.run(model, Run(tmp_path, 40, 0.02), loss_at, held_out_loss)
    if bad < loop.CHECKPOINT_STEPS:
        return
    kept = load_file(tmp_path / "checkpoint.safetensors")
    assert kept and all(tensor.isfinite().all() for tensor in kept.values())


def test_an_error_in_showing_is_gone_on_from_after_it(tmp_path, monkeypatch):
    """At a step that is no checkpoint's own; another attempt would otherwise end there every time."""
    monkeypatch.setattr(loop, "SAMPLE_STEPS", 15)
    whole, _ = fit(tmp_path / "whole", Training())

    def fails(step):
        raise RuntimeError(f"at {step}")

    model, shown = network(), []
    with pytest.raises(RuntimeError, match="at 15"):
        loop.run(model, Run(tmp_path, 40, 0.02, show=fails), loss_of(model), held_out_loss)
    model = network()
    loop.run(model, Run(tmp_path, 40, 0.02, show=shown.append), loss_of(model), held_out_loss)
    assert shown == [30, 40]
    for name, value in whole.items():
        torch.testing.assert_close(model.state_dict()[name], value, atol=1e-6, rtol=0)


def test_validation_is_at_the_same_noise_each_time():
    draws = []
    samples = [{}] * 6
    validate = loop.validation(samples, lambda s, rng, g: draws.append(torch.rand(2, generator=g)) or draws[-1].mean())
    assert validate() == validate()
    assert all(torch.equal(a, b) for a, b in zip(draws[:6], draws[6:], strict=True))
    assert not torch.equal(draws[0], draws[1])
    assert loop.validation([], None)() is None


def test_a_log_whose_last_line_was_cut_short_is_gone_on_with(tmp_path):
    fit(tmp_path, Training())
    log = tmp_path / "log.jsonl"
    whole = log.read_text()
    log.write_text(whole + '{"step": 50, "lo')
    fit(tmp_path, Training())
    assert log.read_text() == whole


def test_a_slow_training_is_saved_by_the_clock(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "CHECKPOINT_STEPS", 1000)
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0)
    steps = []
    monkeypatch.setattr(loop, "save_checkpoint", lambda folder, model, optimizer, step, *rest: steps.append(step))
    fit(tmp_path, Training(), steps=3)
    assert steps == [1, 2, 3]


def test_processes_share_the_draws_of_a_step_and_end_with_the_same_weights(tmp_path):
    """Four draws by one process, and by two that `accelerate launch` would start alike."""
    script = tmp_path / "fit.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom atlasvid_cli import loop\n"
        "from tests.test_loop import held_out_loss, loss_of, network\n"
        "model = network()\n"
        "loop.run(model, loop.Run(Path(sys.argv[1]), 25, 0.02, accumulate=4), loss_of(model), held_out_loss)\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    for count in (1, 2):
        command = [*launch, str(count), str(script), str(tmp_path / str(count))]
        subprocess.run(command, env=environment, check=True, capture_output=True, timeout=300)
    one, two = (load_file(tmp_path / count / "checkpoint.safetensors") for count in ("1", "2"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=1e-5, rtol=0)
    logs = [[json.loads(x)["loss"] for x in (tmp_path / n / "log.jsonl").read_text().splitlines()] for n in "12"]
    assert logs[0] == pytest.approx(logs[1], abs=1e-5) and len(logs[0]) == 1
