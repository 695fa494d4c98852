"""Stored tensors, streamed: block after block in row-major order, whatever boxes they were saved in."""

# torch's views of buffers are only partly annotated.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from ckpt_core.format import dtypes
from ckpt_core.format.index import Chunk, TensorEntry
from ckpt_core.format.payload import Payload
from ckpt_core.format.source import Source, open_source, read_into
from ckpt_core.io.chunks import locate_chunk, read_box

if TYPE_CHECKING:
    from ckpt_core.urls import Place

BLOCK_BYTES = 8 << 20


class ShardFiles:
    """The open `.distcp` files of one DCP directory, for reading tensors in blocks."""

    def __init__(self, directory: Place) -> None:
        self._directory = directory
        self._files: dict[str, Source] = {}

    def __enter__(self) -> ShardFiles:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    def blocks(self, name: str, entry: TensorEntry) -> Iterator[torch.Tensor]:
        """Yield the elements of a tensor, flat and in order, at most about `BLOCK_BYTES` at a time.

        Raises:
            DamagedError: the files do not hold what the index says.
        """
        if math.prod(entry.shape) == 0:
            return
        shape = entry.shape or (1,)
        payloads = [(chunk, self._locate(name, entry, chunk)) for chunk in entry.chunks if math.prod(chunk.sizes)]
        row_bytes = math.prod(shape[1:]) * dtypes.ITEMSIZE[entry.dtype]
        rows = max(1, BLOCK_BYTES // row_bytes)
        for start in range(0, shape[0], rows):
            yield self._rows(name, entry, payloads, start, min(start + rows, shape[0]))

    def _locate(self, name: str, entry: TensorEntry, chunk: Chunk) -> Payload:
        return locate_chunk(self._file(chunk), chunk.span, entry.dtype, chunk.sizes, self._where(name, chunk))

    def _rows(
        self, name: str, entry: TensorEntry, payloads: list[tuple[Chunk, Payload]], start: int, stop: int
    ) -> torch.Tensor:
        """Return the rows `start` to `stop` (first dimension), flat."""
        shape = entry.shape or (1,)
        block = torch.empty((stop - start, *shape[1:]), dtype=getattr(torch, entry.dtype))
        for chunk, payload in payloads:
            offsets, sizes = chunk.offsets or (0,), chunk.sizes or (1,)
            first, last = max(start, offsets[0]), min(stop, offsets[0] + sizes[0])
            if first >= last:
                continue
            box = block.narrow(0, first - start, last - first)
            for dimension in range(1, len(shape)):
                box = box.narrow(dimension, offsets[dimension], sizes[dimension])
            self._read(name, chunk, payload, box, first - offsets[0])
        return block.reshape(-1)

    def _read(self, name: str, chunk: Chunk, payload: Payload, box: torch.Tensor, row: int) -> None:
        """Fill `box` with the rows of a chunk from `row` on."""
        where = self._where(name, chunk)
        file = self._file(chunk)
        if not payload.contiguous:
            read_box(file, payload, box, (row, *[0] * (box.dim() - 1)), where)
            return
        rows = box if box.is_contiguous() else torch.empty(box.shape, dtype=box.dtype)
        row_bytes = math.prod((chunk.sizes or (1,))[1:]) * rows.element_size()
        buffer: Any = memoryview(rows.view(-1).view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]
        read_into(file, payload.offset + row * row_bytes, buffer, where)
        if rows is not box:
            box.copy_(rows)

    def _file(self, chunk: Chunk) -> Source:
        name = chunk.span.file
        if name not in self._files:
            self._files[name] = open_source(self._directory / name)
        return self._files[name]

    def _where(self, name: str, chunk: Chunk) -> str:
        return f"{self._directory / chunk.span.file}: {name}"
