"""Linear layers and norms equal PyTorch's modules, whichever way they are computed."""

import copy

import pytest
import torch
from diffusers.models.attention import FeedForward

from atlasvid_cli import layers

DTYPES = [torch.float32, torch.bfloat16]
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.fixture
def fused(monkeypatch):
    """Calls of oneDNN's kernel."""
    calls = []
    kernel = layers._FUSED
    if kernel is None:
        pytest.skip("this PyTorch has no oneDNN")
    monkeypatch.setattr(layers, "_FUSED", lambda x, *rest: calls.append(x.shape) or kernel(x, *rest))
    return calls


def feed_forward():
    torch.manual_seed(0)
    return FeedForward(24, inner_dim=56, activation_fn="gelu-approximate")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_is_one_kernel_on_a_cpu(fused, dtype, bias):
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(24, 40, bias=bias).to(dtype), torch.randn(3, 5, 24, dtype=dtype)
    with torch.no_grad():
        assert layers.linear(layer, x).shape == (3, 5, 40)
        torch.testing.assert_close(layers.linear(layer, x), layer(x), atol=ROUNDING[dtype], rtol=ROUNDING[dtype])
    assert len(fused) == 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_so_is_a_gelu_with_the_product_before_it(fused, dtype):
    ffn, x = feed_forward().to(dtype), torch.randn(3, 5, 24, dtype=dtype)
    with torch.no_grad():
        made = layers.feed_forward(ffn, x)
        torch.testing.assert_close(made, ffn(x), atol=ROUNDING[dtype], rtol=ROUNDING[dtype])
    assert len(fused) == 2


def test_another_activation_is_left_to_its_module(fused):
    torch.manual_seed(0)
    for name in ("gelu", "geglu"):
        ffn, x = FeedForward(24, inner_dim=56, activation_fn=name), torch.randn(5, 24)
        with torch.no_grad():
            assert torch.equal(layers.feed_forward(ffn, x), ffn(x))
    assert not fused


def test_what_learns_has_gradients(fused):
    ffn, norm, x = feed_forward(), torch.nn.RMSNorm(24, eps=1e-6), torch.randn(5, 24)
    other, other_norm = copy.deepcopy(ffn), copy.deepcopy(norm)
    layers.feed_forward(ffn, layers.root_mean_square(norm, x)).square().sum().backward()
    other(other_norm(x)).square().sum().backward()
    for mine, theirs in zip([*ffn.parameters(), norm.weight], [*other.parameters(), other_norm.weight], strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
    assert not fused


def test_layers_that_are_more_than_a_product_are_called(fused):
    class Adapted(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    class Packed(torch.nn.Parameter):
        pass

    torch.manual_seed(0)
    x, quantised = torch.randn(5, 24), torch.nn.Linear(24, 40)
    quantised.weight = Packed(quantised.weight.detach())
    with torch.no_grad():
        for layer in (Adapted(24, 40), quantised):
            assert torch.equal(layers.linear(layer, x), layer(x))
        layer = torch.nn.Linear(24, 40)
        with torch.autocast("cpu", torch.bfloat16):
            assert layers.linear(layer, x).dtype == torch.bfloat16
        assert layers.linear(layer.double(), x.double()).dtype == torch.float64
    assert not fused


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_the_root_mean_square_is_taken_as_the_module_does(dtype):
    torch.manual_seed(0)
    norm, x = torch.nn.RMSNorm(24, eps=1e-6).to(dtype), torch.randn(3, 5, 24, dtype=dtype)
    norm.weight.data.normal_()
    x[0] = 0  # the epsilon keeps it finite
    x[1] *= 1e-3
    x[2] *= 1e4
    kept = x.clone()
    with torch.no_grad():
        torch.testing.assert_close(layers.root_mean_square(norm, x), norm(x), rtol=ROUNDING.get(dtype, 1e-9), atol=1e-6)
    assert torch.equal(x, kept)


@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_layers_are_one_graph(fused, dtype):
    """What is asked of oneDNN cannot be compiled, and the compiler fuses by itself."""
    ffn, norm, x = feed_forward().to(dtype), torch.nn.RMSNorm(24, eps=1e-6).to(dtype), torch.randn(5, 24, dtype=dtype)

    def both(x):
        return layers.feed_forward(ffn, layers.root_mean_square(norm, layers.linear(ffn.net[0].proj, x)[..., :24]))

    torch._dynamo.reset()
    with torch.no_grad():
        made = torch.compile(both, backend="eager", fullgraph=True)(x)
        assert not fused
        torch.testing.assert_close(made, both(x), atol=ROUNDING[dtype], rtol=ROUNDING[dtype])
