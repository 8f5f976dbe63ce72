"""Every arm makes its video, differs from the others by what it leaves out, and is looked at once."""

import dataclasses
from fractions import Fraction

import pytest

from atlasvid_cli import ablation, quality
from atlasvid_cli.console import Console
from atlasvid_cli.errors import UsageError
from atlasvid_cli.plan import Request, make_plan
from atlasvid_cli.presets import load_preset
from atlasvid_cli.video import read_frames

QUIET = Console(interactive=False)


@pytest.fixture(scope="module")
def request_of(random_preset):
    return Request(str(random_preset), 200, 120, Fraction(1))


@pytest.fixture(scope="module")
def found(request_of, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ablation")
    return folder, ablation.run(request_of, 1, 2, folder, QUIET)


def test_every_arm_is_there_with_its_columns(found):
    _, table = found
    names = [row["arm"].removesuffix(" (untrained)") for row in table["arms"]]
    assert names == ["upsampled proxy", *ablation.SAMPLED, "native full attention"]
    assert all(0 <= row["adherence_percent"] <= 100 and row["peak_gib"] > 0 for row in table["arms"])
    assert table["prompts"] == 1 and table["seeds"] == 2


def test_sampled_arms_differ_and_share_their_proxies(found):
    folder, _ = found
    videos = {p.parent.name: next(read_frames(p)).tobytes() for p in folder.glob("*/0.mp4")}
    assert len(videos) == len(ablation.SAMPLED)
    assert len(set(videos.values())) == len(videos)
    assert {p.parent.parent.name for p in folder.glob("*/0/proxy.safetensors")} == {"proxy", "proxy-unscaled"}


def test_what_was_seen_is_kept(found, request_of, monkeypatch):
    folder, table = found
    monkeypatch.setattr(ablation.pipeline, "refine", lambda *a: pytest.fail("refined again"))
    monkeypatch.setattr(ablation, "WanPipeline", lambda *a: pytest.fail("native again"))
    assert ablation.run(request_of, 1, 2, folder, QUIET) == table


def test_the_upsampled_proxy_is_the_proxy_in_large(found, request_of):
    folder, _ = found
    plan = make_plan(dataclasses.replace(request_of, seed=0))
    large = ablation.upsampled(plan, folder / "proxy" / "0")
    assert large[0].shape == (120, 200, 3)
    proxy = quality.proxy_frames(plan, folder / "proxy" / "0" / "proxy.mp4")
    assert quality.coherence(plan, large, proxy) > 25


def test_tiles_see_no_border_beyond_their_own():
    preset = ablation.SAMPLED["tiles, each alone"][0](load_preset("tiny"))
    assert preset.detail.layouts == ((preset.detail.windows[0], False),) and not preset.detail.proxy_attention


def test_columns_are_means_over_prompts_and_spread_over_seeds():
    def seen(right, repetition=0, seconds=1.0):
        flags = {"colour": right, "shape": right}
        return ablation.Seen(quality.Assessment(flags, repetition, [2.0, 1.0], [1.0, 1.0], 30.0, None), seconds, 2**30)

    row = ablation.summary([[seen(True), seen(True)], [seen(False, 2), seen(True, -1, 9.0)]])
    assert (row["adherence_percent"], row["spread_percent"]) == (75.0, 25.0)
    assert (row["repetition"], row["seam"], row["edge_width_px"]) == (0.5, 2.0, None)
    assert (row["seconds"], row["peak_gib"]) == (1.0, 1.0)


def test_another_world_is_refused(stock_preset):
    with pytest.raises(UsageError, match="tiny only"):
        ablation.run(Request(str(stock_preset), 200, 120, Fraction(1)), 1, 1, None, QUIET)
