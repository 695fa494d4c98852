"""The arithmetic of LoRA: what an adapter adds to a weight, rows after rows, with PEFT's roundings."""

# torch's views of buffers are only partly annotated.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ckpt_core.export.recipe import copy_of
from ckpt_core.export.stored import Stored
from ckpt_core.export.stream import blocks
from ckpt_core.format.chunks import Words, words_of
from ckpt_core.format.index import Shape

if TYPE_CHECKING:
    from torch import Tensor

_TILE_ROWS = 64
"""Products are made of this many rows at a time, counted from the first: how a row is rounded depends on how many are
multiplied at once, and must not depend on where blocks begin."""


@dataclass(frozen=True, slots=True)
class Update:
    """An adapter's update of one weight: `scaling * b @ a`, or its transpose."""

    a: str
    """Stored name of the factor of shape (rank, inputs)."""

    b: str
    """Stored name of the factor of shape (outputs, rank)."""

    rank: int
    dtype: str
    """Element type of both factors."""

    scaling: float
    turned: bool
    """Whether the weight has the shape (inputs, outputs), as embeddings and GPT-2's Conv1D have."""

    rounded: bool
    """Whether the update is rounded to the weight's type before it is added, as PEFT does with embeddings."""


class Updated:
    """A weight of two dimensions whose blocks come in row-major order, and leave with their update added.

    Both factors are in memory meanwhile, and the update of as many rows as a block has.
    """

    def __init__(self, update: Update, shape: Shape, dtype: str, stored: Stored, *, check: bool) -> None:
        import torch

        rows, columns = shape
        self._update, self._shape, self._dtype = update, shape, getattr(torch, dtype)
        outputs, inputs = (columns, rows) if update.turned else (rows, columns)
        a = _factor(stored, update.a, (update.rank, inputs), update.dtype, check=check)
        b = _factor(stored, update.b, (outputs, update.rank), update.dtype, check=check)
        self._left, self._right = (a.t(), b.t()) if update.turned else (b, a)
        self._factor_dtype = getattr(torch, update.dtype)
        self._done = 0
        self._last: tuple[int, Tensor] | None = None

    def next(self, block: Words) -> Words:
        """Return the next block with its update; the one given is changed."""
        import torch

        columns = self._shape[1]
        first, offset = divmod(self._done, columns)
        self._done += block.size
        last = -(-self._done // columns)
        delta = torch.cat(list(self._rows(first, last))).reshape(-1)[offset : offset + block.size]
        weights = torch.from_numpy(block).view(self._dtype)
        weights += delta.to(self._dtype) if self._update.rounded else delta
        return block

    def _rows(self, first: int, last: int) -> Iterator[Tensor]:
        """Yield the update of rows, tile by tile."""
        for tile in range(first - first % _TILE_ROWS, last, _TILE_ROWS):
            if self._last is None or self._last[0] != tile:
                self._last = tile, self._tile(tile)
            yield self._last[1][max(0, first - tile) : last - tile]

    def _tile(self, tile: int) -> Tensor:
        """Return the update of the rows from `tile`; the last product begins earlier, to have as many rows as all."""
        begin = max(0, min(tile, self._shape[0] - _TILE_ROWS))
        product = self._left[begin : tile + _TILE_ROWS] @ self._right
        return (product * self._update.scaling).to(self._factor_dtype)[tile - begin :]


def _factor(stored: Stored, name: str, shape: Shape, dtype: str, *, check: bool) -> Tensor:
    """Return a factor, in float32 at least, as PEFT multiplies on a CPU."""
    import torch

    parts = list(blocks(stored, copy_of(name, shape), dtype, check=check))
    words: Any = np.concatenate(parts) if parts else np.empty(0, words_of(dtype))
    factor = torch.from_numpy(words).view(getattr(torch, dtype)).reshape(shape)
    return factor if dtype == "float64" else factor.float()
