"""How one tensor is made of others without arithmetic: boxes of them, moved, and their axes in another order.

Splitting, stacking, transposing, trimming and renaming are all of that form, and so is what undoes each of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ckpt_core.format.cover import Shape, gap_or_overlap


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of one source tensor that fills a box of the tensor that is made."""

    offsets: Shape
    """Where the box begins in the recipe's `layout`."""

    sizes: Shape
    """Its size along each axis of the layout."""

    source: str
    """Name of the source tensor."""

    view: Shape
    """The shape in which the source is seen: its own, or another one of the same elements in row-major order."""

    start: Shape
    """Where the box begins in the source, along each axis of `view`."""

    axes: tuple[int | None, ...]
    """For each axis of the layout the axis of `view` that it walks along; None only where the size is one."""

    @property
    def taken(self) -> Shape:
        """Size of the source's box along each axis of `view`."""
        sizes = [1] * len(self.view)
        for axis, size in zip(self.axes, self.sizes, strict=True):
            if axis is not None:
                sizes[axis] = size
        return tuple(sizes)


@dataclass(frozen=True, slots=True)
class Recipe:
    """A tensor of `shape`, made of pieces."""

    shape: Shape
    layout: Shape
    """The shape in which the pieces are boxes: the same elements in row-major order, axes perhaps split."""

    pieces: tuple[Piece, ...]

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the tensors that it is made of, in the order of their first piece."""
        return tuple(dict.fromkeys(piece.source for piece in self.pieces))

    @property
    def straight(self) -> bool:
        """Whether it is all of one source tensor, element by element in the same order."""
        if len(self.pieces) != 1:
            return False
        [piece] = self.pieces
        walked = [axis for axis in piece.axes if axis is not None]
        return walked == sorted(walked) and math.prod(piece.view) == math.prod(piece.sizes)

    @property
    def kind(self) -> str:
        """What is done to make it, in a word."""
        if len(self.sources) > 1:
            return "stacked"
        if self.straight or not self.pieces:
            return "copied"
        taken = sum(math.prod(piece.sizes) for piece in self.pieces)
        return "split" if taken < math.prod(self.pieces[0].view) else "turned"

    def wrong(self) -> str | None:
        """Return what is wrong with it, or None if each element of the tensor has exactly one source element."""
        if math.prod(self.layout) != math.prod(self.shape):
            return f"a layout of {self.layout} for the shape {self.shape}"
        return gap_or_overlap(self.layout, [(piece.offsets, piece.sizes) for piece in self.pieces])


def copy_of(source: str, shape: Shape) -> Recipe:
    """Return the recipe of a tensor that is another one, unchanged."""
    layout = shape or (1,)
    zeros = (0,) * len(layout)
    return Recipe(shape, layout, (Piece(zeros, layout, source, layout, zeros, tuple(range(len(layout)))),))
