"""One chunk of a tensor: found in its file, checked, and read into a tensor, whole or only the bytes asked for."""

# torch's views of buffers are only partly annotated.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch

from ckpt_core.errors import DamagedError
from ckpt_core.format import dtypes
from ckpt_core.format.digests import crc32
from ckpt_core.format.index import Shape, Span
from ckpt_core.format.payload import Payload, locate
from ckpt_core.format.source import Source, read_into

Run = tuple[int, int, int]

_SCRATCH_BYTES = 16 << 20
"""What is read at a time where the bytes cannot go straight to their place."""


def locate_chunk(file: Source, span: Span, dtype: str, sizes: Shape, where: str) -> Payload:
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
        target.copy_(_read_strided(file, payload, target.shape, offsets, where))
        return
    if target.dim() == 0:
        target, offsets = target.view(1), (0,)
    shape = payload.shape or (1,)
    whole, straight, found = tuple(target.shape) == shape, _is_straight(target, payload), 0
    for first, rows in _pieces(target, payload):
        box = target.narrow(0, first, rows)
        buffer = box if straight else torch.empty(box.shape, dtype=getattr(torch, payload.dtype))
        runs = _runs(shape, (offsets[0] + first, *offsets[1:]), tuple(box.shape))
        if whole:
            [(start, _, _)] = runs
            begin = payload.offset + start * buffer.element_size()
            found = read_digested(file, begin, raw_bytes(buffer), found, where)
        else:
            _read_runs(file, payload.offset, runs, buffer, where)
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
        rows = max(1, _SCRATCH_BYTES // max(1, row_bytes))
    for first in range(0, len(target), rows):
        yield first, min(rows, len(target) - first)


def _runs(shape: Shape, offsets: Shape, sizes: Shape) -> Iterator[Run]:
    """Yield where a box's elements lie without a gap: their first place in the chunk, in the box, and their number."""
    inner = len(shape)
    while inner > 0 and sizes[inner - 1] == shape[inner - 1]:
        inner -= 1  # whole rows of these dimensions follow each other
    outer = max(0, inner - 1)
    strides = [math.prod(shape[dimension + 1 :]) for dimension in range(len(shape))]
    length = math.prod(sizes[outer:])
    tail = sum(o * s for o, s in zip(offsets[outer:], strides[outer:], strict=True))
    places = product(*(range(o, o + n) for o, n in zip(offsets[:outer], sizes[:outer], strict=True)))
    for number, place in enumerate(places):
        yield sum(i * s for i, s in zip(place, strides, strict=False)) + tail, number * length, length


def _read_runs(file: Source, base: int, runs: Iterator[Run], box: torch.Tensor, where: str) -> None:
    """Read a part of a chunk that begins at byte `base`; runs with small gaps between them come in one read."""
    target, item = raw_bytes(box), box.element_size()
    for group in _groups(runs, file.gap_bytes // item, _SCRATCH_BYTES // item):
        (first, place, length), (last, _, rest) = group[0], group[-1]
        if len(group) == 1:
            read_into(file, base + first * item, target[place * item : (place + length) * item], where)
            continue
        scratch = memoryview(bytearray((last + rest - first) * item))
        read_into(file, base + first * item, scratch, where)
        for start, place, length in group:
            begin = (start - first) * item
            target[place * item : (place + length) * item] = scratch[begin : begin + length * item]


def _groups(runs: Iterator[Run], gap: int, limit: int) -> Iterator[list[Run]]:
    """Group runs that follow each other with at most `gap` elements between, in at most `limit` elements."""
    group: list[Run] = []
    for run in runs:
        start, _, length = run
        if group and (start - group[-1][0] - group[-1][2] > gap or start + length - group[0][0] > limit):
            yield group
            group = []
        group.append(run)
    yield group


def _read_strided(file: Source, payload: Payload, sizes: torch.Size, offsets: Shape, where: str) -> torch.Tensor:
    """Return a part of a chunk whose elements do not lie in row-major order: all of it is read."""
    raw = torch.empty(payload.nbytes, dtype=torch.uint8)
    check_crc32(payload, read_digested(file, payload.offset, raw_bytes(raw), 0, where), where)
    chunk = raw.view(getattr(torch, payload.dtype)).as_strided(payload.shape, payload.stride, payload.storage_offset)
    if not payload.shape:
        return chunk.reshape(sizes)
    for dimension, (start, length) in enumerate(zip(offsets, sizes, strict=True)):
        chunk = chunk.narrow(dimension, start, length)
    return chunk


def read_digested(file: Source, offset: int, buffer: memoryview, found: int, where: str) -> int:
    """Fill `buffer`; return the CRC32 of what came before and of it, taken while its bytes are in the cache."""
    for start in range(0, len(buffer), file.block_bytes):
        block = buffer[start : start + file.block_bytes]
        read_into(file, offset + start, block, where)
        found = crc32(block, found)
    return found


def check_crc32(payload: Payload, found: int, where: str) -> None:
    """Compare the CRC32 of all of a chunk's bytes with the one that was stored with them, if there is one.

    Raises:
        DamagedError: they differ.
    """
    if payload.crc32 and found != payload.crc32:
        raise DamagedError(
            f"{where}: its bytes have CRC32 {found:08x}, {payload.crc32:08x} was stored with them; restore a copy "
            "of the file or load an older step."
        )


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a row-major tensor on the CPU."""
    array: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)
