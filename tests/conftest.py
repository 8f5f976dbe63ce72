"""Small seeded models that have the classes and the layout of the real ones."""

import pytest
import torch
from diffusers import WanTransformer3DModel


@pytest.fixture(scope="session")
def transformer() -> WanTransformer3DModel:
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=96,
        num_layers=3,
    )
    return model.eval().requires_grad_(False)


@pytest.fixture
def prompt() -> torch.Tensor:
    """A prompt's embedding (tokens, text_dim), without padding."""
    return torch.randn(7, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def padded(prompt: torch.Tensor) -> torch.Tensor:
    """The same as WanPipeline pads it: (1, 512, text_dim)."""
    return torch.cat((prompt, torch.zeros(512 - len(prompt), 16)))[None]
