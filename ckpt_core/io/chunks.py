"""One chunk of a tensor: found in its file, checked, and read into a tensor."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, BinaryIO

import torch
from isal import isal_zlib

from ckpt_core.errors import DamagedError
from ckpt_core.format.index import Shape, Span
from ckpt_core.format.payload import Payload, locate, read_into


def open_shard(path: Path) -> BinaryIO:
    """Open a `.distcp` file for reading.

    Raises:
        DamagedError: it is not there, or not a regular file.
    """
    if not path.is_file():
        raise DamagedError(f"{path}: missing, or not a regular file; restore a copy of the checkpoint.")
    return path.open("rb", buffering=0)


def locate_chunk(file: BinaryIO, span: Span, dtype: str, sizes: Shape, where: str) -> Payload:
    """Find a chunk's elements, and check that they are what the metadata says: `sizes` elements of `dtype`.

    Raises:
        DamagedError: the file holds something else there.
    """
    payload = locate(file, span, where)
    if (payload.dtype, payload.shape) != (dtype, sizes):
        raise DamagedError(
            f"{where}: the file holds {payload.dtype} {payload.shape}, the metadata says {dtype} {sizes}; they are of "
            "different saves: restore a copy of the checkpoint."
        )
    return payload


def read_box(file: BinaryIO, payload: Payload, target: torch.Tensor, offsets: Shape, where: str) -> None:
    """Read the box of `target.shape` elements from `offsets` of a stored chunk into `target`, casting if need be.

    A chunk that is read whole has its CRC32 checked, where the writer stored one.

    Raises:
        DamagedError: the bytes do not have the CRC32 that was stored with them.
    """
    dtype = getattr(torch, payload.dtype)
    if math.prod(payload.shape) == 0:
        return
    whole = payload.contiguous and tuple(target.shape) == payload.shape
    if whole and target.is_contiguous() and target.device.type == "cpu" and target.dtype == dtype:
        raw = target.reshape(-1).view(torch.uint8)
        _read_checked(file, payload, raw, where)
        return
    raw = torch.empty(payload.nbytes, dtype=torch.uint8)
    _read_checked(file, payload, raw, where)
    chunk = raw.view(dtype).as_strided(payload.shape, payload.stride, payload.storage_offset)
    for dimension, (start, length) in enumerate(zip(offsets, target.shape, strict=True)):
        chunk = chunk.narrow(dimension, start, length)
    target.copy_(chunk)


def _read_checked(file: BinaryIO, payload: Payload, raw: torch.Tensor, where: str) -> None:
    buffer: Any = memoryview(raw.numpy())  # pyright: ignore[reportArgumentType] - an array is a buffer
    read_into(file, payload.offset, buffer, where)
    if payload.crc32:
        found = isal_zlib.crc32(buffer)  # pyright: ignore[reportUnknownMemberType] - no annotations
        if found != payload.crc32:
            raise DamagedError(
                f"{where}: its bytes have CRC32 {found:08x}, {payload.crc32:08x} was stored with them; restore a copy "
                "of the file or load an older step."
            )
