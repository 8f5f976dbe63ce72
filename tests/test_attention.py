"""Attention by products, bf16's own way on a CPU, equals PyTorch's in fp32."""

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import AttentionBackendName

from atlasvid_cli import attention
from atlasvid_cli.attention import attend, check_backend
from atlasvid_cli.errors import UsageError


def reference(q, k, v, bias=None):
    q, k, v = (x.float().transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2)


@pytest.fixture
def qkv():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(5, length, 3, 16, generator=generator).bfloat16() for length in (40, 60, 60)]


@pytest.mark.parametrize("rows", [1, 2, 5, 100])
def test_products_equal_pytorch_however_many_rows_at_a_time(qkv, monkeypatch, rows):
    monkeypatch.setattr(attention, "SCORES", rows * 3 * 40 * 60)
    monkeypatch.setattr(attention, "dispatch_attention_fn", None)  # not asked
    out = attend(*qkv)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), reference(*qkv), atol=0.02, rtol=0)


def test_more_scores_than_may_be_held_go_to_the_kernel(qkv, monkeypatch):
    monkeypatch.setattr(attention, "SCORES", 3 * 40 * 60 - 1)
    monkeypatch.setattr(attention, "_products", None)
    torch.testing.assert_close(attend(*qkv).float(), reference(*qkv), atol=0.02, rtol=0)


def test_a_named_backend_is_the_one_that_runs(qkv, monkeypatch):
    monkeypatch.setattr(attention, "_products", None)
    torch.testing.assert_close(attend(*qkv, backend="native").float(), reference(*qkv), atol=0.02, rtol=0)


def test_a_backend_is_tried_before_anything_loads(monkeypatch):
    """Also one that diffusers finds nothing missing for, and whose kernel is on the hub."""
    cpu = torch.device("cpu")
    check_backend("native", cpu, torch.bfloat16)
    with pytest.raises(UsageError, match=r"choose one of .*_flash_3_hub"):
        check_backend("nope", cpu, torch.float32)
    with pytest.raises(UsageError, match="'_native_cudnn' cannot run here"):
        check_backend("_native_cudnn", cpu, torch.float32)
    fetched = []
    monkeypatch.setattr(attention, "_check_attention_backend_requirements", lambda backend: None)
    monkeypatch.setattr(attention, "_maybe_download_kernel_for_backend", fetched.append)
    monkeypatch.setattr(attention, "dispatch_attention_fn", lambda q, k, v, backend: q)
    check_backend("_flash_3_hub", cpu, torch.bfloat16)
    assert fetched == ["_flash_3_hub"]


@pytest.mark.parametrize("prompts", [1, 5])
def test_a_bias_hides_keys(qkv, prompts):
    """One prompt for all rows, or one each."""
    q, k, v = qkv
    bias = torch.zeros(prompts, 1, 1, 60)
    bias[..., 50:] = -torch.inf
    k, v = k[:prompts], v[:prompts]
    if prompts == 1:
        q = q.flatten(0, 1)[None]
    out = attend(q, k, v, bias.bfloat16())
    torch.testing.assert_close(out.float(), reference(q, k[:, :50], v[:, :50]), atol=0.02, rtol=0)
    assert (out.float() - reference(q, k, v)).abs().max() > 0.05


@pytest.mark.gpu
@pytest.mark.parametrize("name", [b.value for b in AttentionBackendName])
def test_every_backend_that_runs_on_a_gpu_equals_fp32(name):
    device, dtype = torch.device("cuda"), torch.bfloat16
    try:
        check_backend(name, device, dtype)
    except UsageError as error:
        pytest.skip(str(error))
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, length, 3, 128, generator=generator).bfloat16() for length in (320, 448, 448))
    out = attend(*(x.to(device) for x in (q, k, v)), backend=name).float().cpu()
    expected = reference(q, k, v)
    quantized = "sage" in name  # int8 products
    assert (out - expected).norm() / expected.norm() < (0.06 if quantized else 0.01)
