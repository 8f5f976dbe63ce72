"""Where weights live must not change what is computed. Copies to another device need one: `pytest -m gpu`."""

import copy
from fractions import Fraction
from threading import Event

import pytest
import torch

from atlasvid_cli import streams
from atlasvid_cli.model import text_context
from atlasvid_cli.offload import Transfers, narrow, on_device, place, stored
from atlasvid_cli.presets import window_cycle
from atlasvid_cli.shapes import Grid
from atlasvid_cli.streams import Alignment, ProxyStream, detail_forward, proxy_context

GRID, LAYOUTS = Grid(3, 6, 7), window_cycle([(3, 4, 4), (2, 3, 7)])


def test_blocks_that_are_there_already_are_not_moved(transformer):
    before = [p.data_ptr() for p in transformer.parameters()]
    seen = list(on_device(transformer.blocks, torch.device("cpu")))
    assert [id(b) for b in seen] == [id(b) for b in transformer.blocks]
    assert [p.data_ptr() for p in transformer.parameters()] == before


def addresses(module):
    return [part.data_ptr() for p in module.parameters() for part in stored(p)]


@pytest.mark.parametrize("kept", ["auto", "int8"])
def test_blocks_come_to_the_device_for_their_turn_and_return(kept, transformer, monkeypatch):
    """A second CPU device stands for a GPU: torch tells `cpu` from `cpu:0`."""
    model = narrow(type(transformer).from_config(transformer.config), kept)
    home = addresses(model.blocks)
    moved = []
    copy = torch.Tensor.to

    def to(tensor, device, **options):
        moved.append(device)
        with monkeypatch.context() as inside:  # a quantized weight moves its parts
            inside.setattr(torch.Tensor, "to", copy)
            return copy(tensor, device, **options).clone()

    monkeypatch.setattr(torch.Tensor, "to", to)
    for i, block in enumerate(on_device(model.blocks, torch.device("cpu:0"))):
        there = addresses(block)
        assert not set(there) & set(home)
        others = [a for j, b in enumerate(model.blocks) if j != i for a in addresses(b)]
        assert set(others) < set(home)
    assert addresses(model.blocks) == home
    assert len(moved) == len(list(model.blocks.parameters()))  # each weight once a forward


@torch.no_grad()
def forward(model, prompt, states=None):
    """A detail forward above a proxy, both with their states on `states`."""
    generator = torch.Generator().manual_seed(4)
    below = Grid(3, 3, 4)
    tokens, guide = (torch.randn(grid.tokens, 16, generator=generator) for grid in (GRID, below))
    text = text_context(model, [prompt], 512)
    context = proxy_context(model, guide, below, text, Alignment(Fraction(2), 1, (0, 1, 1), (2, 2, 3)), states=states)
    return detail_forward(model, tokens, GRID, 500, text, context, LAYOUTS, 2, states=states)


def test_states_that_live_elsewhere_are_computed_as_here(transformer, prompt):
    expected = forward(transformer, prompt)
    torch.testing.assert_close(forward(transformer, prompt, torch.device("cpu:0")), expected, atol=0, rtol=0)


@torch.no_grad()
def test_a_proxy_stream_beside_the_detail_gives_its_weights_back(transformer, prompt, monkeypatch):
    """Each prompt has one, of one model, whose blocks come to the device at every forward."""
    monkeypatch.setattr(streams, "device_of", lambda model: torch.device("cpu:0"))
    generator, below = torch.Generator().manual_seed(4), Grid(3, 3, 4)
    tokens, guide = (torch.randn(grid.tokens, 16, generator=generator) for grid in (GRID, below))
    text, alignment = text_context(transformer, [prompt], 512), Alignment(Fraction(2), 1, (0, 1, 1), (2, 2, 3))
    model = copy.deepcopy(transformer)
    parameters = list(map(id, model.blocks.parameters()))
    beside = [ProxyStream(model, guide, below, text, alignment) for _ in range(2)]
    seen = [detail_forward(transformer, tokens, GRID, 500, text, each, LAYOUTS, 2) for each in beside * 2]
    assert list(map(id, model.blocks.parameters())) == parameters
    expected = forward(transformer, prompt)
    for each in seen:
        torch.testing.assert_close(each, expected, atol=0, rtol=0)


def test_the_next_chunk_comes_while_one_computes():
    transfers = Transfers(torch.device("cpu:0"), torch.device("cpu"))
    table, asked = torch.zeros(8, 2), [Event() for _ in range(6)]

    def fetch(i):
        asked[i].set()
        index = torch.tensor([[i, i + 4]])
        return index, transfers.rows(table, index)

    with transfers.begun():
        for i, (index, rows) in enumerate(transfers.ahead(range(4), fetch)):
            assert i == 3 or asked[i + 1].wait(10)
            assert not asked[i + 2].is_set()  # no more than one
            transfers.put(index, (table, rows + i + 1))
    assert table[:, 0].tolist() == [1, 2, 3, 4, 1, 2, 3, 4]


def test_a_failure_to_fetch_is_the_callers():
    transfers = Transfers(torch.device("cpu:0"), torch.device("cpu"))
    with pytest.raises(IndexError), transfers.begun():
        list(transfers.ahead([7], lambda i: transfers.rows(torch.zeros(2, 2), torch.tensor([[i]]))))


@pytest.mark.gpu
@pytest.mark.parametrize("offload", ["none", "block", "host"])
@pytest.mark.parametrize("kept", ["auto", "int8"])
def test_offload_computes_the_same_on_a_gpu(transformer, prompt, offload, kept):
    model = type(transformer).from_config(transformer.config)
    model.load_state_dict(transformer.state_dict())
    narrow(model, kept)
    expected = forward(model, prompt)
    place(model.eval().requires_grad_(False), torch.device("cuda"), offload)
    out = forward(model, prompt, torch.device("cpu") if offload == "host" else None)
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=0)
