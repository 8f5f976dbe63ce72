"""Preset files are read strictly, and say what blocks cycle through."""

from dataclasses import asdict

import pytest
import torch
from diffusers import AutoencoderKLWan

from atlasvid_cli.errors import UsageError
from atlasvid_cli.presets import load_preset, preset_names, presets_folder, window_cycle


@pytest.fixture
def changed(tmp_path):
    """tiny.toml with one line in place of another, or after it."""

    def load(line, other):
        text = (presets_folder() / "tiny.toml").read_text(encoding="utf-8")
        assert text.count(line) == 1
        path = tmp_path / "mine.toml"
        path.write_text(text.replace(line, other), encoding="utf-8")
        return load_preset(str(path))

    return load


def test_windows_cycle_each_plain_then_shifted():
    a, b = (3, 4, 4), (5, 2, 2)
    assert window_cycle([a, b]) == ((a, False), (a, True), (b, False), (b, True))
    assert window_cycle([a, b], shifted=False) == ((a, False), (b, False))


def test_parts_of_the_method_are_in_place_unless_a_preset_leaves_them_out(changed):
    detail = load_preset("tiny").detail
    assert detail.shifted and detail.scaled_positions and detail.clean_proxy
    unshifted = changed("[detail]\n", "[detail]\nshifted = false\n").detail
    assert unshifted.layouts == window_cycle(detail.windows, shifted=False)


def test_without_an_adapter_there_may_be_no_autoguidance(changed):
    lines = "autoguidance = 0.5            # and away from the base", "autoguidance = 0 #"
    assert changed(*lines).proxy.autoguidance == 0
    assert load_preset("wan2.1-1.3b").proxy.autoguidance == 0


def test_an_interval_of_guidance_may_begin_at_zero(changed):
    first = changed("[detail.first] ", "[detail.first]\nguidance_interval = [0, 0.8]\n#").detail.first
    assert first.guidance_interval == (0.0, 0.8)


@pytest.mark.parametrize(
    ("line", "other", "said"),
    [
        ("fps = 16", "fps = 16\nfsp = 16", "unknown key 'fsp'"),
        ("fps = 16", "", "lacks the key 'fps'"),
        ("fps = 16", 'fps = "16"', "fps must be of type int"),
        ("fps = 16", "fps = 0", "fps must be above 0"),
        ("chunk = 16 ", "chunk = true #", "must be of type int"),
        ('streams = "both"', 'streams = "all"', "choose one of both, proxy"),
        ("margin = [0, 1, 1]", "margin = [0, 1]", "list of 3 values"),
        ("margin = [0, 1, 1]", "margin = [0, 1, -1]", "margin must be 0 or above 0"),
        ("strength = 0.45", "strength = 1.5", "strength must be 1 or less"),
        ("max_ratio = 4 ", "max_ratio = 1 #", "max_ratio must be above 1"),
        ("flow_shift = 3.0", "flow_shift = inf", "flow_shift must be finite"),
        ("[detail.first] ", "[training]\nema = 1.5\n[detail.first]\n#", "ema must be 1 or less"),
        ("[detail.first] ", "[detail.first]\nguidance_interval = [0.9, 0.2]\n#", "lower end to its upper"),
        ("autoguidance = 0.5", "autoguidance = -1", "autoguidance must be 0 or above 0"),
        ("autoguidance = 0.5", "autoguidance = true", "autoguidance must be of type float, not True"),
        ('lora = "proxy_lora.safetensors"', "", "proxy: autoguidance needs a lora"),
        (
            "[proxy]\n",
            "[experts]\nboundary = 0.9\nguidance_scale = 3.0\n[proxy]\n",
            "autoguidance needs .* one transformer",
        ),
        ("still = 2 ", "still = 4 #", "still must be at most its levels"),
        ("idle = 1 ", "idle = 2 #", "idle must be at most num_res_blocks"),
        ('upsample = "pixels"\n', 'upsample = "latents"\n', "upper: entry needs .*upsample = 'pixels'"),
        ("strength = 0.45", "strength = 1", "first: entry needs .*strength < 1"),
        ("is_residual = true", "is_residual = false", "still must be .* 0 where is_residual is false"),
        ("fps = 16", "fps = = 16", "not valid TOML"),
    ],
)
def test_what_a_preset_gets_wrong_is_said(changed, line, other, said):
    with pytest.raises(UsageError, match=said):
        changed(line, other)


def test_an_adapter_of_ones_own_may_lie_beside_the_preset(changed, tmp_path):
    line = 'lora = "detail_lora.safetensors"'
    assert changed(line, 'lora = "mine.safetensors"').detail.lora == "mine.safetensors"
    (tmp_path / "mine.safetensors").touch()
    preset = changed(line, 'lora = "mine.safetensors"')
    assert preset.detail.lora == str(tmp_path / "mine.safetensors")
    assert preset.proxy.lora == "proxy_lora.safetensors"  # in the model's folder


def test_a_missing_preset_is_said_with_those_there_are():
    with pytest.raises(UsageError, match="tiny"):
        load_preset("huge")


@pytest.mark.parametrize("name", preset_names())
def test_a_vae_has_as_many_parameters_as_its_preset_says(name):
    preset = load_preset(name)
    config = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(preset.vae).items()}
    spread = [1.0] * preset.vae.z_dim
    with torch.device("meta"):
        vae = AutoencoderKLWan.from_config(
            config | {"in_channels": preset.vae.out_channels, "latents_mean": spread, "latents_std": spread}
        )
    assert sum(p.numel() for p in vae.parameters()) == preset.vae_parameters
