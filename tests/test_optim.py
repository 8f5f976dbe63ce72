"""Which optimiser takes what, what is not installed, and the orthogonalisation of Muon."""

import sys

import pytest
import torch
from torch import nn

from atlasvid_cli.errors import UsageError
from atlasvid_cli.optim import Optimizer, orthogonalise


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))


def test_muon_leaves_vectors_and_what_is_named_to_adamw():
    named = list(network().named_parameters())
    sizes = [[len(g["params"]) for g in part.param_groups] for part in Optimizer(named, 0.1, ("2.",)).parts]
    assert sizes == [[1], [3]]
    assert len(Optimizer(named, 0.1, kind="adamw").parts) == 1


def test_what_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "prodigyopt", None)
    with pytest.raises(UsageError, match="pip install prodigyopt"):
        Optimizer(network().named_parameters(), 1.0, kind="prodigy")


def test_orthogonalise_flattens_the_singular_values():
    matrices = torch.randn(3, 20, 8, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(matrices))
    assert values.min() > 0.6 and values.max() < 1.3
