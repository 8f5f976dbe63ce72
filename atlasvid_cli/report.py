"""What `bench` found, as a table, as sentences and as one self-contained HTML page whose figures are inline SVG."""

import html
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from .console import duration

Result = dict[str, Any]
WIDTH, HEIGHT, LEFT, RIGHT, BOTTOM = 620, 340, 70, 30, 48  # of a figure, in px
COLOURS = {"native": "#b3452c", "atlasvid": "#1f6f8b", "equal steps": "#1f6f8b", "few-step": "#3d8b5f"}
STAGES = ("text", "proxy", "preview", "detail", "denoise", "decode", "mux", "rest")
STAGE_COLOURS = ("#8d99ae", "#e0a458", "#f2d0a4", "#1f6f8b", "#b3452c", "#5b8c5a", "#9a7aa0", "#cccccc")


def sentences(result: Result) -> str:
    """The speedups, each with what it rests on: frames, tokens, steps, model and baseline (DESIGN §1)."""
    few = result["few_step"]
    rests_on = (
        f"{result['size']}, {result['frames']} frames, {result['tokens']:,} tokens,"
        f" model {result['model']}, against {result['baseline']}"
    )
    if result["offload"] != "none":
        rests_on += f", with all weights resident where render takes --offload {result['offload']}"
    if not result["keeps_proxy_keys"]:
        rests_on += ", with proxy keys kept where render computes them anew"
    equal = f"{result['steps']} steps at every level"
    fewer = f"{' + '.join(map(str, few['steps']))} steps as the preset renders"
    lines = [
        f"{_speedups(result)} at {equal} ({rests_on}){_mark(result, 'native', 'equal steps')}",
        f"{_speedups(few)} few-step, {fewer} ({rests_on}){_mark(result, 'native', 'few-step')}",
    ]
    return "\n".join(lines)


def _speedups(numbers: Result) -> str:
    return f"{_times(numbers, 'speedup')} from text to file, {_times(numbers, 'speedup_denoise')} in denoising"


def _times(numbers: Result, name: str) -> str:
    return f"{numbers[name]:.3g}x{_spread(numbers[f'{name}_range'], lambda value: f'{value:.3g}x')}"


def _spread(ends: Sequence[float], said: Callable[[float], str]) -> str:
    """Nothing after a single run, which has none."""
    low, high = ends
    return f" ({said(low)}..{said(high)})" if low < high else ""


def _is_projected(result: Result, *arms: str) -> bool:
    return any(timing["projected"] for arm in arms for timing in result["stages"][arm].values())


def _mark(result: Result, *arms: str) -> str:
    if not _is_projected(result, *arms):
        return ", measured in full"
    timed = min(timing["fraction"] for arm in arms for timing in result["stages"][arm].values())
    part = f"of some stage only {_percent(timed)} was timed" if timed < 1 else "some stage is scaled from a larger run"
    return f", projected: {part}"


def rows(result: Result) -> list[dict[str, str]]:
    """One row a stage and one column an arm: seconds, their spread, and the part that was measured."""
    names = dict.fromkeys(name for stages in result["stages"].values() for name in stages)
    order = sorted(names, key=lambda name: STAGES.index(name.split()[0]))
    table = [
        {"stage": name} | {arm: _cell(stages.get(name)) for arm, stages in result["stages"].items()} for name in order
    ]
    totals = {"stage": "total"} | {
        arm: f"{_seconds(result['totals'][arm])}{_spread(result['totals_range'][arm], _seconds)}"
        f"{' projected' if _is_projected(result, arm) else ''}"
        for arm in result["stages"]
    }
    numbers = {"equal steps": result, "few-step": result["few_step"]}
    speedups = {
        arm: f"{_times(found, 'speedup')}{' projected' if _is_projected(result, 'native', arm) else ''}"
        for arm, found in numbers.items()
    }
    return [*table, totals, {"stage": "speedup", "native": "", **speedups}]


def _cell(timing: Result | None) -> str:
    if timing is None:
        return ""
    spread = _spread((timing["low"], timing["high"]), _seconds)
    source = _percent(timing["fraction"]) if timing["fraction"] < 1 else "a larger run"
    part = f" projected from {source}" if timing["projected"] else ""
    return f"{_seconds(timing['seconds'])}{spread}{part}"


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value < 600 else duration(value)


def facts(result: Result) -> list[dict[str, str]]:
    """Everything else that the numbers need beside them."""
    errors = ", ".join(
        f"{name} {100 * error:+.1f} % at {result['projection_tokens'][name]:,} tokens"
        for name, error in result["projection_errors"].items()
    )
    gemms = ", ".join(
        f"{'' if at == 'before' else 'after '}{at} {rate:.3g}" for at, rate in result["gemm_tflops"].items()
    )
    peak = {who: f"{size / 2**30:.2f} GiB" for who, size in result["peak_bytes"].items() if size}
    few = result["few_step"]
    guidance = " + ".join(f"{g:g}" for g in few["guidance_scale"])
    in_float32 = (
        f", {_percent(result['gemm_fraction_float32'])} of its"
        f" {result['gemm_flops_per_second_float32'] / 1e9:.0f} in float32"
    )
    in_float32 = "" if result["dtype"] == "float32" else in_float32
    values = {
        "frames": f"{result['frames']} at {result['fps']} fps, {result['size']}",
        "tokens": f"{result['tokens']:,}; " + ", ".join(f"{n} {t:,}" for n, t in result["stage_tokens"].items()),
        "steps": f"{result['steps']} at equal steps; few-step {' + '.join(map(str, few['steps']))}",
        "guidance": f"{result['guidance_scale']:g} at equal steps; few-step {guidance}",
        "model": result["model"],
        "baseline": result["baseline"],
        "FLOPs": ", ".join(f"{arm} {flops:.3g}" for arm, flops in result["flops"].items()),
        "ceiling": f"{result['attention_free_ceiling']:.3g}x in denoising is the most that removing attention can give"
        f" at equal steps; reached {_percent(result['ceiling_fraction'])}",
        "projection error": errors or "not measured",
        "growth exponent": f"atlasvid {_number(result['growth_exponent'])},"
        f" native {_number(result['growth_exponent_native'])} (denoise + decode against tokens,"
        f" {len(result['growth'])} sizes)",
        "detail rate": f"{_percent(result['gemm_fraction'])} of a big GEMM's"
        f" {result['gemm_flops_per_second'] / 1e9:.0f} GFLOP/s in {result['dtype']}{in_float32}",
        "big GEMM": f"{gemms} TFLOP/s",
        "peak memory": ", ".join(f"{who} {size}" for who, size in peak.items()) or "not measured",
        "machine": f"{result['device']}, {result['threads']} threads, {result['dtype']},"
        f" attention backend {result['backend']}",
        "versions": ", ".join(f"{name} {v}" for name, v in result["versions"].items()),
    }
    return [{"what": name, "value": value} for name, value in values.items()]


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2g} %" if fraction < 0.995 else f"{100 * fraction:.0f} %"


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.2f}"


# --- figures -------------------------------------------------------------------------------------------------------


def page(result: Result) -> str:
    """The report as one HTML page: no script, nothing from the network."""
    points = result["growth"]
    times = {
        who: [(p["tokens"], p[f"{who}_seconds"], p[f"{who}_projected"]) for p in points]
        for who in ("native", "atlasvid")
    }
    memory = {
        who: [(p["tokens"], p[f"{who}_peak_bytes"] / 2**20, who == "planned") for p in points if p[f"{who}_peak_bytes"]]
        for who in ("native", "atlasvid", "planned")
    }
    headline = "".join(f"<p>{html.escape(line)}.</p>" for line in sentences(result).splitlines())
    figures = [
        ("Denoise and decode against tokens", lines(times, "tokens", "seconds"), "Hollow points are projected."),
        ("Where the time goes", split(result), "Shares of each arm's total."),
        (
            "Peak memory against tokens",
            lines(memory, "tokens", "MiB"),
            "Of arms that ran in full; hollow: planned.",
        ),
        (
            "Roofline",
            roofline(result["roofline"]),
            "Intensity counts the least traffic: each block's hidden state in and out, weights and guide once.",
        ),
    ]
    body = "".join(
        f"<figure><h2>{title}</h2>{svg}<figcaption>{note}</figcaption></figure>" for title, svg, note in figures
    )
    style = (
        "body{font:15px/1.5 system-ui,sans-serif;max-width:1320px;margin:2em auto;padding:0 1em;color:#222}"
        "table{border-collapse:collapse;margin:1em 0}th,td{text-align:left;padding:.25em 1em .25em 0;"
        "border-bottom:1px solid #ddd;vertical-align:top}figure{display:inline-block;vertical-align:top;"
        f"margin:0 1em 1em 0;width:{WIDTH}px;max-width:100%}}h2{{font-size:1.1em;margin:.5em 0}}"
        "figcaption{color:#666}svg{width:100%;height:auto}text{font:12px system-ui,sans-serif;fill:#333}"
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>atlasvid bench</title><style>{style}</style></head><body><h1>atlasvid bench</h1>{headline}"
        f"{_table(rows(result))}{body}{_table(facts(result))}</body></html>\n"
    )


def _table(table: list[dict[str, str]]) -> str:
    head = "".join(f"<th>{html.escape(key)}</th>" for key in table[0])
    cells = ("".join(f"<td>{html.escape(value)}</td>" for value in row.values()) for row in table)
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"


def lines(series: dict[str, list[tuple[float, float, bool]]], x_name: str, y_name: str) -> str:
    """Points (x, y, hollow) of each series, joined, on two log axes."""
    points = [p for values in series.values() for p in values]
    if not points:
        return _svg([_text(WIDTH / 2, HEIGHT / 2, "not measured", "middle")])
    x, y, parts = _axes([p[0] for p in points], [p[1] for p in points], x_name, y_name)
    for i, (name, values) in enumerate(series.items()):
        if not values:
            continue
        colour = COLOURS.get(name, "#333")
        path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b, _ in sorted(values))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for a, b, hollow in values:
            said = f"<title>{name}: {a:,.4g} {x_name}, {b:.4g} {y_name}</title>"
            style = f'fill="{"white" if hollow else colour}" stroke="{colour}" stroke-width="2"'
            parts.append(f'<circle cx="{x(a):.1f}" cy="{y(b):.1f}" r="4" {style}>{said}</circle>')
        parts += _legend(i, name, colour)
    return _svg(parts)


def split(result: Result) -> str:
    """One bar an arm: the share of each stage."""
    parts = []
    for row, (arm, stages) in enumerate(result["stages"].items()):
        top, at, total = 20 + row * 62, float(LEFT), result["totals"][arm]
        projected = " (projected)" if any(t["projected"] for t in stages.values()) else ""
        parts.append(_text(LEFT, top + 8, f"{arm}: {_seconds(total)}{projected}"))
        for kind, colour in zip(STAGES, STAGE_COLOURS, strict=True):
            seconds = sum(t["seconds"] for name, t in stages.items() if name.split()[0] == kind)
            width = seconds / total * (WIDTH - LEFT - RIGHT)
            parts.append(
                f'<rect x="{at:.1f}" y="{top + 14}" width="{width:.1f}" height="26" fill="{colour}">'
                f"<title>{kind}: {seconds:.4g} s</title></rect>"
            )
            at += width
    for i, (kind, colour) in enumerate(zip(STAGES, STAGE_COLOURS, strict=True)):
        left, top = LEFT + i % 4 * 130, HEIGHT - 90 + i // 4 * 26
        parts.append(f'<rect x="{left}" y="{top}" width="14" height="14" fill="{colour}"/>')
        parts.append(_text(left + 20, top + 12, kind))
    return _svg(parts)


def roofline(measured: Result) -> str:
    """What the machine allows at each arithmetic intensity, and what the stages reach."""
    peak, bandwidth = measured["flops_per_second"], measured["bytes_per_second"]
    points = measured["points"]
    ridge = peak / bandwidth
    xs = [ridge / 8, ridge * 8, *(p["intensity"] for p in points)]
    ys = [peak / 8e9, peak * 1.5 / 1e9, *(p["flops_per_second"] / 1e9 for p in points)]
    x, y, parts = _axes(xs, ys, "FLOP per byte", "GFLOP/s")
    low, high = min(xs), max(xs)
    roof = [(low, low * bandwidth), (ridge, peak), (high, peak)]
    path = " ".join(f"{x(a):.1f},{y(max(b, min(ys) * 1e9) / 1e9):.1f}" for a, b in roof)
    parts.append(f'<polyline points="{path}" fill="none" stroke="#333" stroke-width="2"/>')
    parts.append(_text(x(high), y(peak / 1e9) - 8, f"big GEMM, {peak / 1e9:.0f} GFLOP/s", "end"))
    for i, p in enumerate(points):
        colour = COLOURS.get(p["name"].split()[0], COLOURS["atlasvid"])
        at = f'cx="{x(p["intensity"]):.1f}" cy="{y(p["flops_per_second"] / 1e9):.1f}"'
        parts.append(f'<circle {at} r="5" fill="{colour}"><title>{html.escape(p["name"])}</title></circle>')
        parts += _legend(i, p["name"], colour)
    return _svg(parts)


def _axes(
    xs: Iterable[float], ys: Iterable[float], x_name: str, y_name: str
) -> tuple[Callable[[float], float], Callable[[float], float], list[str]]:
    """Maps of two log axes to pixels, and their lines, ticks and names."""
    x, x_ticks = _log_axis(list(xs), LEFT, WIDTH - RIGHT)
    y, y_ticks = _log_axis(list(ys), HEIGHT - BOTTOM, 20)
    frame = f'x="{LEFT}" y="20" width="{WIDTH - RIGHT - LEFT}" height="{HEIGHT - BOTTOM - 20}"'
    parts = [f'<rect {frame} fill="none" stroke="#999"/>']
    for tick in x_ticks:
        parts.append(f'<path d="M{x(tick):.1f} 20V{HEIGHT - BOTTOM}" stroke="#eee"/>')
        parts.append(_text(x(tick), HEIGHT - BOTTOM + 16, f"{tick:,g}", "middle"))
    for tick in y_ticks:
        parts.append(f'<path d="M{LEFT} {y(tick):.1f}H{WIDTH - RIGHT}" stroke="#eee"/>')
        parts.append(_text(LEFT - 6, y(tick) + 4, f"{tick:,g}", "end"))
    parts.append(_text(WIDTH / 2, HEIGHT - 8, x_name, "middle"))
    parts.append(_text(LEFT, 14, y_name, "middle"))
    return x, y, parts


def _log_axis(values: list[float], first: float, last: float) -> tuple[Callable[[float], float], list[float]]:
    """A map of values to pixels `first`..`last` and at least three round ticks, as few a decade as give them."""
    low, high = math.log10(min(values)) - 0.1, math.log10(max(values)) + 0.1
    decades = range(math.floor(low), math.ceil(high) + 1)
    for steps in ((1.0,), (1.0, 2.0, 5.0), (1.0, 2.0, 3.0, 4.0, 6.0, 8.0), tuple(i / 10 for i in range(10, 100))):
        ticks = [s * 10.0**d for d in decades for s in steps if low <= math.log10(s * 10.0**d) <= high]
        if len(ticks) >= 3:
            break
    return lambda v: first + (math.log10(v) - low) / (high - low) * (last - first), ticks


def _legend(i: int, name: str, colour: str) -> list[str]:
    top = 40 + i * 18
    return [
        f'<circle cx="{LEFT + 16}" cy="{top - 4}" r="5" fill="{colour}"/>',
        _text(LEFT + 28, top, name),
    ]


def _text(x: float, y: float, words: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(words)}</text>'


def _svg(parts: list[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(parts)}</svg>'
