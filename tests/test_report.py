"""The page is whole in itself, its figures hold the numbers, and every speedup carries what it rests on."""

import re
from fractions import Fraction
from xml.etree import ElementTree

import pytest

from atlasvid_cli import bench, report
from atlasvid_cli.plan import Request, make_plan
from atlasvid_cli.timing import Timing


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
    return bench.result(plans[-1], 20, arms, {"native": -0.031}, points, (1.5e11, 2e10, 5e10), True)


def figures(page):
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.S)]


def test_every_speedup_says_frames_steps_model_and_baseline(found):
    lines = report.sentences(found).splitlines()
    assert len(lines) == 2 and "few-step" in lines[1] and "few-step" not in lines[0]
    for line in lines:
        for said in ("192 frames", "steps", "model tiny", "WanPipeline, full attention", "3840x2160", "projected"):
            assert said in line
    assert "127x from text to file" in lines[0] and "150x in denoising" in lines[0]


def test_projected_numbers_are_marked_wherever_they_stand(found):
    table = {row["stage"]: row for row in report.rows(found)}
    assert table["denoise"]["native"] == "2 h 30 min (2 h 15 min..2 h 45 min) projected from 0.2 %"
    assert "projected" in table["total"]["native"] and "projected" not in table["total"]["few-step"]
    assert "projected" not in table["detail 2/2"]["equal steps"] and table["denoise"]["few-step"] == ""
    assert any(row["what"] == "projection error" and "native -3.1 %" in row["value"] for row in report.facts(found))


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
