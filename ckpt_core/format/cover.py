"""Whether boxes fill a shape, each element exactly once."""

from __future__ import annotations

import math
import secrets
from collections import defaultdict
from collections.abc import Sequence

Shape = tuple[int, ...]
Box = tuple[Shape, Shape]
"""Offsets and sizes."""

_PRIME = (1 << 61) - 1


def gap_or_overlap(shape: Shape, boxes: Sequence[Box]) -> str | None:
    """Return what is wrong with the boxes, or None if they cover each element of `shape` exactly once."""
    for offsets, sizes in boxes:
        if not _fits(shape, offsets, sizes):
            return f"a chunk at {offsets} of size {sizes} is outside the shape {shape}"
    stored, expected = sum(math.prod(sizes) for _, sizes in boxes), math.prod(shape)
    if stored != expected:
        return f"the chunks hold {stored} elements, the shape {shape} has {expected}"
    if not (_in_a_row(shape, boxes) or _covers_once(shape, boxes)):
        return f"chunks overlap, so that others are missing from the shape {shape}"
    return None


def _fits(shape: Shape, offsets: Shape, sizes: Shape) -> bool:
    if not len(offsets) == len(sizes) == len(shape):
        return False
    for offset, size, whole in zip(offsets, sizes, shape, strict=True):  # noqa: SIM110 - a generator takes twice as long
        if offset + size > whole:
            return False
    return True


def _in_a_row(shape: Shape, boxes: Sequence[Box]) -> bool:
    """Whether the boxes cut the shape along one dimension and follow each other there, as most do."""
    if not shape:
        return False
    cut = next((d for _, sizes in boxes for d, size in enumerate(sizes) if size != shape[d]), 0)
    before, after = slice(cut), slice(cut + 1, None)
    whole = (shape[before], shape[after])
    starts = tuple((0,) * len(sides) for sides in whole)
    for offsets, sizes in boxes:
        if (sizes[before], sizes[after]) != whole or (offsets[before], offsets[after]) != starts:
            return False
    end = 0
    for offset, size in sorted([(offsets[cut], sizes[cut]) for offsets, sizes in boxes]):
        if offset != end:
            return False
        end += size
    return end == shape[cut]


def _covers_once(shape: Shape, boxes: Sequence[Box]) -> bool:
    """Compare the measures of boxes and shape, when each row, column and so on has a secret random width.

    Equal covers have equal measures. Others differ by a polynomial in the widths that is not zero and has the degree
    of the number of dimensions, at most 64: it is zero at random widths with a chance below 64 / 2**61. This takes
    time in proportion to the number of boxes, however they lie, which no comparison of boxes with each other does.
    """
    borders = [defaultdict[int, int](lambda: secrets.randbelow(_PRIME)) for _ in shape]

    def measure(offsets: Shape, sizes: Shape) -> int:
        product = 1
        for border, offset, size in zip(borders, offsets, sizes, strict=True):
            product = product * (border[offset + size] - border[offset]) % _PRIME
        return product

    return sum(measure(*box) for box in boxes) % _PRIME == measure((0,) * len(shape), shape)
