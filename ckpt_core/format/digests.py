"""Digests, written as `algorithm:hex`, so that a reader knows how to compute the same.

Files have xxh3_128, which is as fast as a core reads memory: it finds damage, by chance or by a broken disk. What names
a whole checkpoint has sha256, which nobody can forge.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Protocol

import deflate
import xxhash

from ckpt_core.errors import DamagedError

ALGORITHM = "xxh3_128"
"""What files are digested with."""

CACHED_BYTES = 512 << 10
"""What is digested at a time, right before it is written or right after it was read, while a core has it in its cache:
two digests then cost a fifth of the copy."""

_MADE: dict[str, Callable[[], Hasher]] = {"xxh3_128": xxhash.xxh3_128, "sha256": hashlib.sha256}


class Hasher(Protocol):
    """A digest in the making."""

    def update(self, data: memoryview | bytes, /) -> None:
        """Take more bytes."""
        ...

    def hexdigest(self) -> str:
        """Return the digest of all bytes so far."""
        ...


def hasher(algorithm: str = ALGORITHM) -> Hasher:
    """Return a new digest of an algorithm.

    Raises:
        DamagedError: it is none that this library knows.
    """
    if algorithm not in _MADE:
        raise DamagedError(f"{algorithm[:40]!r}: no digest that this library knows ({', '.join(_MADE)}); update it.")
    return _MADE[algorithm]()


def crc32(data: memoryview | bytes, before: int = 0) -> int:
    """Return the CRC32 of `data`, which follows bytes whose CRC32 is `before`."""
    return deflate.crc32(data, before)  # pyright: ignore[reportUnknownMemberType] - takes any buffer


def algorithm_of(digest: str) -> str:
    """Return the algorithm's name from `algorithm:hex`."""
    return digest.partition(":")[0]


def digest_bytes(data: bytes, algorithm: str = "sha256") -> str:
    """Return the digest of `data`."""
    made = hasher(algorithm)
    made.update(data)
    return f"{algorithm}:{made.hexdigest()}"
