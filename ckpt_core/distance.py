"""How far apart the elements of two tensors are, block after block."""

# torch's functions are only partly annotated.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from ckpt_core.format.dtypes import OPAQUE

_PART = 1 << 14
"""Elements that are made 64-bit numbers at a time: they fit the cache, and no library starts threads for so few."""


@dataclass(frozen=True)
class Distance:
    """How far apart two tensors of equal shape are, in 64-bit arithmetic."""

    elements: int
    differing: int
    """Elements of other value: NaN equals NaN, and -0.0 equals 0.0."""

    nonfinite: int
    """Those of them where one or both are NaN or Inf; the figures below leave them out."""

    max_abs: float | None
    """Largest absolute difference; None if it is too large for a number."""

    relative: float | None
    """Norm of the difference, divided by the norm of A; None if that is zero or too large for a number."""


def same_bits(a: Iterable[torch.Tensor], b: Iterable[torch.Tensor]) -> bool:
    """Whether two tensors of equal type and shape, given in flat blocks, are equal bit for bit."""
    return all(np.array_equal(_bytes(x), _bytes(y)) for x, y in _in_step(a, b))


def varies(blocks: Iterable[torch.Tensor]) -> bool:
    """Whether a tensor, given in flat blocks, has elements of different bits."""
    first = None
    for block in blocks:
        words = _bytes(block).reshape(len(block), -1)
        first = words[0] if first is None else first
        if (words != first).any():
            return True
    return False


def measure(a: Iterable[torch.Tensor], b: Iterable[torch.Tensor]) -> Distance:
    """Return how far apart two tensors of equal shape are; each is given in flat blocks, of any sizes."""
    elements = differing = nonfinite = 0
    largest = difference_squared = norm_squared = 0.0
    for x, y in _parts(a, b):
        wide_x, wide_y = _wide(x), _wide(y)
        apart = wide_x - wide_y
        other = _differ(x, y, wide_x, wide_y)
        if not math.isfinite(_squared(apart) + _squared(wide_x)):
            finite = torch.isfinite(wide_x) & torch.isfinite(wide_y)
            nonfinite += int((other & ~finite).sum())
            apart, wide_x = (torch.where(finite, values, 0) for values in (apart, wide_x))
        elements += len(x)
        differing += int(other.count_nonzero())
        largest = max(largest, float(apart.abs().max()))
        difference_squared += _squared(apart)
        norm_squared += _squared(wide_x)
    relative = math.sqrt(difference_squared / norm_squared) if norm_squared else math.inf
    return Distance(elements, differing, nonfinite, _number(largest), _number(relative))


def _in_step(a: Iterable[torch.Tensor], b: Iterable[torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the elements of both in pairs of blocks of equal length."""
    rest_a, rest_b = iter(a), iter(b)
    x = y = torch.empty(0)
    while True:
        x = x if len(x) else next(rest_a, x)
        y = y if len(y) else next(rest_b, y)
        count = min(len(x), len(y))
        if count == 0:
            return
        yield x[:count], y[:count]
        x, y = x[count:], y[count:]


def _parts(a: Iterable[torch.Tensor], b: Iterable[torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for x, y in _in_step(a, b):
        yield from zip(x.split(_PART), y.split(_PART), strict=True)


def _differ(x: torch.Tensor, y: torch.Tensor, wide_x: torch.Tensor, wide_y: torch.Tensor) -> torch.Tensor:
    """Return which elements have other values; of integers of one type by their bits, which no rounding hides."""
    if x.dtype == y.dtype and not (x.is_floating_point() or x.is_complex()):
        return torch.from_numpy((_bytes(x).reshape(len(x), -1) != _bytes(y).reshape(len(y), -1)).any(axis=1))
    other = wide_x != wide_y
    return other & ~(torch.isnan(wide_x) & torch.isnan(wide_y)) if bool(other.any()) else other


def _squared(values: torch.Tensor) -> float:
    """Return the square of the norm; NaN or Inf if there is one among the values."""
    flat = torch.view_as_real(values) if values.is_complex() else values
    return float(flat.square().sum())  # a dot product starts threads, which are slow on busy cores


def _wide(x: torch.Tensor) -> torch.Tensor:
    if str(x.dtype).removeprefix("torch.") in OPAQUE:
        x = x.view(torch.int16 if x.itemsize == 2 else torch.uint8)  # noqa: PLR2004 - bytes
    return x.to(torch.complex128 if x.is_complex() else torch.float64)


def _bytes(x: torch.Tensor) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    return x.view(torch.uint8).numpy()


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
