"""Tensors written as `torch.save` writes them, without it."""

import io
import re
import warnings
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
from torch.utils.serialization import config

from ckpt_core.format.dtypes import NAMES
from ckpt_core.io import save
from ckpt_core.io.archive import Archive
from ckpt_core.io.chunks import raw_bytes

_ID = ".data/serialization_id"
SHAPES = [(10,), (), (2, 3), (0, 4), (3, 1, 5), (1,), (70_000,)]


def written(tensor: torch.Tensor) -> bytes:
    """What we write for a tensor."""
    archive, data = Archive(tensor.dtype, tuple(tensor.shape)), bytes(raw_bytes(tensor))
    return archive.head + data + archive.tail(zlib.crc32(data))


def of_torch(tensor: torch.Tensor) -> bytes:
    """What `torch.save` writes for it."""
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    return buffer.getvalue()


def without_id(data: bytes) -> bytes:
    """The bytes but for the digits of the serialization id, and their CRC32 in two places."""
    archive = zipfile.ZipFile(io.BytesIO(data))
    info = archive.getinfo(f"archive/{_ID}")
    digits, changed = archive.read(info), bytearray(data)
    start = data.index(digits, info.header_offset)
    entry = data.rindex(b"PK\x01\x02")
    for place, length in ((start, 40), (start + 44, 4), (entry + 16, 4)):
        changed[place : place + length] = bytes(length)
    return bytes(changed)


def filled(dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor of any dtype, with bytes in it."""
    size = torch.empty(shape, dtype=getattr(torch, dtype)).nbytes
    values = torch.arange(size) % (2 if dtype == "bool" else 251)
    return values.to(torch.uint8).view(getattr(torch, dtype)).view(shape)


def torch_saves(dtype: str) -> bool:
    """Whether `torch.save` takes tensors of this type: of some that hold plain bytes it does not."""
    try:
        with warnings.catch_warnings(action="ignore"):  # complex32 is experimental
            of_torch(torch.empty(1, dtype=getattr(torch, dtype)))
    except KeyError:
        return False
    return True


SAVED = [dtype for dtype in NAMES if torch_saves(dtype)]


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("dtype", SAVED)
def test_every_dtype_and_shape_is_as_torch_saves_it(dtype: str) -> None:
    """The bytes around the elements are those of `torch.save`, the id apart, and `torch.load` gives the tensor back."""
    for shape in SHAPES:
        tensor = filled(dtype, shape)
        ours = written(tensor)
        assert without_id(ours) == without_id(of_torch(tensor)), shape
        loaded = torch.load(io.BytesIO(ours), weights_only=True)
        assert (loaded.dtype, loaded.shape) == (tensor.dtype, tensor.shape)
        assert bytes(raw_bytes(loaded)) == bytes(raw_bytes(tensor))


def test_all_types_that_models_have_are_looked_at() -> None:
    """The test above sees them."""
    assert {"float32", "bfloat16", "float8_e4m3fn", "int64", "bool", "complex64", "uint16"} <= set(SAVED)


def test_a_large_tensor_is_as_torch_saves_it_with_pages() -> None:
    """From 4 MiB on, the bytes are those of `torch.save` when it is told to align storages to 4096 bytes."""
    tensor = torch.arange(1 << 20, dtype=torch.float32)
    with config.patch("save.storage_alignment", 4096):
        assert without_id(written(tensor)) == without_id(of_torch(tensor))
    assert len(Archive(tensor.dtype, tuple(tensor.shape)).head) % 4096 == 0


def test_elements_of_large_tensors_begin_with_a_page(tmp_path: Path) -> None:
    """Whatever lies in front of it in the file, a large tensor's first byte is at a multiple of 4096."""
    saved = {"a": torch.ones(5), "b": torch.full((1 << 20,), 2.0), "c": torch.ones(7), "d": torch.full((1 << 20,), 3.0)}
    save(saved, tmp_path)
    data = (tmp_path / "__0_0.distcp").read_bytes()
    for value in (2.0, 3.0):
        assert data.index(torch.full((64,), value).numpy().tobytes()) % 4096 == 0


@pytest.mark.long
@pytest.mark.timeout(600)
def test_four_gigabytes_are_as_torch_saves_them(tmp_path: Path) -> None:
    """Sizes and places beyond 32 bits are written as `torch.save` writes them."""
    tensor = torch.zeros((1 << 32) + 64, dtype=torch.uint8)
    with config.patch("save.storage_alignment", 4096):
        torch.save(tensor, tmp_path / "archive")  # the file's name becomes the archive's
    archive, size = Archive(tensor.dtype, tuple(tensor.shape)), (tmp_path / "archive").stat().st_size
    with (tmp_path / "archive").open("rb") as file:
        assert file.read(len(archive.head)) == archive.head
        file.seek(len(archive.head) + tensor.nbytes)
        rest = file.read()
    ours = archive.tail(zlib.crc32(raw_bytes(tensor)))
    assert len(archive.head) + tensor.nbytes + len(ours) == size
    digits = re.compile(rb"[0-9]{40}PK\x07\x08....", re.DOTALL)
    ours, rest = digits.sub(b"", ours), digits.sub(b"", rest)
    entry = rest.rindex(b"PK\x01\x02") + 16
    assert ours[:entry] + ours[entry + 4 :] == rest[:entry] + rest[entry + 4 :]
