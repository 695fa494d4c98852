"""NaN and Inf in stored elements, found from their bits: at memory speed, for every type, without torch."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Buffer = bytes | bytearray | memoryview | NDArray[np.uint8]
Words = NDArray[np.unsignedinteger]

_PART_BYTES = 1 << 20
"""Each part is looked at twice, so it has to fit the processor's cache."""

_SMALLEST_NONFINITE = {
    "float64": 0x7FF0_0000_0000_0000,
    "float32": 0x7F80_0000,
    "float16": 0x7C00,
    "bfloat16": 0x7F80,
    "float8_e5m2": 0x7C,
    "float8_e4m3fn": 0x7F,  # NaN; it has no Inf
    "complex32": 0x7C00,
    "complex64": 0x7F80_0000,
    "complex128": 0x7FF0_0000_0000_0000,
}
"""As integers, the bits of Inf and NaN without their sign are the largest of a type; these are the first of them."""

_ONLY_NAN = {"float8_e4m3fnuz": 0x80, "float8_e5m2fnuz": 0x80, "float8_e8m0fnu": 0xFF}
"""Types of which one pattern is NaN, and all others are finite."""

_WORDS: dict[str, type[np.unsignedinteger]] = {
    **dict.fromkeys(("float64", "complex128"), np.uint64),
    **dict.fromkeys(("float32", "complex64"), np.uint32),
    **dict.fromkeys(("float16", "bfloat16", "complex32"), np.uint16),
    **dict.fromkeys(("float8_e5m2", "float8_e4m3fn", *_ONLY_NAN), np.uint8),
}


class Statistics:
    """The smallest, the largest and the mean of a tensor's elements, which come block by block; NaN and Inf aside."""

    def __init__(self, dtype: str) -> None:
        self._dtype = dtype
        self._count = self._nonfinite = 0
        self._sum, self._min, self._max = 0.0, np.inf, -np.inf

    @property
    def known(self) -> bool:
        """Whether there is anything to tell: of integers, booleans and the types of one byte there is not."""
        return self._count > 0

    def add(self, block: NDArray[Any]) -> None:
        """Take more elements."""
        values = _numbers(block, self._dtype)
        if values is None or not values.size:
            return
        low, high = float(values.min()), float(values.max())
        if not (np.isfinite(low) and np.isfinite(high)):
            finite = values[np.isfinite(values)]
            self._nonfinite += values.size - finite.size
            if not finite.size:
                return
            values, low, high = finite, float(finite.min()), float(finite.max())
        self._count += values.size
        self._sum += float(values.sum(dtype=np.float64))
        self._min, self._max = min(self._min, low), max(self._max, high)

    def document(self) -> dict[str, float]:
        """Return the figures; the mean has so few digits that it does not depend on the order of the sum."""
        figures = {"min": self._min, "max": self._max, "mean": float(f"{self._sum / self._count:.6g}")}
        return figures | ({"nonfinite": self._nonfinite} if self._nonfinite else {})


def _numbers(block: NDArray[Any], dtype: str) -> NDArray[np.floating[Any]] | None:
    """Return the values of floating-point elements, of the types that numpy can compute with."""
    if dtype == "bfloat16":
        wide = block.view(np.uint16).astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    return block.view(dtype) if dtype in {"float64", "float32", "float16"} else None


def first_nonfinite(block: Buffer, dtype: str, *, only_nan: bool = False) -> int | None:
    """Return the position of the first element that is NaN or Inf, or None.

    Args:
        block: elements one after the other, little-endian; an aligned block is faster.
        dtype: their type by torch's name; integers and booleans are always finite.
        only_nan: accept Inf.
    """
    if dtype not in _WORDS:
        return None
    words: Words = np.frombuffer(block, _WORDS[dtype])
    count = _PART_BYTES // words.itemsize
    for start in range(0, words.size, count):
        part = words[start : start + count]
        if _any(part, dtype, only_nan=only_nan):
            return (start + int(np.flatnonzero(_each(part, dtype, only_nan=only_nan))[0])) // (
                2 if dtype.startswith("complex") else 1
            )
    return None


def _any(words: Words, dtype: str, *, only_nan: bool) -> bool:
    """Whether there is one: the largest as signed integers is a positive one, as unsigned integers a negative one."""
    if dtype in _ONLY_NAN:
        return bool((words == _ONLY_NAN[dtype]).any())
    limit, sign = _limits(words, dtype, only_nan=only_nan)
    return int(_signed(words).max()) >= limit or int(words.max()) >= limit + sign


def _each(words: Words, dtype: str, *, only_nan: bool) -> NDArray[np.bool_]:
    if dtype in _ONLY_NAN:
        return words == _ONLY_NAN[dtype]
    limit, sign = _limits(words, dtype, only_nan=only_nan)
    return (_signed(words) >= limit) | (words >= limit + sign)


def _limits(words: Words, dtype: str, *, only_nan: bool) -> tuple[int, int]:
    infinite = only_nan and dtype != "float8_e4m3fn"  # the patterns of NaN follow that of Inf
    return _SMALLEST_NONFINITE[dtype] + infinite, 1 << (8 * words.itemsize - 1)


def _signed(words: Words) -> NDArray[np.signedinteger]:
    return words.view(f"i{words.itemsize}")
