import itertools
from fractions import Fraction

import pytest
import torch
from diffusers import UniPCMultistepScheduler
from hypothesis import given
from hypothesis import strategies as st

from atlasvid_cli.schedule import noise, shift_sigma, sigmas, upsample


def test_a_box_has_the_noise_of_the_whole():
    whole = noise(7, 1, 6, range(5), range(9), range(8))
    part = noise(7, 1, 6, range(2, 4), range(3, 7), range(1, 8))
    assert torch.equal(part, whole[:, 2:4, 3:7, 1:8])


def test_noise_is_standard_normal_and_uncorrelated():
    x = noise(3, 0, 8, range(4), range(64), range(64))
    assert abs(x.mean()) < 0.01 and abs(x.std() - 1) < 0.01
    assert abs((x**4).mean() - 3) < 0.1
    flat = x.reshape(8, -1)
    assert (torch.corrcoef(flat) - torch.eye(8)).abs().max() < 0.04
    for axis in (1, 2, 3):
        a, b = x.narrow(axis, 0, x.shape[axis] - 1), x.narrow(axis, 1, x.shape[axis] - 1)
        assert abs((a * b).mean()) < 0.02


@pytest.mark.parametrize("other", [(4, 1), (3, 2)])
def test_seed_and_stage_change_the_noise(other):
    a, b = (noise(seed, stage, 4, range(2), range(16), range(16)) for seed, stage in ((3, 1), other))
    assert abs(torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1]) < 0.05


@pytest.mark.parametrize("shift", [i / 100 for i in range(1, 100)])
def test_rounding_lifts_no_sigma_above_one(shift):
    """Where it did, the first step was beyond the interval of guidance."""
    assert sigmas(4, 1.0, shift)[0] <= 1.0


@given(st.integers(1, 50), st.floats(0.05, 1.0), st.floats(1.0, 12.0))
def test_sigmas_fall_from_the_strength_to_zero(steps, strength, shift):
    values = sigmas(steps, strength, shift)
    assert len(values) == steps + 1
    assert values[0] == pytest.approx(strength) and values[-1] == 0
    assert all(a > b for a, b in itertools.pairwise(values))


def test_the_shift_is_the_schedulers():
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
    scheduler.set_timesteps(10)
    plain = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0)
    plain.set_timesteps(10)
    expected = [shift_sigma(s, 5.0) for s in plain.sigmas.tolist()]
    assert scheduler.sigmas.tolist() == pytest.approx(expected, abs=2e-3)


def test_upsampling_a_ramp_is_exact_inside():
    y, x = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    ramp = (y * 2 + x)[None, None].expand(1, 3, 8, 8)
    out = upsample(ramp, Fraction(3), 4, (range(0, 9), range(20), range(24)))
    yy, xx = (torch.arange(4, 16) + 0.5) / 3 - 0.5, (torch.arange(4, 20) + 0.5) / 3 - 0.5
    torch.testing.assert_close(out[0, 3, 4:16, 4:20], yy[:, None] * 2 + xx, atol=1e-4, rtol=0)


def test_upsampling_a_ramp_in_time_puts_each_latent_at_the_end_of_its_group():
    ramp = torch.arange(3.0)[None, :, None, None].expand(1, 3, 4, 4)
    out = upsample(ramp, Fraction(2), 4, (range(0, 12), range(8), range(8)))
    expected = (torch.arange(12.0) / 4).clamp_max(2)
    torch.testing.assert_close(out[0, :, 3, 3], expected)
