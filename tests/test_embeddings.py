"""Embeddings come back from disk as they were made; what is damaged is made again."""

import torch

from atlasvid_cli.embeddings import Embedding, EmbeddingCache


def test_an_embedding_survives_the_disk(tmp_path):
    cache = EmbeddingCache(tmp_path / "deep" / "text")
    assert cache.read("a zebra") is None and not cache.has("a zebra")
    cache.write("a zebra", Embedding(torch.arange(6.0).view(3, 2), ("zebra",), "and more"))
    found = cache.read("a zebra")
    assert (
        found is not None and found[1:] == (("zebra",), "and more") and found.states.equal(torch.arange(6.0).view(3, 2))
    )
    assert cache.has("a zebra") and cache.read("a Zebra") is None


def test_a_damaged_file_counts_as_missing(tmp_path):
    cache = EmbeddingCache(tmp_path)
    cache.write("a", Embedding(torch.ones(1, 2), ()))
    (file,) = tmp_path.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-3])
    assert cache.read("a") is None and not cache.has("a")


def test_a_cache_that_cannot_be_looked_into_counts_as_empty(tmp_path):
    cache = EmbeddingCache(tmp_path / ("x" * 300))
    assert cache.read("a") is None and not cache.has("a")
