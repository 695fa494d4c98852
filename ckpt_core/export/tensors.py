"""Stored tensors, streamed: block after block in row-major order, whatever boxes they were saved in."""

# torch's views of buffers are only partly annotated.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

import torch

from ckpt_core.format import dtypes
from ckpt_core.format.index import Chunk, Shape, TensorEntry
from ckpt_core.format.payload import Payload
from ckpt_core.format.source import Source, open_source
from ckpt_core.io.chunks import check_crc32, locate_chunk, raw_bytes, read_box, read_digested

if TYPE_CHECKING:
    from ckpt_core.urls import Place

BLOCK_BYTES = 8 << 20
_OPEN_FILES = 64


class ShardFiles:
    """The open `.distcp` files of one DCP directory, for reading tensors in blocks."""

    def __init__(self, directory: Place) -> None:
        self._directory = directory
        self._files: OrderedDict[str, Source] = OrderedDict()

    def __enter__(self) -> ShardFiles:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    def blocks(self, name: str, entry: TensorEntry) -> Iterator[torch.Tensor]:
        """Yield the elements of a tensor, flat and in order, at most `BLOCK_BYTES` at a time.

        The CRC32 of each chunk, where one was stored, has been checked when its last block was yielded.

        Raises:
            DamagedError: the files do not hold what the index says.
        """
        if math.prod(entry.shape) == 0:
            return
        streams = [self._stream(name, entry, chunk) for chunk in entry.chunks if math.prod(chunk.sizes)]
        for outer, start, sizes in _boxes(entry.shape or (1,), dtypes.ITEMSIZE[entry.dtype]):
            block = torch.empty(sizes, dtype=getattr(torch, entry.dtype))
            for stream in streams:
                stream.fill(block, outer, start)
            yield block.reshape(-1)

    def _stream(self, name: str, entry: TensorEntry, chunk: Chunk) -> _Stream:
        where = f"{self._directory / chunk.span.file}: {name}"
        payload = locate_chunk(self.open(chunk.span.file), chunk.span, entry.dtype, chunk.sizes, where)
        return _Stream(self, chunk.span.file, payload, chunk.offsets or (0,), chunk.sizes or (1,), where)

    def open(self, name: str) -> Source:
        """Return an open file; those used last stay open, however many ranks saved."""
        if name not in self._files:
            if len(self._files) >= _OPEN_FILES:
                self._files.popitem(last=False)[1].close()
            self._files[name] = open_source(self._directory / name)
        self._files.move_to_end(name)
        return self._files[name]


def _boxes(shape: Shape, item: int) -> Iterator[tuple[Shape, int, Shape]]:
    """Yield boxes that follow each other in row-major order.

    Each is given by the indices of the first dimensions, in which its size is one, by its first row in the next
    dimension, and by its sizes from that dimension on.
    """
    split = 0
    while split < len(shape) - 1 and math.prod(shape[split + 1 :]) * item > BLOCK_BYTES:
        split += 1
    rows = max(1, BLOCK_BYTES // (math.prod(shape[split + 1 :]) * item))
    for outer in product(*(range(size) for size in shape[:split])):
        for start in range(0, shape[split], rows):
            yield outer, start, (min(rows, shape[split] - start), *shape[split + 1 :])


@dataclass(slots=True)
class _Stream:
    """A chunk that is read from its first byte to its last: whoever goes through the tensor in order does that."""

    files: ShardFiles
    name: str
    payload: Payload
    offsets: Shape
    sizes: Shape
    where: str
    done: int = 0
    crc32: int = 0
    whole: torch.Tensor | None = None
    """All of a chunk whose elements do not lie in row-major order."""

    def fill(self, block: torch.Tensor, outer: Shape, start: int) -> None:
        """Fill what a block has of this chunk; the block begins at `outer` and, in the next dimension, `start`."""
        split = len(outer)
        inside = zip(outer, self.offsets, self.sizes, strict=False)
        first = max(start, self.offsets[split])
        last = min(start + len(block), self.offsets[split] + self.sizes[split])
        if first >= last or not all(offset <= index < offset + size for index, offset, size in inside):
            return
        box = block.narrow(0, first - start, last - first)
        for dimension in range(split + 1, len(self.sizes)):
            box = box.narrow(dimension - split, self.offsets[dimension], self.sizes[dimension])
        if self.payload.contiguous:
            self._read_next(box)
        else:
            within = tuple(index - offset for index, offset in zip(outer, self.offsets, strict=False))
            box.copy_(self._read_whole()[within].narrow(0, first - self.offsets[split], last - first))

    def _read_whole(self) -> torch.Tensor:
        if self.whole is None:
            self.whole = torch.empty(self.sizes, dtype=getattr(torch, self.payload.dtype))
            target = self.whole.view(self.payload.shape)
            read_box(self.files.open(self.name), self.payload, target, (0,) * target.dim(), self.where)
        return self.whole

    def _read_next(self, box: torch.Tensor) -> None:
        rows = box if box.is_contiguous() else torch.empty(box.shape, dtype=box.dtype)
        offset = self.payload.offset + self.done
        self.crc32 = read_digested(self.files.open(self.name), offset, raw_bytes(rows), self.crc32, self.where)
        self.done += rows.nbytes
        if self.done == self.payload.nbytes:
            check_crc32(self.payload, self.crc32, self.where)
        if rows is not box:
            box.copy_(rows)
