"""Presets: one TOML file each, parsed strictly into plain dataclasses."""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import tomli

from .errors import UsageError
from .shapes import Geometry, Shape, Spacing

OptimizerName = Literal["muon", "adamw", "prodigy"]
Layout = tuple[Shape, bool]  # the shape of a block's windows, and whether their grid is shifted by half a window


@dataclass(frozen=True)
class Transformer:
    """Sizes of the transformer, for planning; the loaded weights must agree."""

    dim: int
    ffn: int
    layers: int
    heads: int
    channels: int
    text_length: int
    text_dim: int

    @property
    def block_parameters(self) -> int:
        """Of a block's linear layers: the projections of self- and cross-attention, and the FFN."""
        return 8 * self.dim**2 + 2 * self.dim * self.ffn


@dataclass(frozen=True)
class Vae:
    """`AutoencoderKLWan`'s own config, as far as planning needs it; the loaded weights must agree.

    `still`: so many of its levels, those next to the pixels, convolve each frame by itself: their weights for the past
    are zero, and their multiplications are left out. `idle`: so many of the decoder's residual blocks, the last ones,
    add nothing, and are left out too. Of Wan's own VAEs none.
    """

    base_dim: int
    z_dim: int
    dim_mult: tuple[int, ...]
    num_res_blocks: int
    temperal_downsample: tuple[bool, ...]  # diffusers' spelling
    is_residual: bool
    out_channels: int
    decoder_base_dim: int | None = None
    patch_size: int | None = None
    still: int = 0
    idle: int = 0

    @classmethod
    def stock(cls, config: Mapping[str, Any]) -> "Vae":
        """The one of diffusers' config as diffusers itself runs it: no level is `still` and no block `idle`."""
        return cls(**{f.name: config[f.name] for f in dataclasses.fields(cls) if f.name in config})


@dataclass(frozen=True)
class Text:
    """The text encoder, for planning: its `parameters`, and how many of them only look words up."""

    parameters: int
    looked_up: int


Sampler = Literal["unipc", "euler"]


@dataclass(frozen=True)
class Proxy:
    """Stage 1: `base_tokens` a latent frame, `time_ratio` r_t, and its sampling: by the base's own multistep `sampler`
    (UniPC), or by Euler steps, for which most few-step LoRAs were distilled.

    Its positions are (r_t t, s y, s x), or without `scaled_time` (t, s y, s x): s is `position_scale`, below 1 for a
    proxy larger than the base was trained at (position interpolation, arXiv 2306.15595). `autoguidance` times the
    difference to the model without the adapter is added to guided velocities (Karras et al., arXiv 2406.02507).
    """

    base_tokens: int
    time_ratio: int
    steps: int
    guidance_scale: float
    flow_shift: float
    sampler: Sampler = "unipc"
    scaled_time: bool = True
    position_scale: float = 1.0
    autoguidance: float = 0.0
    lora: str | None = None

    @property
    def spacing(self) -> Spacing:
        """Of its positions, as adapters are trained."""
        return Spacing(self.time_ratio, self.position_scale)

    @property
    def trained_for(self) -> dict[str, str]:
        """What an adapter of stage 1 says that it was trained for (`train.adapter_metadata`)."""
        return {"time_ratio": str(self.time_ratio), "position_scale": str(self.position_scale)}


@dataclass(frozen=True)
class Experts:
    """Two experts, as in Wan2.2 A14B: `transformer` works at sigmas from `boundary` up, `transformer_2` below.

    `guidance_scale` and `lora` are the second's, in the proxy; the first takes the proxy's own. Detail levels start
    below the boundary and need the second alone.
    """

    boundary: float
    guidance_scale: float
    lora: str | None = None

    def sigmas(self, second: bool) -> tuple[float, float]:
        """Between which sigmas an expert works."""
        return (0.0, self.boundary) if second else (self.boundary, 1.0)


Upsample = Literal["latents", "pixels"]


@dataclass(frozen=True)
class Level:
    """Sampling of a detail level; `strength` in (0, 1] is the sigma that it starts from, and below 1 `upsample` whether
    the level below is made as large in latents or in pixels (decoded, and encoded again). With `entry`, a file of
    the preset's or the model's folder, frames are made half as large and encoded by the first level there (`half`).

    Guidance acts at sigmas within `guidance_interval`; elsewhere a step takes one forward and not two (Kynkäänniemi et
    al., arXiv 2404.07724). With `guidance_batch` the two are one forward of both prompts: each block's weights and
    kernels come once a step, for one hidden state more.
    """

    steps: int
    strength: float
    guidance_scale: float
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_batch: bool = False
    upsample: Upsample = "latents"
    entry: str | None = None


@dataclass(frozen=True)
class Detail:
    """Stage 2: windows in tokens (t, h, w), ratios r_s, and the sampling of its levels.

    Without `proxy_attention` (training-free) windows see only themselves, and what they show comes from the level below
    by way of the noise that they start from. `shifted`, `scaled_positions` and `clean_proxy` are parts of the method
    that a preset may leave out: the shifts of the window grid, proxy keys at detail coordinates (else at their own),
    and the proxy stream at timestep 0 (else the detail's).
    """

    min_ratio: float
    max_ratio: float
    proxy_attention: bool
    windows: tuple[Shape, ...]
    margin: Shape
    proxy_window: Shape
    proxy_centre: bool
    streams: Literal["both", "proxy"]
    chunk: int
    flow_shift: float
    first: Level
    upper: Level
    shifted: bool = True
    scaled_positions: bool = True
    clean_proxy: bool = True
    lora: str | None = None

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """What the blocks' windows cycle through."""
        return window_cycle(self.windows, self.shifted)

    @property
    def halo(self) -> Shape:
        """Tokens to either side of a region that are computed with it: the longest window along each axis."""
        t, h, w = (max(lengths) for lengths in zip(*self.windows, strict=True))
        return t, h, w


@dataclass(frozen=True)
class Training:
    """How adapters are trained. `ema`, where above 0, is the decay a step of the average of weights that is saved.

    A step of stage 1 sees `accumulate` batches of `batch` clips (of shorter ones more), a step of stage 2
    `detail_accumulate` crops, or several stills for one. A batch is in memory at once, what accumulates is not.
    """

    optimizer: OptimizerName = "muon"
    ema: float = 0.0
    batch: int = 5
    accumulate: int = 1
    detail_accumulate: int = 3


@dataclass(frozen=True)
class Preset:
    """Everything a preset file says. `model` is a folder beside the file, or a hub id with its pinned `revision`.

    `vae_parameters` are of encoder and decoder. `decode_dtype` is what the VAE bears: where the device does not
    multiply it, and by default, it decodes in float32. `extend_prompts`: prompts are of the embedded world, and those
    that leave parts out are said in full (`extend`).
    """

    name: str
    folder: Path
    description: str
    model: str
    fps: int
    decode_gib: float
    vae_parameters: int
    negative_prompt: str
    geometry: Geometry
    transformer: Transformer
    vae: Vae
    text: Text
    proxy: Proxy
    detail: Detail
    experts: Experts | None = None
    revision: str | None = None
    decode_dtype: Literal["float32", "bfloat16"] = "float32"
    extend_prompts: bool = False
    training: Training = field(default_factory=Training)

    @property
    def training_crop(self) -> tuple[int, int]:
        """Latent frames and tokens a side of a training crop of stage 2: two latents of its proxy after the first, and
        one and a half windows, so that windows have neighbours."""
        side = max(max(h, w) for _, h, w in self.detail.windows)
        multiple = int(self.detail.max_ratio)
        return 2 * self.proxy.time_ratio + 1, -(-(3 * side // 2) // multiple) * multiple

    @property
    def training_ratios(self) -> list[Fraction]:
        """The ratios r_s that stage 2 trains at, those at which a crop is of whole proxy tokens: from the smallest that
        several levels take (the root of the largest) or `min_ratio`, to the largest, which is drawn twice as often."""
        _, tokens = self.training_crop
        fewest = math.ceil(tokens / self.detail.max_ratio)
        smallest = max(self.detail.min_ratio, math.sqrt(self.detail.max_ratio))
        return [Fraction(tokens, proxy) for proxy in range(max(fewest, int(tokens / smallest)), fewest - 1, -1)]


MAY_BE_ZERO = ("margin", "guidance_interval", "autoguidance", "ema", "still", "idle")
AT_MOST_ONE = ("strength", "guidance_interval", "ema", "position_scale")


def window_cycle(shapes: Sequence[Shape], shifted: bool = True) -> tuple[Layout, ...]:
    """Layouts that blocks cycle through: each shape plain, then, where `shifted`, shifted by half."""
    return tuple((shape, moved) for shape in shapes for moved in ((False, True) if shifted else (False,)))


def presets_folder() -> Path:
    """`presets/`: inside the installed package, or beside it in a checkout."""
    inside = Path(__file__).parent / "presets"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "presets"


def preset_names() -> list[str]:
    return sorted(p.stem for p in presets_folder().glob("*.toml"))


def load_preset(name: str) -> Preset:
    """A shipped preset by name, or any preset by the path of its .toml file. Raises UsageError."""
    path = Path(name) if name.endswith(".toml") else presets_folder() / f"{name}.toml"
    if not path.is_file():
        raise UsageError(f"there is no preset {name!r}; choose one of {', '.join(preset_names())} or give a .toml file")
    try:
        table = tomli.loads(path.read_text(encoding="utf-8"))
    except (tomli.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"preset {path} is not valid TOML ({error}); mend that line") from None
    table |= {"name": path.stem, "folder": path.parent / str(table.get("model", path.stem))}
    preset = _parse(Preset, table, path.name)
    if preset.vae.still > (len(preset.vae.dim_mult) if preset.vae.is_residual else 0):
        raise UsageError(f"{path.name}: vae: still must be at most its levels, and 0 where is_residual is false")
    if preset.vae.idle > preset.vae.num_res_blocks:
        raise UsageError(f"{path.name}: vae: idle must be at most num_res_blocks, since the first block always works")
    if preset.proxy.autoguidance and (preset.experts or not preset.proxy.lora):
        raise UsageError(f"{path.name}: proxy: autoguidance needs a lora, and one transformer; leave it out")
    proxy, detail = (_beside(stage, "lora", path.parent) for stage in (preset.proxy, preset.detail))
    experts = preset.experts and _beside(preset.experts, "lora", path.parent)
    first, upper = (_beside(level, "entry", path.parent) for level in (detail.first, detail.upper))
    detail = dataclasses.replace(detail, first=first, upper=upper)
    preset = dataclasses.replace(preset, proxy=proxy, detail=detail, experts=experts)
    for name, level in (("first", preset.detail.first), ("upper", preset.detail.upper)):
        if level.guidance_interval[0] > level.guidance_interval[1]:
            raise UsageError(f"{path.name}: detail: {name}: guidance_interval must go from its lower end to its upper")
        if level.entry and not (preset.vae.is_residual and level.upsample == "pixels" and level.strength < 1):
            raise UsageError(
                f"{path.name}: detail: {name}: entry needs is_residual = true, upsample = 'pixels', strength < 1"
            )
        if preset.experts and level.strength > preset.experts.boundary:
            raise UsageError(f"{path.name}: detail: {name}: strength must not be above the boundary of the experts")
    return preset


def _beside(part: Any, key: str, folder: Path) -> Any:
    """A part whose file `key` is in `folder`, beside the preset, where it is there; else in the model's folder."""
    beside = folder / (getattr(part, key) or "")
    return dataclasses.replace(part, **{key: str(beside.absolute())}) if beside.is_file() else part


def _parse(kind: Any, value: Any, where: str) -> Any:
    """`value` as `kind`, refusing unknown and missing keys and wrong types by name."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise UsageError(f"{where} must be a table")
        hints = typing.get_type_hints(kind)
        fields = {f.name: f for f in dataclasses.fields(kind)}
        if unknown := sorted(set(value) - set(fields)):
            raise UsageError(f"{where} has the unknown key {unknown[0]!r}; it knows {', '.join(fields)}")
        neither = (dataclasses.MISSING, dataclasses.MISSING)
        required = [n for n, f in fields.items() if (f.default, f.default_factory) == neither]
        if missing := [n for n in required if n not in value]:
            raise UsageError(f"{where} lacks the key {missing[0]!r}; add it")
        return kind(**{k: _parse(hints[k], v, f"{where}: {k}") for k, v in value.items()})
    if origin is tuple:
        kinds = arguments[:1] * len(value) if isinstance(value, list) and arguments[-1] is Ellipsis else arguments
        if not isinstance(value, list) or len(value) != len(kinds) or not value:
            raise UsageError(f"{where} must be a list of {len(kinds) or 'some'} values")
        return tuple(_parse(k, v, where) for k, v in zip(kinds, value, strict=True))
    if origin is types.UnionType:
        return _parse(arguments[0], value, where)
    if origin is Literal:
        if value not in arguments:
            raise UsageError(f"{where} is {value!r}; choose one of {', '.join(arguments)}")
        return value
    is_flag = isinstance(value, bool)  # which Python takes for a number
    if kind is float and isinstance(value, int) and not is_flag:
        value = float(value)
    if not isinstance(value, kind) or is_flag != (kind is bool):
        raise UsageError(f"{where} must be of type {kind.__name__}, not {value!r}")
    if kind in (int, float) and not (value >= 0 if where.endswith(MAY_BE_ZERO) else value > 0):
        raise UsageError(f"{where} must be {'0 or ' if where.endswith(MAY_BE_ZERO) else ''}above 0, not {value!r}")
    if kind is float and not math.isfinite(value):
        raise UsageError(f"{where} must be finite, not {value!r}")
    if where.endswith("max_ratio") and value <= 1:
        raise UsageError(f"{where} must be above 1, not {value!r}")
    if where.endswith(AT_MOST_ONE) and value > 1:
        raise UsageError(f"{where} must be 1 or less, not {value!r}")
    return value
