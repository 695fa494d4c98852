"""Xorbs, the containers in which Xet moves data: chunks in a row, each a header of 8 bytes and its packed bytes.

A chunk's header is a version (0), the packed size in 3 bytes, how it is packed, and the unpacked size in 3 bytes, all
little-endian. A footer that some clients append begins with another byte than 0.
"""

import mmap
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import cast

import numpy as np

from ckpt_core.testing.hub_names import Refusal

_HEADER = 8
_PLAIN, _LZ4, _GROUPED_LZ4 = 0, 1, 2


@dataclass(frozen=True)
class Chunk:
    """Where a chunk lies in its xorb, header included (`end` exclusive), how it is packed, and its unpacked size."""

    start: int
    end: int
    packing: int
    size: int


class Xorb:
    """The bytes of one xorb."""

    def __init__(self, data: bytes | mmap.mmap) -> None:
        self._data = data

    @classmethod
    def open(cls, path: Path) -> "Xorb":
        """Map a xorb's file."""
        with path.open("rb") as file:
            return cls(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

    @cached_property
    def chunks(self) -> list[Chunk]:
        """The chunks in order; refused with 400 where they are not whole."""
        data, start, chunks = self._data, 0, list[Chunk]()
        while start + _HEADER <= len(data) and data[start] == 0:
            end = start + _HEADER + int.from_bytes(data[start + 1 : start + 4], "little")
            size = int.from_bytes(data[start + 5 : start + 8], "little")
            if end > len(data):
                raise Refusal(400, f"The xorb ends within chunk {len(chunks)}")
            chunks.append(Chunk(start, end, data[start + 4], size))
            start = end
        if not chunks:
            raise Refusal(400, "The xorb has no chunk")
        return chunks

    def unpack(self, chunk: Chunk) -> bytes:
        """Return a chunk's own bytes; refused with 400 where they cannot be unpacked."""
        packed = self._data[chunk.start + _HEADER : chunk.end]
        if chunk.packing == _PLAIN:
            return packed
        if chunk.packing not in (_LZ4, _GROUPED_LZ4):
            raise Refusal(400, f"The xorb has a chunk packed in an unknown way: {chunk.packing}")
        try:
            unpacked = _decompress(packed, chunk.size)
        except (OSError, ValueError) as problem:
            raise Refusal(400, f"The xorb has a chunk that cannot be unpacked: {problem}") from None
        return _ungroup(unpacked) if chunk.packing == _GROUPED_LZ4 else unpacked


def _decompress(packed: bytes, size: int) -> bytes:
    import pyarrow as pa  # pyright: ignore[reportMissingTypeStubs]  it has none

    decompress = cast("Callable[..., bytes]", pa.decompress)  # pyright: ignore[reportUnknownMemberType]
    return decompress(packed, size, codec="lz4", asbytes=True)


def _ungroup(grouped: bytes) -> bytes:
    """Undo the grouping of bytes by their position in words of four."""
    source, target = np.frombuffer(grouped, np.uint8), np.empty(len(grouped), np.uint8)
    start = 0
    for position in range(4):
        count = len(target[position::4])
        target[position::4] = source[start : start + count]
        start += count
    return target.tobytes()
