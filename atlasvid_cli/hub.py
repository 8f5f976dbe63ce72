"""Where a model's weights lie: a local folder, or a repository of the hub, which is looked at before it is fetched."""

import json
import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import list_repo_files, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

from . import original
from .errors import InputError, ResourceError
from .presets import Preset
from .store import FULL
from .weights import check_config, check_transformers

BROKEN_OFF: Any = HfHubHTTPError.__bases__[0]  # the HTTP library's own, which the hub's lets through
_NO_MODEL = (
    f"holds no model (it has no model_index.json, {original.VAE} or {original.VAE22}); give another --model-path"
)


def model_folder(preset: Preset, model_path: str | None, only: Literal["vae"] | None = None) -> Path:
    """The folder with the weights, or `only` with some: a local one, or a snapshot of a hub repository (`id` or
    `id@revision`), which is fetched where the hub's cache has it not.

    Raises InputError where there is none, or one of another layout or other sizes than the preset's, which its configs
    say before its weights are fetched.
    """
    if found := folder_here(preset, model_path, only):
        return found
    name, revision = _repository(preset, model_path)
    fetch = partial(snapshot_download, name, revision=revision)
    try:
        configs = Path(fetch(allow_patterns=["*.json"]))
        if (configs / "model_index.json").is_file():
            check_config(configs, preset)
        elif not {original.VAE, original.VAE22} & set(list_repo_files(name, revision=revision)):
            raise InputError(f"the repository {name} {_NO_MODEL}")
        else:
            check_transformers(configs, preset, original.sizes)
        return Path(fetch(allow_patterns=original.LIST_FOR_VAE if only else original.LIST_OF_FILES))
    except (BROKEN_OFF, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        if isinstance(error, OSError) and error.errno in FULL:
            raise ResourceError(
                f"the disk is full before {name} is fetched: free space, or set HF_HOME to a folder on another disk"
            ) from None
        raise InputError(
            f"the weights {name} (revision {revision}) are not whole in the hub cache and cannot be fetched"
            f" ({type(error).__name__}); run `hf download {name} --revision {revision}`, which continues a fetch,"
            " where there is a network, or give a folder by --model-path"
        ) from None


def folder_here(preset: Preset, model_path: str | None, only: Literal["vae"] | None = None) -> Path | None:
    """The folder with the weights, or `only` with some, where that needs no network: a local one, or a snapshot in the
    hub's cache that has them all. Raises InputError for what is neither a model folder nor a repository."""
    folder = Path(model_path) if model_path else preset.folder
    if folder.is_dir():
        if not (folder / "model_index.json").is_file() and not original.is_original(folder):
            raise InputError(f"{folder} {_NO_MODEL}")
        return folder
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+(@[\w.-]+)?", model_path or preset.model):
        state = "is no folder" if folder.exists() else "does not exist"
        raise InputError(f"{folder} {state}; give --model-path a model folder or a hub id")
    name, revision = _repository(preset, model_path)
    files = original.LIST_OF_FILES
    try:
        found = Path(snapshot_download(name, revision=revision, allow_patterns=files, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        return None
    return found if is_whole(found, only) else None


def _repository(preset: Preset, model_path: str | None) -> tuple[str, str]:
    """A repository of the hub and its revision: the one that the preset pins, or the newest of another."""
    name, _, revision = (model_path or preset.model).partition("@")
    return name, revision or (preset.revision if name == preset.model else None) or "main"


def is_whole(folder: Path, only: Literal["vae"] | None = None) -> bool:
    """Whether no weights of a model folder, or `only` of its VAE, are missing, as in a snapshot of which single files
    were fetched."""
    try:
        if original.is_original(folder):
            if only:
                return True
            indices = [index for home in original.homes(folder) for index in home.glob("*.index.json")]
            listed = all((index.parent / shard).is_file() for index in indices for shard in _shards(index))
            return original.is_whole(folder) and listed
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        parts = [name for name, kind in index.items() if isinstance(kind, list) and kind[0]]
        for part in (folder / name for name in parts if only in (None, name)):
            shards = {file for index in part.glob("*.index.json") for file in _shards(index)}
            has_weights = any(part.glob("*.safetensors")) or not (part / "config.json").is_file()
            if not (any(part.glob("*.json")) and has_weights and all((part / file).is_file() for file in shards)):
                return False
    except (OSError, ValueError, KeyError, AttributeError):
        return False
    return True


def _shards(index: Path) -> Iterable[str]:
    return json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
