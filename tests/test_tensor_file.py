"""A hostile file is refused before it costs memory, and what is saved comes back."""

import json
import os
import resource
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from atlasvid_cli import tensor_file
from atlasvid_cli.errors import InputError, ResourceError

DTYPES = [getattr(torch, name) for name, _ in tensor_file.DTYPES.values()]
QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def raw(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: str = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def make(shape: list[int], dtype: torch.dtype) -> torch.Tensor:
    return (torch.arange(int(torch.tensor(shape).prod()) if shape else 1) % 100).reshape(shape).to(dtype)


@QUICK
@given(
    specs=st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda s: s != "__metadata__"),
        st.tuples(st.lists(st.integers(0, 4), max_size=4), st.sampled_from(DTYPES)),
        max_size=5,
    ),
    metadata=st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=4),
)
def test_round_trip_and_equal_bytes(tmp_path: Path, specs: dict, metadata: dict) -> None:
    tensors = {name: make(shape, dtype) for name, (shape, dtype) in specs.items()}
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    tensor_file.save_tensors(first, tensors, metadata)
    tensor_file.save_tensors(second, dict(reversed(list(tensors.items()))), dict(reversed(list(metadata.items()))))
    assert first.read_bytes() == second.read_bytes()
    loaded, found = tensor_file.open_tensors(first)
    assert found == metadata
    reference = load_file(first)
    assert loaded.keys() == tensors.keys() == reference.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor)
        assert torch.equal(reference[name], tensor)


def test_non_contiguous_tensors_keep_their_values(tmp_path: Path) -> None:
    tensor = torch.arange(12.0).reshape(3, 4).T
    tensor_file.save_tensors(tmp_path / "a", {"x": tensor}, {})
    assert torch.equal(tensor_file.open_tensors(tmp_path / "a")[0]["x"], tensor)


@QUICK
@given(cut=st.integers(0, 10_000), grow=st.booleans())
def test_truncated_or_grown_files_are_refused(tmp_path: Path, cut: int, grow: bool) -> None:
    path = tmp_path / "a"
    tensor_file.save_tensors(path, {"x": torch.ones(8), "y": torch.ones(3, dtype=torch.bfloat16)}, {"k": "v"})
    data = path.read_bytes()
    path.write_bytes(data + b"\0" * (1 + cut % 9) if grow else data[: cut % len(data)])
    with pytest.raises(InputError, match="again"):
        tensor_file.open_tensors(path)


@QUICK
@given(data=st.binary(max_size=200))
def test_arbitrary_bytes_raise_input_errors_only(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a"
    for content in (data, len(data).to_bytes(8, "little") + data):
        path.write_bytes(content)
        try:
            tensor_file.open_tensors(path)
        except InputError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize(
    "header, data",
    [
        (b"[" * 100_000, b""),
        (b"not json", b""),
        (b"\xff\xfe", b""),
        ([1], b""),
        ({"x": 3}, b""),
        ({"x": entry("F4")}, b"\0" * 8),
        ({"x": entry(["F32"])}, b"\0" * 8),
        ({"x": entry(shape=[-2])}, b"\0" * 8),
        ({"x": entry(shape=[True, 2])}, b"\0" * 8),
        ({"x": entry(shape=[2.0])}, b"\0" * 8),
        ({"x": entry(shape=[1 << 61, 1 << 61], offsets=[0, 1 << 61])}, b"\0" * 8),
        ({"x": entry(shape=[1 << 40], offsets=[0, 1 << 42])}, b"\0" * 8),
        ({"x": entry(shape=[0, 1 << 62], offsets=[0, 0])}, b""),
        ({"x": entry(shape=[3])}, b"\0" * 8),
        ({"x": entry(offsets=[8, 16])}, b"\0" * 16),
        ({"x": entry(), "y": entry()}, b"\0" * 8),
        ({"x": entry(), "y": entry(offsets=[12, 20])}, b"\0" * 20),
        ({"x": entry(offsets=[0, 8, 16])}, b"\0" * 8),
        ({"x": entry() | {"more": 1}}, b"\0" * 8),
        ({"__metadata__": {"k": 1}}, b""),
        ({"__metadata__": []}, b""),
        (b'{"x":{"dtype":"F32","shape":[1' + b"0" * 5000 + b'],"data_offsets":[0,8]}}', b"\0" * 8),
        (b'{"x":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', b"\0" * 8),
    ],
)
def test_hostile_headers_are_refused(tmp_path: Path, header: object, data: bytes) -> None:
    with pytest.raises(InputError, match="sound safetensors"):
        tensor_file.open_tensors(raw(tmp_path / "a", header, data))


def test_header_length_is_checked_before_reading(tmp_path: Path) -> None:
    path = raw(tmp_path / "a", {}, length=1 << 30)
    with path.open("ab") as file:
        file.truncate(2 << 30)  # sparse: the claimed length exists, yet must not be read
    with pytest.raises(InputError, match="does not begin with a header"):
        tensor_file.read_header(path)
    with pytest.raises(InputError, match="does not begin with a header"):
        tensor_file.open_tensors(raw(tmp_path / "b", {}, length=2**64 - 1))


@pytest.mark.parametrize(
    "expect, words",
    [
        ({"x": ("BF16", None)}, "F32 where BF16"),
        ({"x": ("F32", (2, None))}, r"\[2, 3, 4\] where"),
        ({"x": ("F32", (2, 3, 5))}, r"\[2, 3, 5\]"),
        ({"x": ("F32", None), "y": ("F32", None)}, "lacks tensor 'y'"),
        ({}, "unknown tensor 'x'"),
    ],
)
def test_other_contents_are_refused(tmp_path: Path, expect: dict, words: str) -> None:
    tensor_file.save_tensors(tmp_path / "a", {"x": torch.zeros(2, 3, 4)}, {})
    assert tensor_file.open_tensors(tmp_path / "a", {"x": ("F32", (2, None, 4))})[0]["x"].shape == (2, 3, 4)
    with pytest.raises(InputError, match=words):
        tensor_file.open_tensors(tmp_path / "a", expect)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_values_are_refused(tmp_path: Path, value: float) -> None:
    tensor_file.save_tensors(tmp_path / "a", {"x": torch.tensor([0.0, value], dtype=torch.bfloat16)}, {})
    with pytest.raises(InputError, match="not finite"):
        tensor_file.open_tensors(tmp_path / "a")


def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", ".", "missing", "nul\0"):
        with pytest.raises(InputError):
            tensor_file.open_tensors(tmp_path / name)


def test_real_size_limit_becomes_a_resource_error(tmp_path: Path) -> None:
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, old[1]))
    try:
        with pytest.raises(ResourceError, match="disk is full"):
            tensor_file.save_tensors(tmp_path / "a", {"x": torch.zeros(10_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert list(tmp_path.iterdir()) == []


def test_an_artefact_says_what_is_needed(tmp_path: Path) -> None:
    metadata = {"format": "atlasvid-proxy", "preset": "tiny"}
    tensor_file.check_artefact(metadata, {"format": "atlasvid-proxy"}, tmp_path)
    with pytest.raises(InputError, match="says preset 'tiny', but 'wan' is needed"):
        tensor_file.check_artefact(metadata, {"preset": "wan"}, tmp_path)
    with pytest.raises(InputError, match="names no model"):
        tensor_file.check_artefact(metadata, {"model": "f00d"}, tmp_path)


def test_state_is_resumed_only_for_its_own_plan_and_whole(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    assert tensor_file.load_state(path, "plan") == (None, None)
    tensor_file.save_state(path, 7, {"x": torch.ones(4)}, "plan")
    state, warning = tensor_file.load_state(path, "plan")
    assert state is not None and state.step == 7 and torch.equal(state.tensors["x"], torch.ones(4)) and warning is None
    state, warning = tensor_file.load_state(path, "other")
    assert state is None and warning is not None and "other settings" in warning
    path.write_bytes(path.read_bytes()[:-1])
    state, warning = tensor_file.load_state(path, "plan")
    assert state is None and warning is not None and "starts over" in warning
    tensor_file.save_tensors(path, {}, {"format": "atlasvid-state", "key": "plan", "step": "x"})
    assert tensor_file.load_state(path, "plan")[0] is None
