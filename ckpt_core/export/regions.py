"""Strided regions: elements that lie evenly spaced in one place and are wanted evenly spaced in another."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from operator import mul
from typing import NamedTuple

from ckpt_core.export.recipe import Piece, Recipe
from ckpt_core.format.cover import Shape


class Loop(NamedTuple):
    """One of the nested loops over a region's elements; distances are in elements."""

    size: int
    to: int
    """Distance of two successive elements where they are wanted."""

    by: int
    """Distance of the same two where they lie."""


class Region(NamedTuple):
    """Elements that nested loops visit: the first is wanted at `target` and lies at `origin`."""

    target: int
    origin: int
    loops: tuple[Loop, ...]

    def cut(self, loop: Loop, size: int) -> list[Region]:
        """Return two regions, of which the first has the first `size` turns of `loop`."""
        at = self.loops.index(loop)
        before, after = self.loops[:at], self.loops[at + 1 :]
        first, rest = ((Loop(n, loop.to, loop.by),) if n > 1 else () for n in (size, loop.size - size))
        return [
            Region(self.target, self.origin, before + first + after),
            Region(self.target + size * loop.to, self.origin + size * loop.by, before + rest + after),
        ]

    def split(self, loop: Loop, size: int) -> list[Region]:
        """Return the same region, in which two loops stand for `loop`, the inner one of `size` turns."""
        at = self.loops.index(loop)
        outer = Loop(loop.size // size, loop.to * size, loop.by * size)
        both = tuple(part for part in (outer, Loop(size, loop.to, loop.by)) if part.size > 1)
        return [Region(self.target, self.origin, self.loops[:at] + both + self.loops[at + 1 :])]

    def at(self, loop: Loop, turn: int) -> Region:
        """Return what one turn of `loop` visits."""
        others = tuple(other for other in self.loops if other != loop)
        return Region(self.target + turn * loop.to, self.origin + turn * loop.by, others)

    def turned(self) -> Region:
        """Return it with the two places exchanged."""
        return Region(self.origin, self.target, tuple(Loop(n, by, to) for n, to, by in self.loops))


def region_of(sizes: Sequence[int], strides: Sequence[int], origin: int) -> Region:
    """Return the region of a strided tensor, whose elements are wanted in row-major order."""
    loops = zip(sizes, row_major(sizes), strides, strict=True)
    return Region(0, origin, tuple(Loop(*loop) for loop in loops if loop[0] > 1))


def row_major(shape: Sequence[int]) -> Shape:
    """Return the strides of a contiguous tensor: the distances of neighbours along each axis, in elements."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


@dataclass(frozen=True)
class Grid:
    """A row-major shape, which borders across one axis divide."""

    shape: Shape
    axis: int = 0
    borders: tuple[int, ...] = ()
    """Where the parts begin along `axis`, rising from 0; empty for a single part."""

    strides: Shape = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "strides", row_major(self.shape))

    def corner(self, at: int) -> Shape:
        """Return the coordinates of an element."""
        return tuple(at // stride % size for size, stride in zip(self.shape, self.strides, strict=True))

    def walk(self, by: int) -> tuple[int, int]:
        """Return the axis along which this distance leads, and the steps on it; 0 steps if along none alone."""
        for axis, stride in enumerate(self.strides):
            if 0 < stride <= by:
                return axis, by // stride if by % stride == 0 else 0
        return 0, 0

    def part(self, corner: Shape) -> int:
        """Return the number of the part in which an element is."""
        return bisect_right(self.borders, corner[self.axis]) - 1 if self.borders else 0

    def boxes(self, region: Region) -> Iterator[Region]:
        """Cut a region until each is in one part and each of its loops stays on one axis."""
        todo = [region]
        while todo:
            region = todo.pop()
            smaller = self._smaller(region)
            if smaller:
                todo.extend(reversed(smaller))
            else:
                yield region

    def _smaller(self, region: Region) -> list[Region]:
        """Return what a region is to be cut into, or nothing if it may stay."""
        corner = self.corner(region.origin)
        on = defaultdict[int, list[tuple[int, Loop]]](list)
        for loop in region.loops:
            axis, steps = self.walk(loop.by)
            if not steps and loop.by:
                return region.cut(loop, 1)
            on[axis].append((steps, loop))
        for axis, loops in on.items():
            room = self._end(axis, corner) - corner[axis]
            if sum((loop.size - 1) * steps for steps, loop in loops) >= room:
                return self._within(region, axis, loops, corner[axis], room)
        return []

    def _within(
        self, region: Region, axis: int, loops: Sequence[tuple[int, Loop]], start: int, room: int
    ) -> list[Region]:
        """Cut a region whose loops on `axis` begin at `start` and lead further than the `room` there is."""
        steps, outer = max(loops)
        inner = sum((loop.size - 1) * steps for steps, loop in loops) - (outer.size - 1) * steps
        turns, uneven = divmod(self.shape[axis], steps)
        # Turns that walk the whole axis, and come back to the same place on it, are one loop; such walks are another.
        if outer.size > turns and not uneven and start + inner < steps:
            rest = outer.size % turns
            return region.cut(outer, outer.size - rest) if rest else region.split(outer, turns)
        return region.cut(outer, max((room - 1 - inner) // steps + 1, 1))

    def _end(self, axis: int, corner: Shape) -> int:
        if axis == self.axis and self.borders:
            following = self.part(corner) + 1
            if following < len(self.borders):
                return self.borders[following]
        return self.shape[axis]


def as_recipe(shape: Shape, taken: Sequence[tuple[str, Grid, Region]], layout: Shape | None = None) -> Recipe:
    """Return the recipe of a tensor from regions of its sources.

    Args:
        shape: the tensor's.
        taken: names and grids of the sources, and of each a region that `boxes` leaves whole.
        layout: the recipe's; None takes the coarsest that there is.
    """
    merged = [(name, grid, _merged(region, grid)) for name, grid, region in taken]
    return _as_recipe(shape, merged, Grid(layout or _layout(shape, [region for _, _, region in merged])))


def seen_in(recipe: Recipe, shapes: Mapping[str, Shape]) -> Recipe:
    """Return a recipe that sees its sources in other shapes of the same elements in row-major order."""
    to = row_major(recipe.layout)
    taken: list[tuple[str, Grid, Region]] = []
    for piece in recipe.pieces:
        by, grid = row_major(piece.view), Grid(shapes[piece.source])
        walks = zip(piece.sizes, to, piece.axes, strict=True)
        loops = (Loop(size, step, 0 if axis is None else by[axis]) for size, step, axis in walks if size > 1)
        region = Region(sum(map(mul, piece.offsets, to)), sum(map(mul, piece.start, by)), tuple(loops))
        taken += ((piece.source, grid, box) for box in grid.boxes(region))
    return as_recipe(recipe.shape, taken, recipe.layout)


def _as_recipe(shape: Shape, merged: Sequence[tuple[str, Grid, Region]], layout: Grid) -> Recipe:
    pieces: list[Piece] = []
    for name, grid, region in merged:
        for turned in layout.boxes(region.turned()):
            pieces += (_piece(name, grid, layout, one) for one in _steps_of_one(turned.turned(), grid, layout))
    return Recipe(shape, layout.shape, tuple(pieces))


def _merged(region: Region, grid: Grid) -> Region:
    """Make one loop of any two that are one in both places."""
    loops: list[Loop] = []
    for loop in sorted(region.loops, key=lambda loop: -loop.to):
        last = loops[-1] if loops else None
        along = last and last.to == loop.size * loop.to and last.by == loop.size * loop.by
        if last and along and grid.walk(last.by)[0] == grid.walk(loop.by)[0]:
            loops[-1] = Loop(last.size * loop.size, loop.to, loop.by)
        else:
            loops.append(loop)
    return Region(region.target, region.origin, tuple(loops))


def _layout(shape: Shape, regions: Iterable[Region]) -> Shape:
    """Return the coarsest shape along whose axes loops run, or the tensor's own if they differ in axes of one only."""
    chain = [math.prod(shape)]
    for to in sorted({1, *(loop.to for region in regions for loop in region.loops)}, reverse=True):
        if chain[-1] % to == 0 and chain[-1] != to:
            chain.append(to)
    layout = tuple(large // small for large, small in pairwise(chain))
    return shape or (1,) if layout == tuple(size for size in shape if size != 1) else layout


def _steps_of_one(region: Region, grid: Grid, layout: Grid) -> Iterator[Region]:
    """Cut a region until each loop moves by one along an axis of its own, in both places."""
    walked: set[int] = set()
    for loop in sorted(region.loops, key=lambda loop: loop.by):
        (axis, step), (_, wanted) = grid.walk(loop.by), layout.walk(loop.to)
        if step == wanted == 1 and axis not in walked:
            walked.add(axis)
        else:
            for turn in range(loop.size):
                yield from _steps_of_one(region.at(loop, turn), grid, layout)
            return
    yield region


def _piece(name: str, grid: Grid, layout: Grid, region: Region) -> Piece:
    sizes, axes = [1] * len(layout.shape), list[int | None]([None] * len(layout.shape))
    for loop in region.loops:
        axis = layout.walk(loop.to)[0]
        sizes[axis], axes[axis] = loop.size, grid.walk(loop.by)[0]
    return Piece(layout.corner(region.target), tuple(sizes), name, grid.shape, grid.corner(region.origin), tuple(axes))
