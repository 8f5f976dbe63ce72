"""The commands around making: what it would take, how fast it is, what there is."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import options as opt
from .errors import UsageError
from .parse import check_finite
from .request import make_request
from .show import show_plan
from .targets import check_writable

if TYPE_CHECKING:
    from .console import Console
    from .plan import Request


def plan(
    res: opt.Res = "960x540",
    seconds: opt.Seconds = "4",
    fps: opt.Fps = None,
    steps: opt.Steps = None,
    guidance_scale: opt.Guidance = None,
    preset: opt.PresetName = "tiny",
    chunk: opt.Chunk = None,
    offload: opt.OffloadMode = "auto",
    weight_dtype: opt.WeightDtype = "auto",
    vram_gib: opt.Vram = None,
    codec: opt.CodecName = "h264",
    as_json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """What a render would take: tokens, windows, FLOPs, memory, disk and time. Nothing is loaded."""
    from .console import Console

    if vram_gib is not None:
        check_finite("--vram-gib", vram_gib, 1)

    request = make_request(
        res,
        seconds,
        preset,
        fps=fps,
        steps=steps,
        guidance_scale=guidance_scale,
        chunk=chunk,
        codec=codec,
        offload=offload,
        weight_dtype=weight_dtype,
    )
    from .machine import machine_with_gpu
    from .plan import make_plan

    machine = None if vram_gib is None else machine_with_gpu(vram_gib)
    show_plan(make_plan(request), Console(as_json), None, machine=machine)


def bench(
    res: opt.BenchRes = None,
    seconds: opt.BenchSeconds = None,
    steps: opt.BenchSteps = None,
    preset: opt.PresetName = "tiny",
    model_path: opt.ModelPath = None,
    repeats: opt.Repeats = None,
    budget_seconds: opt.Budget = None,
    quick: opt.Quick = False,
    page: opt.Html = None,
    quality: opt.Quality = False,
    ablation: opt.Ablation = False,
    count: opt.Count = None,
    seeds: opt.Seeds = None,
    large: opt.Large = None,
    output: opt.QualityOutput = None,
    as_json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Times this tool against full attention with the same weights, here; says what was projected and how well."""
    from .console import Console

    if quality or ablation:
        speed: dict[str, object] = {"steps": steps, "repeats": repeats, "quick": quick, "html": page}
        of_ablation = {"ablation": ablation, "budget-seconds": budget_seconds, "seeds": seeds, "large": large}
        speed |= of_ablation if quality else {}
        if ignored := next((name for name, value in speed.items() if value), None):
            raise UsageError(f"--{ignored} does not go with --{'quality' if quality else 'ablation'}; leave one out")
        request = make_request(res or "960x540", seconds, preset, model_path=model_path)
        if ablation:
            budget = 600.0 if budget_seconds is None else budget_seconds
            check_finite("--budget-seconds", budget, 1)
            at = make_request(large, seconds, preset, model_path=model_path) if large else None
            show_ablation(request, at, count or 4, seeds or 3, budget, output or Path("ablation"), Console(as_json))
        else:
            show_quality(request, count or 40, output or Path("quality"), Console(as_json))
        return
    of_quality = {"count": count, "seeds": seeds, "large": large, "output": output}
    if ignored := next((name for name, value in of_quality.items() if value), None):
        raise UsageError(f"--{ignored} goes with --quality or --ablation; add one of them, or leave it out")
    size, length, runs, budget = ("800x448", "1", 1, 15.0) if quick else ("960x540", "2", 3, 60.0)
    budget = budget if budget_seconds is None else budget_seconds
    check_finite("--budget-seconds", budget, 1)
    if page and page.suffix != ".html":
        raise UsageError(f"--html {page} must end in .html; name it report.html, say")
    request = make_request(res or size, length if seconds is None else seconds, preset, model_path=model_path)
    console = Console(as_json)
    from .plan import make_plan

    make_plan(request)  # usage errors before the heavy imports
    if page:
        check_writable(page.absolute(), "--html")
    from . import bench, report
    from .store import atomic

    found = bench.run(request, steps, repeats or runs, budget, console)
    console.table("seconds, medians (min..max); loading weights left out", report.rows(found))
    console.table("", report.facts(found))
    if page:
        with atomic(page.absolute()) as file:
            file.write(report.page(found).encode())
    console.emit(found, report.sentences(found))


def show_quality(request: "Request", count: int, folder: Path, console: "Console") -> None:
    """Measures and prints how often prompts come true."""
    from . import quality

    quality.check(request)  # usage errors before any work
    check_writable(folder.absolute() / "000.mp4")
    found = quality.run(request, count, folder, console)
    rows = [{"what": name, "right": f"{n} of {count}"} for name, n in found["right"].items()]
    rows.append({"what": "not repeated", "right": f"{found['not_repeated']} of {count}"})
    rows.append({"what": "steady", "right": f"{found['steady']} of {count}"})
    console.table(f"{found['size']} x {found['seconds']:g} s, held-out prompts of preset {found['preset']}", rows)
    right = found["right"]["all of these"]
    text = f"{right} of {count} prompts all right; seam {found['seam']} ± {found['seam_chance']}"
    text += f" ({found['seam_within']} within windows), coherence {found['coherence_db']} dB"
    text += f", edges {found['edge_width_px']} px wide" if found["edge_width_px"] else ""
    console.emit(found, text)


def show_ablation(
    request: "Request",
    large: "Request | None",
    count: int,
    seeds: int,
    budget: float,
    folder: Path,
    console: "Console",
) -> None:
    """Measures and prints what each part of the method is worth."""
    from . import ablation, quality
    from .ablation_arms import WHOLE

    for wanted in filter(None, (request, large)):
        quality.check(wanted, "--ablation")  # usage errors before any work
    check_writable(folder.absolute() / "arm.json")
    found = ablation.run(request, count, seeds, budget, folder, console, large)
    title = f"{found['size']} x {found['seconds']:g} s, {count} held-out prompts x {seeds} seeds"
    console.table(f"{title} (right, no, many in %; * untrained)", [ablation.row(arm) for arm in found["arms"]])
    if large:
        title = f"{found['large']['size']} x {found['large']['seconds']:g} s, one video of each arm"
        console.table(title, [ablation.row(arm) for arm in found["large"]["arms"]])
    full = next(arm for arm in found["arms"] if arm["arm"] == WHOLE)
    text = f"{WHOLE}: {full['adherence_percent']} % of attributes right, seam {full['seam']} ± {full['seam_chance']}"
    console.emit(found, f"{text}, {full['seconds']} s a video")


def presets(as_json: opt.Json = False, debug: opt.Debug = False) -> None:
    """The presets that come with the tool."""
    from .console import Console
    from .presets import load_preset, preset_names

    console = Console(as_json)
    for name in preset_names():
        preset = load_preset(name)
        console.emit({"name": name, "description": preset.description}, f"{name}\t{preset.description}")


def info(
    # not `readable`: whoever reads it says it better
    file: Annotated[Path, typer.Argument(readable=False, help="A video, a latents file or a run directory.")],
    as_json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """What a file was made from."""
    from .console import Console
    from .info import describe, lines

    facts = describe(file)
    Console(as_json).emit(facts, "\n".join(lines(facts)))


def doctor(as_json: opt.Json = False, debug: opt.Debug = False) -> None:
    """The machine as atlasvid sees it: device, versions, codecs, memory and disk, and what each preset can do here."""
    from .console import Console
    from .doctor import examine
    from .info import lines

    facts = examine(Path())
    Console(as_json).emit(facts, "\n".join(lines(facts)))
