"""Weights are found here or fetched whole, and what is not the preset's is refused before that."""

import dataclasses
import errno
import json
import shutil
from fnmatch import fnmatch
from pathlib import Path

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from atlasvid_cli.errors import InputError, ResourceError
from atlasvid_cli.hub import BROKEN_OFF, folder_here, is_whole, model_folder
from atlasvid_cli.original import LIST_OF_FILES, VAE
from atlasvid_cli.presets import load_preset


def test_a_local_folder_is_taken_as_it_is(stock_preset, tmp_path):
    preset = load_preset(str(stock_preset))
    assert model_folder(preset, None) == stock_preset.with_suffix("")
    with pytest.raises(InputError, match=r"model_index\.json"):
        model_folder(preset, str(tmp_path))
    with pytest.raises(InputError, match="does not exist"):
        model_folder(preset, str(tmp_path / "nowhere"))


class Hub:
    """A repository with the files of `folder`, none of them in the cache; `asked` is what was fetched or looked for."""

    def __init__(self, monkeypatch, folder, cache):
        self.folder, self.cache, self.asked = folder, cache, []
        monkeypatch.setattr("atlasvid_cli.hub.snapshot_download", self.fetch)
        monkeypatch.setattr("atlasvid_cli.hub.list_repo_files", self.listed)

    def files(self):
        return [str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file()]

    def listed(self, name, revision):
        return self.files()

    def fetch(self, name, revision, allow_patterns, local_files_only=False):
        self.asked.append((name, revision, "cache" if local_files_only else " ".join(allow_patterns)))
        if local_files_only and not self.cache.exists():
            raise LocalEntryNotFoundError("not there")
        for file in self.files():
            if not local_files_only and any(fnmatch(file, pattern) for pattern in allow_patterns):
                (self.cache / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self.folder / file, self.cache / file)
        return str(self.cache)


ALL = " ".join(LIST_OF_FILES)


def test_hub_weights_are_sought_at_the_pinned_revision_in_the_cache_first_and_configs_before_weights(
    monkeypatch, stock, stock_preset, tmp_path
):
    hub = Hub(monkeypatch, stock, tmp_path / "cache")
    preset = dataclasses.replace(
        load_preset(str(stock_preset)), model="some/one", folder=Path("some/one"), revision="v1"
    )
    assert folder_here(preset, None) is None and model_folder(preset, None) == hub.cache
    name = ("some/one", "v1")
    assert hub.asked == [(*name, "cache")] * 2 + [(*name, "*.json"), (*name, ALL)]
    assert model_folder(preset, "some/one") == folder_here(preset, None) == hub.cache and len(hub.asked) == 6
    shutil.rmtree(hub.cache)
    assert model_folder(preset, "someone/else@v2") == hub.cache and hub.asked[-1] == ("someone/else", "v2", ALL)
    shutil.rmtree(hub.cache)
    assert model_folder(preset, "someone/else") == hub.cache and hub.asked[-1] == ("someone/else", "main", ALL)


def test_of_a_repository_the_vae_alone_is_fetched_where_that_is_all(monkeypatch, stock, stock_preset, tmp_path):
    hub = Hub(monkeypatch, stock, tmp_path / "cache")
    preset = dataclasses.replace(load_preset(str(stock_preset)), model="some/one", folder=Path("some/one"))
    for _ in range(2):
        assert model_folder(preset, None, only="vae") == hub.cache
        assert {path.parent.name for path in hub.cache.rglob("*.safetensors")} == {"vae"}
    assert hub.asked[-1][-1] == "cache"  # the second time
    assert model_folder(preset, None) == hub.cache and is_whole(hub.cache)


def test_a_snapshot_of_single_files_is_completed(monkeypatch, stock, stock_preset, tmp_path):
    hub = Hub(monkeypatch, stock, shutil.copytree(stock, tmp_path / "cache"))
    preset = dataclasses.replace(load_preset(str(stock_preset)), model="some/one", folder=Path("some/one"))
    assert is_whole(hub.cache) and model_folder(preset, None) == hub.cache and len(hub.asked) == 1
    [shard, *_] = sorted((hub.cache / "text_encoder").glob("*.safetensors"))
    shard.unlink()
    assert not is_whole(hub.cache) and model_folder(preset, None) == hub.cache and is_whole(hub.cache)


def test_a_repository_of_another_model_is_refused_before_its_weights_are_fetched(monkeypatch, stock, tmp_path):
    hub = Hub(monkeypatch, stock, tmp_path / "cache")
    with pytest.raises(InputError, match=r"the transformer in .* has dim = \d+ and preset wan2.1-1.3b says 1536"):
        model_folder(load_preset("wan2.1-1.3b"), "some/one")
    assert hub.asked[-1][-1] == "*.json"
    hub = Hub(monkeypatch, tmp_path / "gguf", tmp_path / "other")
    hub.folder.mkdir()
    (hub.folder / "model.safetensors").touch()
    with pytest.raises(InputError, match=r"the repository some/one holds no model .*another --model-path"):
        model_folder(load_preset("wan2.1-1.3b"), "some/one")
    assert hub.asked[-1][-1] == "*.json"
    (hub.folder / VAE).touch()  # one of Wan's original checkpoints
    sizes = {"dim": 5120, "num_heads": 40, "in_dim": 16, "out_dim": 16, "freq_dim": 256, "ffn_dim": 13824, "eps": 1e-6}
    (hub.folder / "config.json").write_text(json.dumps(sizes | {"num_layers": 40}))
    with pytest.raises(InputError, match=r"the transformer in .* has dim = 5120 and preset wan2.1-1.3b says 1536"):
        model_folder(load_preset("wan2.1-1.3b"), "some/one")
    assert hub.asked[-1][-1] == "*.json"
    for _ in range(2):  # the second time some weights are there
        assert model_folder(load_preset("wan2.1-14b"), "some/one") == hub.cache and hub.asked[-1][-1] == ALL


def test_a_full_disk_is_told_as_such_where_weights_are_fetched(monkeypatch):
    def fetch(name, local_files_only=False, **_):
        raise LocalEntryNotFoundError("not there") if local_files_only else OSError(errno.ENOSPC, "No space left")

    monkeypatch.setattr("atlasvid_cli.hub.snapshot_download", fetch)
    with pytest.raises(ResourceError, match=r"disk is full.*HF_HOME"):
        model_folder(load_preset("wan2.1-1.3b"), None)


def test_without_a_network_the_remedy_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match="hf download Wan-AI/Wan"):
        model_folder(load_preset("wan2.1-1.3b"), None)


def test_a_fetch_that_breaks_off_is_told_with_its_remedy(monkeypatch):
    def fetch(*names, local_files_only=False, **options):
        raise LocalEntryNotFoundError("not there") if local_files_only else BROKEN_OFF("peer closed connection")

    monkeypatch.setattr("atlasvid_cli.hub.snapshot_download", fetch)
    with pytest.raises(InputError, match=r"cannot be fetched \(\w+\); run `hf download"):
        model_folder(load_preset("wan2.1-1.3b"), None)
