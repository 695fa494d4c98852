"""One chunk of a tensor, read into a torch tensor: whole, or only the bytes asked for."""

# torch's views of buffers are only partly annotated.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from ckpt_core.format import dtypes
from ckpt_core.format.chunks import SCRATCH_BYTES, box_runs, check_crc32, read_digested, read_runs, read_strided
from ckpt_core.format.index import Shape
from ckpt_core.format.payload import Payload
from ckpt_core.format.source import Source


def read_box(file: Source, payload: Payload, target: torch.Tensor, offsets: Shape, where: str) -> None:
    """Read the box of `target.shape` elements from `offsets` of a stored chunk into `target`, casting if need be.

    A chunk that is read whole has its CRC32 checked, where the writer stored one; of a part, only the structure is
    checked, and only its bytes are read.

    Raises:
        DamagedError: the bytes do not have the CRC32 that was stored with them.
    """
    if target.numel() == 0:
        return
    if not payload.contiguous:
        _copy_strided(read_strided(file, payload, where), payload.dtype, target, offsets)
        return
    if target.dim() == 0:
        target, offsets = target.view(1), (0,)
    shape = payload.shape or (1,)
    whole, straight, found = tuple(target.shape) == shape, _is_straight(target, payload), 0
    for first, rows in _pieces(target, payload):
        box = target.narrow(0, first, rows)
        buffer = box if straight else torch.empty(box.shape, dtype=getattr(torch, payload.dtype), device="cpu")
        runs = box_runs(shape, (offsets[0] + first, *offsets[1:]), tuple(box.shape))
        if whole:
            [(start, _, _)] = runs
            begin = payload.offset + start * buffer.element_size()
            found = read_digested(file, begin, raw_bytes(buffer), found, where)
        else:
            read_runs(file, payload.offset, runs, raw_bytes(buffer), buffer.element_size(), where)
        if not straight:
            box.copy_(buffer)
    if whole:
        check_crc32(payload, found, where)


def _is_straight(target: torch.Tensor, payload: Payload) -> bool:
    """Whether the stored bytes are the target's, in its order."""
    same = target.dtype == getattr(torch, payload.dtype)
    return same and target.is_contiguous() and target.device.type == "cpu"


def _pieces(target: torch.Tensor, payload: Payload) -> Iterator[tuple[int, int]]:
    """Yield the first row and the number of rows of what is read at a time."""
    rows = len(target)
    if not _is_straight(target, payload):
        row_bytes = target[0].numel() * dtypes.ITEMSIZE[payload.dtype]
        rows = max(1, SCRATCH_BYTES // max(1, row_bytes))
    for first in range(0, len(target), rows):
        yield first, min(rows, len(target) - first)


def _copy_strided(words: Any, dtype: str, target: torch.Tensor, offsets: Shape) -> None:
    """Copy a box of a chunk whose elements do not lie in row-major order."""
    box = words[tuple(slice(o, o + n) for o, n in zip(offsets, target.shape, strict=True))]
    target.copy_(torch.from_numpy(np.array(box)).view(getattr(torch, dtype)))


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a row-major tensor on the CPU."""
    array: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)
