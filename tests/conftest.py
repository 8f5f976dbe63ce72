"""Small seeded models that have the classes and the layout of the real ones."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from hypothesis import settings
from transformers import UMT5Config, UMT5EncoderModel

from atlasvid_cli.causal import hold_still, make_idle
from atlasvid_cli.console import Console
from atlasvid_cli.half import HalfEncoder
from atlasvid_cli.presets import load_preset, presets_folder
from atlasvid_cli.tensor_file import save_tensors
from atlasvid_cli.train import lora_config, save_adapter
from atlasvid_cli.train_text import build_tokenizer
from atlasvid_cli.weights import model_hash

settings.register_profile("atlasvid", deadline=None)  # a busy machine is no failure
settings.load_profile("atlasvid")


def pytest_configure(config: pytest.Config) -> None:
    """On a machine with a GPU too, all but `pytest -m gpu` runs on the CPU. Workers share the cores."""
    if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
        threads = max(1, (os.cpu_count() or 1) // workers)
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)  # of the commands that tests run
    if "not gpu" in config.option.markexpr or "gpu" not in config.option.markexpr:
        torch.cuda.is_available = lambda: False


@pytest.fixture
def console() -> Console:
    return Console(interactive=False)


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """A clock that only work moves: `ticks(n)` lets n seconds pass."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def tick(seconds: float) -> None:
        now[0] += seconds

    return tick


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the test run's own."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["ATLASVID_CACHE"] = str(folder)
    return folder


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


def small_pipeline(vae: AutoencoderKLWan) -> WanPipeline:
    """Random weights around `vae`, in the classes of the real ones."""
    tokenizer = build_tokenizer()
    encoder = UMT5EncoderModel(
        UMT5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )
    config = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 16}
    model = WanTransformer3DModel(**config, freq_dim=16, ffn_dim=32, num_layers=2)
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return WanPipeline(tokenizer, encoder, vae, scheduler, model)


@pytest.fixture(scope="session")
def random_preset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A preset file beside a model folder with random weights and adapters: everything of `tiny` but its size."""
    root = tmp_path_factory.mktemp("preset")
    folder = root / "random"
    torch.manual_seed(7)
    vae = AutoencoderKLWan(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        is_residual=True,
        in_channels=48,
        out_channels=48,
        patch_size=4,
        scale_factor_temporal=4,
        scale_factor_spatial=16,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    hold_still(vae, load_preset("tiny").vae.still)
    make_idle(vae, load_preset("tiny").vae.idle)
    pipe = small_pipeline(vae)
    pipe.save_pretrained(folder)
    model = pipe.transformer
    for stage in ("proxy", "detail"):
        model.add_adapter(lora_config(2))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        save_adapter(model, folder / f"{stage}_lora.safetensors", {})
        model.delete_adapters("default")
    entry = {name: p.detach().half() for name, p in HalfEncoder(vae.encoder).own().items()}
    metadata = {"stage": "entry", "base": model_hash(folder, "vae")}
    save_tensors(folder / str(load_preset("tiny").detail.upper.entry), entry, metadata)
    text = (presets_folder() / "tiny.toml").read_text()
    for old, new in (
        ('model = "tiny"', 'model = "random"'),
        ("dim = 192", "dim = 24"),
        ("ffn = 768", "ffn = 32"),
        ("layers = 6", "layers = 2"),
        ("heads = 3", "heads = 2"),
        ("channels = 16", "channels = 4"),
        ("text_dim = 128", "text_dim = 16"),
        ("base_dim = 32", "base_dim = 8"),
        ("z_dim = 16", "z_dim = 4"),
        ("dim_mult = [1, 2, 2]", "dim_mult = [1, 1, 1]"),
        ("base_tokens = 84", "base_tokens = 6"),
        ("steps = 20", "steps = 3"),
        ("[[7, 8, 8], [13, 6, 6]]", "[[2, 3, 3], [3, 2, 2]]"),
    ):
        assert old in text, old
        text = text.replace(old, new)
    path = root / "random.toml"
    path.write_text(text)
    return path


@pytest.fixture(scope="session")
def stock_preset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stock weights in the layout of Wan2.1's (its VAE's structure, sharded, no adapters), seen training-free."""
    root = tmp_path_factory.mktemp("stock")
    torch.manual_seed(8)
    vae = AutoencoderKLWan(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1] * 4,
        latents_std=[1.2] * 4,
    )
    small_pipeline(vae).save_pretrained(root / "stock", max_shard_size="20KB")
    text = (presets_folder() / "wan2.1-1.3b.toml").read_text()
    for old, new in (
        ('model = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"', 'model = "stock"'),
        ("dim = 1536", "dim = 24"),
        ("ffn = 8960", "ffn = 32"),
        ("layers = 30", "layers = 2"),
        ("heads = 12", "heads = 2"),
        ("channels = 16", "channels = 4"),
        ("text_dim = 4096", "text_dim = 16"),
        ("base_dim = 96", "base_dim = 8"),
        ("z_dim = 16", "z_dim = 4"),
        ("dim_mult = [1, 2, 4, 4]", "dim_mult = [1, 1, 1, 1]"),
        ("num_res_blocks = 2", "num_res_blocks = 1"),
        ("base_tokens = 1560", "base_tokens = 12"),
        ("steps = 50", "steps = 2"),
        ("steps = 35", "steps = 2"),
        ("windows = [[21, 30, 52]]", "windows = [[3, 3, 4]]"),
    ):
        assert old in text, old
        text = text.replace(old, new)
    path = root / "stock.toml"
    path.write_text(text)
    return path


@pytest.fixture
def stock(stock_preset: Path, tmp_path: Path) -> Path:
    """A copy of the stock preset's folder that a test may damage."""
    return shutil.copytree(stock_preset.with_suffix(""), tmp_path / "model")


@pytest.fixture(scope="session")
def experts_preset(stock_preset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stock weights with a second expert, other weights of the same sizes, as Wan2.2 A14B has."""
    root = tmp_path_factory.mktemp("experts")
    shutil.copytree(stock_preset.parent / "stock", root / "stock")
    second = WanTransformer3DModel.from_pretrained(root / "stock" / "transformer")
    for parameter in second.parameters():
        parameter.data.mul_(0.5)
    second.save_pretrained(root / "stock" / "transformer_2")
    text = stock_preset.read_text().replace("strength = 0.95", "strength = 0.875")
    path = root / "experts.toml"
    path.write_text(text + "\n[experts]\nboundary = 0.9\nguidance_scale = 3.0\n")
    return path
