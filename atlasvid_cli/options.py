"""The flags that several commands share; every one with a unit has it in its help."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from .errors import UsageError
from .parse import MAX_FPS, MAX_SEED


def _named(output: str | None) -> str | None:
    """UsageError for an output without a name: an unset variable, say."""
    if output == "":
        raise UsageError("--output is empty; name a file, or a folder/")
    return output


def _folder(text: str) -> Path:
    """UsageError for a run directory without a name, which `Path` would take for the folder that one is in."""
    if not text:
        raise UsageError("--run-dir is empty; name a folder")
    return Path(text)


Res = Annotated[str, typer.Option("--res", help="Size in pixels: 3840x2160, 3840*2160, 4k, 1080p, 720p ...")]
Seconds = Annotated[str, typer.Option("--seconds", help="Length in seconds; exactly seconds * fps frames are written.")]
ClipSeconds = Annotated[
    str | None, typer.Option("--seconds", help="Length in seconds [default: 4, or the whole clip's with --from-video].")
]
FromVideo = Annotated[
    Path | None,
    typer.Option(
        "--from-video",
        readable=False,  # whoever reads it says it better
        help="A clip to encode as the proxy, cropped around its centre to the aspect of --res.",
    ),
]
Fps = Annotated[int | None, typer.Option("--fps", min=1, max=MAX_FPS, help="Frames a second [default: the preset's].")]
RefineFps = Annotated[
    int | None, typer.Option("--fps", min=1, max=MAX_FPS, help="Frames a second [default: the file's].")
]
Seed = Annotated[int, typer.Option("--seed", min=0, max=MAX_SEED, help="Seed; in a batch each item adds its index.")]
Steps = Annotated[
    int | None,
    typer.Option(
        "--steps",
        min=1,
        max=1000,
        help="Denoising steps of the proxy [default: the preset's]; `refine` has those of levels.",
    ),
]
LevelSteps = Annotated[
    int | None, typer.Option("--steps", min=1, max=1000, help="Denoising steps of every level [default: the preset's].")
]
LevelGuidance = Annotated[
    float | None,
    typer.Option(
        "--guidance-scale", help="Classifier-free guidance of every level; 1 turns it off [default: the preset's]."
    ),
]
LevelShift = Annotated[
    float | None,
    typer.Option("--flow-shift", help="Time shift of every level's flow-matching schedule [default: the preset's]."),
]
Guidance = Annotated[
    float | None,
    typer.Option(
        "--guidance-scale", help="Classifier-free guidance of the proxy; 1 turns it off [default: the preset's]."
    ),
]
Shift = Annotated[
    float | None,
    typer.Option("--flow-shift", help="Time shift of the proxy's flow-matching schedule [default: the preset's]."),
]
ProxySampler = Annotated[
    Literal["unipc", "euler"] | None,
    typer.Option("--sampler", help="Of the proxy [default: the preset's]; few-step LoRAs mostly want euler."),
]
PresetName = Annotated[str, typer.Option("--preset", help="A preset by name, or the path of a .toml file.")]
SavedPreset = Annotated[str | None, typer.Option("--preset", help="Preset [default: the one the file names].")]
ModelPath = Annotated[str | None, typer.Option("--model-path", help="Model folder or hub id instead of the preset's.")]
Loras = Annotated[
    list[str] | None,
    typer.Option("--lora", metavar="PATH[:WEIGHT][@high|@low]", help="A LoRA; repeatable. @ for one expert only."),
]
Strict = Annotated[bool, typer.Option("--strict", help="Refuse a LoRA of which any key fits no layer.")]
Backend = Annotated[
    str | None,
    typer.Option("--attention-backend", help="flash, _flash_3_hub, sage, xformers ... [default: PyTorch's]."),
]
Compile = Annotated[
    bool, typer.Option("--compile", help="Compile the blocks first (torch.compile): some 20 s, for long runs.")
]
OffloadMode = Annotated[
    Literal["auto", "none", "block", "host"],
    typer.Option("--offload", help="What leaves GPU memory: none, block (weights), host (all), or what has to (auto)."),
]
WeightDtype = Annotated[
    Literal["auto", "int8", "fp8"],
    typer.Option("--weight-dtype", help="int8, fp8: blocks' weights in half the memory of bf16, at a small error."),
]
Vram = Annotated[
    float | None,
    typer.Option("--vram-gib", help="Plan for a GPU with so much free memory, not for this machine; without times."),
]
Chunk = Annotated[
    int | None,
    typer.Option("--chunk", min=1, help="Windows computed at a time; bounds memory [default: the preset's]."),
]
CodecName = Annotated[str, typer.Option("--codec", help="h264 (8 bit), hevc10, av1, prores or ffv1 (10 bit).")]
Output = Annotated[
    str | None,
    typer.Option("--output", "-o", callback=_named, help="File for the result, or folder/ for it under its own name."),
]
RunDir = Annotated[
    Path | None,
    typer.Option(
        "--run-dir",
        parser=_folder,
        metavar="<path>",
        help="Where intermediate results go [default: runs/ beside the output].",
    ),
]
Negative = Annotated[str | None, typer.Option("--negative-prompt", help="What to steer away from.")]
PromptFile = Annotated[
    str | None,
    typer.Option(
        "--prompt-file",
        help="One prompt a line (every line that is not blank), or JSON Lines with the keys prompt, id, seed,"
        " negative_prompt, output; '-' is stdin. Id, seed and name come from a line's place where it gives none, so"
        " append new lines.",
    ),
]
Shard = Annotated[str | None, typer.Option("--shard", help="i/n: every n-th prompt from the i-th on.")]
BenchSteps = Annotated[
    int | None,
    typer.Option(
        "--steps", min=1, max=1000, help="Steps of native and of every level at equal steps [default: the preset's]."
    ),
]
BenchRes = Annotated[str | None, typer.Option("--res", help="Size in pixels [default: 960x540; 800x448 with --quick].")]
BenchSeconds = Annotated[
    str | None,
    typer.Option("--seconds", help="Length in seconds [default: 2; 1 with --quick, 4 with --quality or --ablation]."),
]
Repeats = Annotated[
    int | None, typer.Option("--repeats", min=1, max=100, help="Runs of each measurement [default: 3; 1 with --quick].")
]
Budget = Annotated[
    float | None,
    typer.Option(
        "--budget-seconds",
        help="Seconds an arm may take, all repeats; beyond, it is projected [default: 60; 15 with --quick; for a video"
        " of --ablation by full attention 600].",
    ),
]
Quick = Annotated[bool, typer.Option("--quick", help="One run at a small size, in less than a minute.")]
Quality = Annotated[
    bool, typer.Option("--quality", help="How often held-out prompts come true, instead of how fast (preset tiny).")
]
Ablation = Annotated[
    bool, typer.Option("--ablation", help="What each part of the method is worth, arm by arm (preset tiny).")
]
Count = Annotated[
    int | None, typer.Option("--count", min=1, help="Held-out prompts [default: 40 for --quality, 4 for --ablation].")
]
Large = Annotated[
    str | None, typer.Option("--large", help="With --ablation: one video of each arm at this size too, say 4k.")
]
Seeds = Annotated[
    int | None, typer.Option("--seeds", min=1, max=100, help="Seeds of each prompt that --ablation takes [default: 3].")
]
QualityOutput = Annotated[
    Path | None, typer.Option("--output", "-o", help="Where their videos go [default: quality or ablation].")
]
Html = Annotated[Path | None, typer.Option("--html", help="Also write the report, with figures, as one HTML page.")]
Json = Annotated[bool, typer.Option("--json", help="JSON Lines on stdout.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop; nothing is loaded.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Prompt = Annotated[str | None, typer.Argument(help="What to show; may be left out with --from-video.")]
Data = Annotated[
    Path | None,
    typer.Option(
        "--data",
        readable=False,
        help='Clips, which proxy and detail need: a folder of clip.mp4 + clip.txt, a JSON Lines index of {"video",'
        ' "caption"}, or world. tiny takes no options but --work and --output.',
    ),
]
Trained = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="Where it goes [default: <stage>_lora.safetensors; <work>/tiny for tiny]."),
]
TrainSteps = Annotated[int | None, typer.Option("--steps", min=1, help="Optimiser steps [default: 1000].")]
Rate = Annotated[
    float | None, typer.Option("--lr", help="Peak learning rate, after a warm-up [default: 0.003, of prodigy 1].")
]
Rank = Annotated[int | None, typer.Option("--rank", min=1, max=1024, help="Rank of the adapter [default: 64].")]
TrainedPreset = Annotated[
    str | None, typer.Option("--preset", help="A preset by name, or the path of a .toml file [default: tiny].")
]
TrainedExpert = Annotated[
    str | None, typer.Option("--expert", help="Of two experts the one for high or low noise, in training a proxy.")
]
RefineSeed = Annotated[int | None, typer.Option("--seed", min=0, max=MAX_SEED, help="Seed [default: the proxy's].")]
TrainSeed = Annotated[int | None, typer.Option("--seed", min=0, max=MAX_SEED, help="Seed [default: 0].")]
