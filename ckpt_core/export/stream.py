"""The elements that a recipe makes, block after block in row-major order, in a bounded buffer. Without torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

import numpy as np

from ckpt_core.export.recipe import Piece, Recipe
from ckpt_core.export.regions import row_major
from ckpt_core.export.stored import Box, Stored
from ckpt_core.format import dtypes
from ckpt_core.format.chunks import (
    Words,
    bytes_of,
    check_chunk,
    check_crc32,
    read_digested,
    read_part,
    read_strided,
    words_of,
)
from ckpt_core.format.index import Shape
from ckpt_core.format.payload import Payload
from ckpt_core.format.source import LocalSource

BLOCK_BYTES = 1 << 19
"""What is made at a time: it stays in a core's cache while it is checked, cast, digested and written."""

_REMOTE_BLOCK_BYTES = 8 << 20

_WORTHWHILE_BYTES = 64 << 10
"""Copying less than this at a time through the kernel costs more than reading and writing blocks."""


@dataclass(frozen=True, slots=True)
class Block:
    """A box in a recipe's layout whose elements follow each other in row-major order."""

    offsets: Shape
    sizes: Shape


def blocks(stored: Stored, recipe: Recipe, dtype: str, *, check: bool = True) -> Iterator[Words]:
    """Yield the elements of a tensor of `dtype`, flat and in order, as words of their size.

    Where a chunk is read from its first byte to its last, its CRC32, if one was stored, has been checked when its last
    block was yielded. The CRC32 of any other chunk is for `check_chunks`.

    Raises:
        DamagedError: the files do not hold what the index says.
    """
    if math.prod(recipe.layout) == 0:
        return
    item = dtypes.ITEMSIZE[dtype]
    parts = [part for piece in recipe.pieces for part in _parts(stored, recipe.layout, piece)]
    if check and recipe.straight:
        for part in parts:
            part.crc32 = 0
    limit = max(BLOCK_BYTES, _REMOTE_BLOCK_BYTES if _is_remote(stored, parts) else 0)
    for block, those in _meeting(cut(recipe.layout, limit // item), parts, recipe.layout):
        made = np.empty(block.sizes, words_of(dtype))
        for part in those:
            part.fill(made, block)
        yield made.reshape(-1)


@dataclass(frozen=True, slots=True)
class Range:
    """Bytes of a file that are bytes of a made tensor, unchanged."""

    file: str
    offset: int
    place: int
    """Where they begin among the bytes of the tensor."""

    nbytes: int


def ranges(stored: Stored, recipe: Recipe, dtype: str) -> list[Range] | None:
    """Return where all bytes of a tensor lie; None where they lie in so many places that reading blocks is faster.

    Raises:
        DamagedError: the files do not hold what the index says.
    """
    parts = [part for piece in recipe.pieces for part in _parts(stored, recipe.layout, piece)]
    item = dtypes.ITEMSIZE[dtype]
    if not math.prod(recipe.layout):
        return []
    if any(not part.local or part.run() * item < min(_WORTHWHILE_BYTES, part.count * item) for part in parts):
        return None
    return [found for part in parts for found in part.ranges(item)]


def check_chunks(stored: Stored, name: str) -> None:
    """Read all chunks of a tensor, and compare the CRC32 of each with the one that was stored with it.

    Raises:
        DamagedError: they differ.
    """
    for number, box in enumerate(stored.boxes(name)):
        if math.prod(box.sizes):
            payload = stored.payload(name, number)
            check_chunk(stored.source(box.file), payload, f"{stored.place / box.file}: {name}")


def overlap(first: tuple[Shape, Shape], second: tuple[Shape, Shape]) -> Block | None:
    """Return what two boxes, each given by offsets and sizes, have in common."""
    offsets = tuple(map(max, first[0], second[0]))
    ends = tuple(min(a + n, b + m) for a, n, b, m in zip(*first, *second, strict=True))
    if any(start >= end for start, end in zip(offsets, ends, strict=True)):
        return None
    return Block(offsets, tuple(end - start for start, end in zip(offsets, ends, strict=True)))


def _is_remote(stored: Stored, parts: Sequence[_Part]) -> bool:
    return bool(parts) and stored.source(parts[0].box.file).gap_bytes > 0


def cut(layout: Shape, limit: int) -> Iterator[Block]:
    """Yield boxes of at most `limit` elements that follow each other in row-major order."""
    split = 0
    while split < len(layout) - 1 and math.prod(layout[split + 1 :]) > limit:
        split += 1
    rows = max(1, limit // math.prod(layout[split + 1 :]))
    rest = layout[split + 1 :]
    for outer in product(*(range(size) for size in layout[:split])):
        for start in range(0, layout[split], rows):
            sizes = ((1,) * split) + (min(rows, layout[split] - start), *rest)
            yield Block((*outer, start, *(0,) * len(rest)), sizes)


def _meeting(these: Iterator[Block], parts: Sequence[_Part], layout: Shape) -> Iterator[tuple[Block, Sequence[_Part]]]:
    """Yield each block with the parts that may meet it: a tensor may have thousands, a block meets few of them."""
    steps = row_major(layout)
    waiting = sorted(((*_range(part.fills, steps), number) for number, part in enumerate(parts)), reverse=True)
    active: list[tuple[int, int, int]] = []
    for block in these:
        first, last = _range(block, steps)
        while waiting and waiting[-1][0] <= last:
            active.append(waiting.pop())
        active = [entry for entry in active if entry[1] >= first]
        yield block, [parts[number] for _, _, number in active]


def _range(block: Block, steps: Sequence[int]) -> tuple[int, int]:
    """Return the places of a box's first and last element among all of the layout's."""
    first = sum(o * s for o, s in zip(block.offsets, steps, strict=True))
    return first, first + sum((n - 1) * s for n, s in zip(block.sizes, steps, strict=True))


def _parts(stored: Stored, layout: Shape, piece: Piece) -> Iterator[_Part]:
    """Yield what each stored box gives to a piece."""
    boxes = stored.boxes(piece.source)
    for number, box in enumerate(boxes):
        for seen, skipped in _seen(box, piece.view, boxes):
            shared = overlap((piece.start, piece.taken), (seen.offsets, seen.sizes))
            if shared is not None:
                yield _Part(stored, layout, piece, number, seen, _filled(piece, shared), skipped)


def _seen(box: Box, view: Shape, boxes: Sequence[Box]) -> Iterator[tuple[Box, int]]:
    """Yield a stored box as boxes of a view, each with the number of its elements that lie before it in the file.

    A view of as many axes is the tensor's own shape. Of a tensor that is stored in several boxes, another view may
    split the first axis alone, as heads are rows: a box then may begin and end within a head.
    """
    if len(box.sizes) == len(view):
        yield box, 0
    elif math.prod(box.sizes) == math.prod(view):
        yield Box((0,) * len(view), view, box.file), 0
    else:
        split = len(view) - len(box.sizes) + 1
        shape = tuple(max(b.offsets[axis] + b.sizes[axis] for b in boxes) for axis in range(len(box.sizes)))
        if split < 1 or (math.prod(view[:split]), *view[split:]) != shape:
            raise NotImplementedError(f"a tensor of {shape} in several boxes cannot be seen as {view}")
        first, inner = box.offsets[0], math.prod(box.sizes[1:])
        for place, offsets, sizes in _rows(view[:split], first, first + box.sizes[0]):
            part = Box((*offsets, *box.offsets[1:]), (*sizes, *box.sizes[1:]), box.file)
            yield part, (place - first) * inner


def _rows(shape: Shape, first: int, end: int) -> Iterator[tuple[int, Shape, Shape]]:
    """Yield the boxes of a shape whose elements are, in row-major order, those from `first` up to `end`."""
    if len(shape) == 1:
        yield first, (first,), (end - first,)
        return
    inner, rest = math.prod(shape[1:]), shape[1:]
    while first < end:
        row, within = divmod(first, inner)
        count = (end - first) // inner if within == 0 else 0
        if count:
            yield first, (row, *(0,) * len(rest)), (count, *rest)
            first += count * inner
        else:
            stop = min(end, (row + 1) * inner)
            for place, offsets, sizes in _rows(rest, within, within + stop - first):
                yield first - within + place, (row, *offsets), (1, *sizes)
            first = stop


def _filled(piece: Piece, shared: Block) -> Block:
    """Return the box in the layout that a box of the source fills."""
    offsets, sizes = list(piece.offsets), list(piece.sizes)
    for axis, walked in enumerate(piece.axes):
        if walked is not None:
            offsets[axis] += shared.offsets[walked] - piece.start[walked]
            sizes[axis] = shared.sizes[walked]
    return Block(tuple(offsets), tuple(sizes))


@dataclass(slots=True)
class _Part:
    """What one stored box gives to one piece of a recipe."""

    stored: Stored
    layout: Shape
    piece: Piece
    number: int
    box: Box
    fills: Block
    skipped: int = 0
    """How many elements of the stored box lie before those of `box`, where that is a part of it."""

    crc32: int | None = None
    """Of the bytes so far, where the box is read from its first byte to its last."""

    done: int = 0
    found: Payload | None = field(default=None, repr=False)
    whole: Words | None = field(default=None, repr=False)
    """All of a chunk whose elements do not lie in row-major order, while it is used."""

    def fill(self, made: Words, block: Block) -> None:
        """Fill what a block has of this part."""
        shared = overlap((self.fills.offsets, self.fills.sizes), (block.offsets, block.sizes))
        if shared is None:
            return
        target = made[
            tuple(slice(o - b, o - b + n) for o, n, b in zip(shared.offsets, shared.sizes, block.offsets, strict=True))
        ]
        payload = self._payload()
        if self.crc32 is not None and payload.contiguous:
            self._read_next(target, payload)
        else:
            target[...] = self._read(shared, payload)

    @property
    def local(self) -> bool:
        """Whether the elements lie in row-major order in a file that the kernel reads."""
        return isinstance(self.stored.source(self.box.file), LocalSource) and self._payload().contiguous

    @property
    def count(self) -> int:
        """How many elements this part has."""
        return math.prod(self.fills.sizes)

    def run(self) -> int:
        """Return how many elements follow each other here and there without a gap."""
        length = 1
        for size, there, here in reversed(self._loops()):
            if size > 1 and not there == here == length:
                break
            length *= size
        return length

    def ranges(self, item: int) -> Iterator[Range]:
        """Yield the bytes of this part, `item` for each element, run by run."""
        length, start = self.run(), self._start(self.fills)
        there = sum(at * step for at, step in zip(start, row_major(self.box.sizes), strict=True))
        here = sum(at * step for at, step in zip(self.fills.offsets, row_major(self.layout), strict=True))
        loops, inner = self._loops(), 1
        while inner < length:
            inner *= loops.pop()[0]
        base = self._payload().offset
        for turns in product(*(range(size) for size, _, _ in loops)):
            moved = [sum(t * loop[side] for t, loop in zip(turns, loops, strict=True)) for side in (1, 2)]
            yield Range(self.box.file, base + (there + moved[0]) * item, (here + moved[1]) * item, length * item)

    def _loops(self) -> list[tuple[int, int, int]]:
        """Return, for each axis of the layout, this part's size and the distances of elements there and here."""
        there = row_major(self.box.sizes)
        steps = [0 if walked is None else there[walked] for walked in self.piece.axes]
        return list(zip(self.fills.sizes, steps, row_major(self.layout), strict=True))

    def _start(self, shared: Block) -> list[int]:
        """Return where in the stored box that lies which fills a box of the layout."""
        start = [at - offset for at, offset in zip(self.piece.start, self.box.offsets, strict=True)]
        for axis, walked in enumerate(self.piece.axes):
            if walked is not None:
                start[walked] += shared.offsets[axis] - self.piece.offsets[axis]
        return start

    @property
    def _where(self) -> str:
        return f"{self.stored.place / self.box.file}: {self.piece.source}"

    def _payload(self) -> Payload:
        if self.found is None:
            found = self.stored.payload(self.piece.source, self.number)
            if found.contiguous:
                found = replace(found, offset=found.offset + self.skipped * dtypes.ITEMSIZE[found.dtype])
            self.found = found
        return self.found

    def _read_next(self, target: Words, payload: Payload) -> None:
        """Read what follows what was read before."""
        rows = target if target.flags.c_contiguous else np.empty(target.shape, target.dtype)
        source = self.stored.source(self.box.file)
        self.crc32 = read_digested(source, payload.offset + self.done, bytes_of(rows), self.crc32 or 0, self._where)
        self.done += rows.nbytes
        if self.done == payload.nbytes:
            check_crc32(payload, self.crc32, self._where)
        if rows is not target:
            target[...] = rows

    def _read(self, shared: Block, payload: Payload) -> Words:
        """Return a box of the source with its axes in the layout's order."""
        sizes = [1] * len(self.piece.view)
        for axis, walked in enumerate(self.piece.axes):
            if walked is not None:
                sizes[walked] = shared.sizes[axis]
        box = self._box(payload, tuple(self._start(shared)), tuple(sizes))
        order = [axis for axis in self.piece.axes if axis is not None]
        rest = [axis for axis in range(len(sizes)) if axis not in order]
        return box.transpose(rest + order).reshape(shared.sizes)

    def _box(self, payload: Payload, offsets: Shape, sizes: Shape) -> Words:
        source = self.stored.source(self.box.file)
        if payload.contiguous:
            return read_part(source, payload, self.box.sizes, offsets, sizes, self._where)
        if self.whole is None:
            chunk = read_strided(source, payload, self._where).reshape(-1)
            self.whole = chunk[self.skipped : self.skipped + math.prod(self.box.sizes)].reshape(self.box.sizes)
        return self.whole[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))]
