"""The header of a safetensors file is read strictly."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile_files import cheap
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from ckpt_core import safetensors_header
from ckpt_core.errors import DamagedError
from ckpt_core.safetensors_header import read_header

ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
TWO = {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}


def write(path: Path, header: Any, data: bytes = bytes(16)) -> Path:
    """Write a file of a header, as JSON or as bytes, and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_what_safetensors_writes(tmp_path: Path) -> None:
    """Types, shapes and places of tensors are read as safetensors wrote them, scalars and empty ones too."""
    tensors = {
        "a": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
        "b": torch.tensor(3.0),
        "c": torch.empty(0, 4),
        "d": torch.ones(3).to(torch.float8_e4m3fn),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    found = read_header(tmp_path / "x.safetensors")
    data = (tmp_path / "x.safetensors").read_bytes()
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        entry = found[name]
        assert (entry.dtype, entry.shape) == (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        stored = data[entry.offset : entry.offset + entry.nbytes]
        assert stored == bytes(tensor.reshape(-1).view(torch.uint8).numpy())


def test_types_that_torch_packs(tmp_path: Path) -> None:
    """Types of less than a byte have a size, and no name in torch."""
    header = {"x": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}
    [tensor] = read_header(write(tmp_path / "x.safetensors", header, bytes(2))).values()
    assert (tensor.code, tensor.dtype, tensor.nbytes) == ("F4", None, 2)


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ({"a": ONE}, "the file has 16"),
        ({"a": TWO}, "a gap"),
        ({"a": ONE, "b": {**TWO, "data_offsets": [4, 12]}}, "an overlap"),
        ({"a": ONE, "b": {**TWO, "data_offsets": [0, 8]}}, "an overlap"),
        ({"a": ONE, "b": {**TWO, "data_offsets": [8, 24], "shape": [4]}}, "the file has 16"),
        ({"a": ONE, "b": {**TWO, "data_offsets": [16, 8]}}, "needs"),
        ({"a": ONE, "b": {**TWO, "data_offsets": [-8, 0]}}, "no list of sizes"),
        ({"a": ONE, "b": {**TWO, "data_offsets": [8, 2**70]}}, "no list of sizes"),
        ({"a": ONE, "b": {**TWO, "data_offsets": [8.0, 16]}}, "no list of sizes"),
        ({"a": ONE, "b": {**TWO, "data_offsets": [8]}}, "not enough values"),
        ({"a": ONE, "b": {**TWO, "shape": [3]}}, "needs 12"),
        ({"a": ONE, "b": {**TWO, "shape": [2**30, 2**31]}}, "needs"),
        ({"a": ONE, "b": {**TWO, "shape": [2**40, 2**40]}}, "more elements"),
        ({"a": ONE, "b": {**TWO, "shape": [2**61] * 20}}, "more elements"),
        ({"a": ONE, "b": {**TWO, "shape": [True, 2]}}, "no list of sizes"),
        ({"a": ONE, "b": {**TWO, "shape": [2] + [1] * 64}}, "no list of sizes"),
        ({"a": ONE, "b": {**TWO, "dtype": "F33"}}, "F33"),
        ({"a": ONE, "b": {**TWO, "dtype": 32}}, "32"),
        ({"a": ONE, "b": {"dtype": "F4", "shape": [3], "data_offsets": [8, 9]}}, "needs 1.5"),
        ({"a": ONE, "b": {**TWO, "more": 1}}, "expected dtype, shape and data_offsets"),
        ({"a": ONE, "b": {"dtype": "F32", "shape": [2]}}, "expected dtype, shape and data_offsets"),
        ({"a": ONE, "b": 5}, "int"),
        ({"a": ONE, "b" * 1025: TWO}, "a name of 1025"),
        ({"a": ONE, "b": TWO, "__metadata__": {"x": 1}}, "no text"),
        ({"a": ONE, "b": TWO, "__metadata__": [1]}, "list"),
        (b'{"a":1,"a":2}', "twice"),
        (b"[1]", "list"),
        (b"{", "JSONDecodeError"),
        (b"\xff\xfe", "UnicodeDecodeError"),
        (b"[" * 100_000, "RecursionError"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "digits"),
    ],
)
def test_what_is_refused(tmp_path: Path, header: Any, said: str) -> None:
    """Gaps, overlaps, sizes that do not fit and anything that is no header are refused, by name and cheaply."""
    path = write(tmp_path / "x.safetensors", header)
    with cheap(), pytest.raises(DamagedError, match=r"x\.safetensors") as caught:
        read_header(path)
    assert said in str(caught.value)


def test_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The header, its metadata and the number of tensors have limits."""
    good = {"a": ONE, "b": TWO, "__metadata__": {"key": "value"}}
    path = write(tmp_path / "x.safetensors", good)
    assert len(read_header(path)) == 2
    for name in ("MAX_HEADER_BYTES", "MAX_METADATA_BYTES", "MAX_TENSORS"):
        with monkeypatch.context() as patch:
            patch.setattr(safetensors_header, name, 1)
            with pytest.raises(DamagedError):
                read_header(path)


@pytest.mark.parametrize("length", [0, 17, 2**31, 2**63, 2**64 - 1])
def test_the_headers_length(tmp_path: Path, length: int) -> None:
    """A header of no bytes, or of more than there are, takes no memory."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}" + bytes(14))
    with cheap(), pytest.raises(DamagedError, match="a header of"):
        read_header(path)


def test_no_file(tmp_path: Path) -> None:
    """A file that is not there, a directory, and one of less than a length are refused."""
    (tmp_path / "directory").mkdir()
    (tmp_path / "short").write_bytes(b"1234")
    for name in ("missing", "directory", "short"):
        with pytest.raises(DamagedError, match=name):
            read_header(tmp_path / name)


@settings(deadline=None)
@given(st.binary(max_size=80), st.integers(0, 200), st.integers(0, 255))
def test_any_bytes(tmp_path_factory: pytest.TempPathFactory, tail: bytes, place: int, value: int) -> None:
    """Whatever a byte is changed to, the header is read as tensors inside the file, or refused."""
    header = bytearray(json.dumps({"a": ONE, "b": TWO}).encode())
    header[place % len(header)] = value
    path = write(tmp_path_factory.getbasetemp() / "any.safetensors", bytes(header), bytes(16) + tail)
    try:
        found = read_header(path)
    except DamagedError:
        return
    assert sum(tensor.nbytes for tensor in found.values()) == 16 + len(tail)
