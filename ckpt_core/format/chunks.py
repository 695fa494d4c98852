"""One chunk of a tensor: found in its file, checked, and read, whole or only the bytes asked for. Without torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from ckpt_core.errors import DamagedError
from ckpt_core.format import dtypes
from ckpt_core.format.digests import crc32
from ckpt_core.format.index import Shape, Span
from ckpt_core.format.payload import Payload, locate
from ckpt_core.format.source import Source, read_into

Run = tuple[int, int, int]
"""Elements without a gap: their first place in a chunk, their first place in a box, and their number."""

Words = NDArray[np.generic]
"""Elements of any type, as unsigned integers of their size."""

SCRATCH_BYTES = 16 << 20
"""What is read at a time where the bytes cannot go straight to their place."""

_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.complex128}


def words_of(dtype: str) -> Any:
    """Return numpy's type of elements as large as those of `dtype`, to move them without knowing what they mean."""
    return _WORDS[dtypes.ITEMSIZE[dtype]]


def bytes_of(words: Words) -> memoryview:
    """Return the memory of an array in row-major order."""
    flat: Any = words.reshape(-1).view(np.uint8)
    return memoryview(flat)


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


def read_part(file: Source, payload: Payload, shape: Shape, offsets: Shape, sizes: Shape, where: str) -> Words:
    """Return a box of a chunk in row-major order, of which only the box's bytes are read; its CRC32 is not looked at.

    Args:
        file: to read.
        payload: where the chunk's elements lie.
        shape: how many there are along each axis; any shape of as many elements will do, but one without axes.
        offsets: where the box begins.
        sizes: of the box.
        where: for errors.
    """
    box = np.empty(sizes, words_of(payload.dtype))
    if box.size:
        read_runs(file, payload.offset, box_runs(shape, offsets, sizes), bytes_of(box), box.itemsize, where)
    return box


def read_strided(file: Source, payload: Payload, where: str) -> Words:
    """Return a chunk whose elements do not lie in row-major order, checked.

    Raises:
        DamagedError: its bytes do not have the CRC32 that was stored with them.
    """
    raw = np.empty(payload.nbytes, np.uint8)
    check_crc32(payload, read_digested(file, payload.offset, bytes_of(raw), 0, where), where)
    words = raw.view(words_of(payload.dtype))[payload.storage_offset :]
    return as_strided(words, payload.shape, [step * words.itemsize for step in payload.stride], writeable=False)


def box_runs(shape: Shape, offsets: Shape, sizes: Shape) -> Iterator[Run]:
    """Yield the runs of a box of a chunk of `shape`, in the box's order."""
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


def read_runs(file: Source, base: int, runs: Iterator[Run], target: memoryview, item: int, where: str) -> None:
    """Read runs of a chunk that begins at byte `base`; those with small gaps between them come in one read.

    Args:
        file: to read.
        base: where the chunk's elements begin in it.
        runs: in the order of their places in the chunk.
        target: the bytes of the box, in row-major order.
        item: the bytes of one element.
        where: for errors.
    """
    for group in _groups(runs, file.gap_bytes // item, SCRATCH_BYTES // item):
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


def check_chunk(file: Source, payload: Payload, where: str) -> None:
    """Read all of a chunk and compare its CRC32 with the one that was stored with it, if there is one.

    Raises:
        DamagedError: they differ.
    """
    if not payload.crc32:
        return
    block, found = np.empty(min(file.block_bytes, payload.nbytes), np.uint8), 0
    for start in range(0, payload.nbytes, file.block_bytes):
        part = bytes_of(block)[: payload.nbytes - start]
        read_into(file, payload.offset + start, part, where)
        found = crc32(part, found)
    check_crc32(payload, found, where)


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
