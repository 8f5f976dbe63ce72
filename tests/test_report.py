"""The page is whole in itself, its figures hold the numbers, and every speedup carries what it rests on."""

import re
from fractions import Fraction
from xml.etree import ElementTree

import pytest

from atlasvid_cli import bench, report
from atlasvid_cli.arms import Check
from atlasvid_cli.plan import Request, make_plan
from atlasvid_cli.timing import Rates, Timing

ARMS = ("equal steps", "few-step")


def timing(seconds, fraction=1.0):
    return Timing(seconds, seconds * 0.9, seconds * 1.1, 3, fraction)


@pytest.fixture
def found():
    ours = {
        "text": timing(1),
        "proxy": timing(2),
        "detail 1/2": timing(8),
        "detail 2/2": timing(50),
        "decode": timing(10),
    }
    arms = {
        "native": {"text": timing(1), "denoise": timing(9000, 0.002), "decode": timing(30)},
        "equal steps": ours,
        "few-step": ours,
    }
    plans = [make_plan(Request("tiny", 3840, 2160, Fraction(s))) for s in (6, 12)]
    points = [bench._point(p, ours, arms["native"], 3 << 30, None) for p in plans]
    rates = Rates({"before": 1.4e11, "few-step": 1.5e11, "equal steps": 1.2e11, "native": 1.3e11}, 2e10, 5e10)
    return bench.result(plans[-1], 20, arms, {"native": Check(-0.031, 1234)}, points, rates, True)


def figures(page):
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.S)]


def test_every_speedup_says_frames_steps_model_and_baseline(found):
    lines = report.sentences(found).splitlines()
    assert len(lines) == 2 and "few-step" in lines[1] and "few-step" not in lines[0]
    for line in lines:
        for said in ("192 frames", "steps", "model tiny", "WanPipeline, full attention", "3840x2160", "projected"):
            assert said in line
    assert "127x (104x..155x) from text to file, 150x (123x..183x) in denoising" in lines[0]
    assert "resident" not in lines[0]


def test_where_a_render_offloads_every_speedup_says_that_its_weights_were_resident(found):
    for line in report.sentences(found | {"offload": "block"}).splitlines():
        assert "with all weights resident where render takes --offload block" in line


def test_a_total_and_a_speedup_have_their_spread_unless_all_ran_once(found):
    table = {row["stage"]: row for row in report.rows(found)}
    assert table["total"]["native"] == "2 h 30 min (2 h 15 min..2 h 45 min) projected"
    assert table["total"]["few-step"] == "71 s (63.9 s..78.1 s)"
    assert table["speedup"] == {"stage": "speedup", "native": "", **dict.fromkeys(ARMS, "127x (104x..155x) projected")}
    once = report._times({"speedup": 2.0, "speedup_range": [2.0, 2.0]}, "speedup")
    assert once == "2x"


def test_projected_numbers_are_marked_wherever_they_stand(found):
    table = {row["stage"]: row for row in report.rows(found)}
    assert table["denoise"]["native"] == "2 h 30 min (2 h 15 min..2 h 45 min) projected from 0.2 %"
    assert "projected" in table["total"]["native"] and "projected" not in table["total"]["few-step"]
    assert all("projected" in table["speedup"][arm] for arm in ARMS)
    assert "projected" not in table["detail 2/2"]["equal steps"] and table["denoise"]["few-step"] == ""
    assert any(
        row["what"] == "projection error" and "native -3.1 % at 1,234 tokens" in row["value"]
        for row in report.facts(found)
    )


def test_a_stage_scaled_from_more_work_is_marked_though_all_of_that_was_timed(found):
    found["stages"]["equal steps"]["proxy"] = bench._plain(timing(3).times(2 / 3))
    found["stages"]["native"]["denoise"] = bench._plain(timing(9000))
    table, (equal, few) = {row["stage"]: row for row in report.rows(found)}, report.sentences(found).splitlines()
    assert table["proxy"]["equal steps"] == "2 s (1.8 s..2.2 s) projected from a larger run"
    assert "projected" in table["speedup"]["equal steps"] and "projected" not in table["speedup"]["few-step"]
    assert "projected" in table["total"]["equal steps"] and "projected" not in table["total"]["native"]
    assert equal.endswith("projected: some stage is scaled from a larger run") and few.endswith("measured in full")


def test_the_rate_of_the_machine_stands_beside_each_arm(found):
    facts = {row["what"]: row["value"] for row in report.facts(found)}
    assert facts["big GEMM"] == "before 0.14, after few-step 0.15, after equal steps 0.12, after native 0.13 TFLOP/s"


def test_the_page_needs_nothing_from_elsewhere(found):
    page = report.page(found)
    assert page.startswith("<!doctype html>") and page.rstrip().endswith("</html>")
    assert not re.search(r"<script|<link|<img|@import|url\(|src=|href=|https?://", page)
    assert len(figures(page)) == 4


def test_the_figures_hold_the_points(found):
    times, shares, memory, roofline = figures(report.page(found))
    circles = [c for c in times.iter("circle") if c.find("title") is not None]
    assert len(circles) == 4
    assert {c.get("fill") for c in circles if c.find("title").text.startswith("native")} == {"white"}, "projected"
    assert "white" not in {c.get("fill") for c in circles if c.find("title").text.startswith("atlasvid")}
    measured, planned = (
        [c for c in memory.iter("circle") if c.find("title") is not None and c.find("title").text.startswith(who)]
        for who in ("atlasvid", "planned")
    )
    assert len(measured) == len(planned) == 2
    assert {c.get("fill") for c in planned} == {"white"} and "white" not in {c.get("fill") for c in measured}
    widths = [float(r.get("width")) for r in shares.iter("rect") if r.find("title") is not None]
    assert sum(widths) == pytest.approx(3 * (report.WIDTH - report.LEFT - report.RIGHT), rel=1e-3)
    assert "big GEMM, 150 GFLOP/s" in [t.text for t in roofline.iter("text")]


def test_points_lie_in_the_frame_in_the_order_of_their_values():
    x, ticks = report._log_axis([3, 50, 7000], 70, 600)
    assert 70 < x(3) < x(50) < x(7000) < 600
    assert all(70 <= x(t) <= 600 for t in ticks) and 10 in ticks
    assert x(30) - x(3) == pytest.approx(x(300) - x(30))


def test_without_any_point_a_figure_says_so():
    assert "not measured" in report.lines({"native": []}, "tokens", "MiB")


def test_names_are_escaped(found):
    found["model"] = "<b>&"
    page = report.page(found)
    assert "<b>" not in page and "&lt;b&gt;&amp;" in page
