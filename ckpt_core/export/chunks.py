"""Tensors written as chunks of a stock DCP directory: streamed, checked, each with its CRC32."""

# torch.distributed.checkpoint is only partly annotated.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.distributed.checkpoint.storage import WriteResult

from ckpt_core import durable
from ckpt_core.export.cast import cast
from ckpt_core.export.finite import check_finite
from ckpt_core.export.plan import Output
from ckpt_core.export.recipe import Piece, Recipe
from ckpt_core.export.stored import Stored
from ckpt_core.export.stream import blocks, cut, overlap
from ckpt_core.format import dtypes
from ckpt_core.format.chunks import bytes_of
from ckpt_core.format.digests import crc32
from ckpt_core.format.index import Chunk, Index, Shape, Span, TensorEntry
from ckpt_core.io.archive import Archive
from ckpt_core.io.metadata import stock_metadata
from ckpt_core.io.writer import DigestWriter

CHUNK_BYTES = 64 << 20
"""The most that one chunk has: a rank that wants few of a tensor's rows can then check what it reads."""


@dataclass(frozen=True, slots=True)
class Part:
    """A box of a tensor, which becomes one chunk."""

    output: Output
    offsets: Shape
    sizes: Shape

    @property
    def nbytes(self) -> int:
        """Size of its elements in bytes."""
        return math.prod(self.sizes) * dtypes.ITEMSIZE[self.output.dtype]

    @property
    def recipe(self) -> Recipe:
        """How it is made."""
        offsets, sizes = self.offsets or (0,), self.sizes or (1,)
        inside = (_cut(piece, offsets, sizes) for piece in self.output.recipe.pieces)
        return Recipe(self.sizes, sizes, tuple(piece for piece in inside if piece is not None))


def _cut(piece: Piece, offsets: Shape, sizes: Shape) -> Piece | None:
    """Return what a box has of a piece, seen from where the box begins."""
    shared = overlap((piece.offsets, piece.sizes), (offsets, sizes))
    if shared is None:
        return None
    start = list(piece.start)
    for number, axis in enumerate(piece.axes):
        if axis is not None:
            start[axis] += shared.offsets[number] - piece.offsets[number]
    here = tuple(at - begin for at, begin in zip(shared.offsets, offsets, strict=True))
    return replace(piece, offsets=here, sizes=shared.sizes, start=tuple(start))


def parts_of(output: Output) -> Iterator[Part]:
    """Cut a tensor into chunks, along its first axes."""
    shape, most = output.shape, CHUNK_BYTES // dtypes.ITEMSIZE[output.dtype]
    if math.prod(shape) <= most:
        yield Part(output, (0,) * len(shape), shape)
        return
    for block in cut(shape, most):
        yield Part(output, block.offsets, block.sizes)


def files_of(outputs: Sequence[Output], max_file_bytes: int, *, first: int = 0) -> dict[str, list[Part]]:
    """Return the chunks of each file, in order; one with more than `max_file_bytes` has a single chunk.

    Args:
        outputs: the tensors.
        max_file_bytes: the most that a file's elements have.
        first: the number of the first file.
    """
    files: list[list[Part]] = []
    size = 0
    for part in (part for output in outputs for part in parts_of(output)):
        if not files or size + part.nbytes > max_file_bytes:
            files.append([])
            size = 0
        files[-1].append(part)
        size += part.nbytes
    return {f"__0_{number}.distcp": parts for number, parts in enumerate(files, first)}


def write_chunks(
    path: Path, parts: Sequence[Part], stored: Stored, *, allow_nonfinite: bool, written: Callable[[int], None]
) -> list[Span]:
    """Write chunks to a new file, flushed to the device; return where each lies.

    Args:
        path: of the file.
        parts: the chunks.
        stored: what they are made of.
        allow_nonfinite: accept NaN and Inf.
        written: is told of elements' bytes as they are written.

    Raises:
        DamagedError: a tensor has NaN or Inf, or the files are damaged.
        MismatchError: a value does not fit the type to cast to.
    """
    spans: list[Span] = []
    sink, size = durable.create(path), 0
    try:
        for part in parts:
            archive = Archive(getattr(torch, part.output.dtype), part.sizes)
            padding = bytes(-size % archive.page)
            sink.write(memoryview(padding + archive.head))
            found = 0
            for block in _made(part, stored, allow_nonfinite=allow_nonfinite):
                found = crc32(block, found)
                sink.write(block)
                written(len(block))
            tail = archive.tail(found)
            sink.write(memoryview(tail))
            spans.append(Span(path.name, size + len(padding), len(archive.head) + part.nbytes + len(tail)))
            size = spans[-1].offset + spans[-1].length
        sink.seal()
    finally:
        sink.close()
    return spans


def _made(part: Part, stored: Stored, *, allow_nonfinite: bool) -> Iterator[memoryview]:
    """Yield a chunk's bytes, block by block."""
    output = part.output
    for block in blocks(stored, part.recipe, output.stored):
        made = cast(block, output.stored, output.dtype) if output.casts else block
        if not allow_nonfinite:
            check_finite(block, made, output, stored.place)
        yield bytes_of(made)


def write_metadata(directory: Path, chunks: Mapping[str, Sequence[tuple[Part, Span]]], key: str) -> None:
    """Write the metadata of chunks that were written, and its JSON twin.

    Args:
        directory: with the files.
        chunks: the chunks of each tensor, by its name in the model, in the order of the model's state dict.
        key: under which the state dict stands in the one that is saved.

    Raises:
        CommitError: a chunk is missing, or was written twice.
    """
    tensors = {f"{key}.{name}": _entry(parts) for name, parts in chunks.items()}
    metadata = stock_metadata(Index(tensors, {}, {f"{key}.{name}": (key, name) for name in chunks}))
    results = [
        WriteResult(index=index, size_in_bytes=stored.length, storage_data=stored)
        for index, stored in (metadata.storage_data or {}).items()
    ]
    DigestWriter(directory, twin=True, digest=False).finish(metadata, [results])


def _entry(parts: Sequence[tuple[Part, Span]]) -> TensorEntry:
    output = parts[0][0].output
    chunks = tuple(Chunk(part.offsets, part.sizes, span) for part, span in parts)
    return TensorEntry(output.dtype, output.shape, chunks)
