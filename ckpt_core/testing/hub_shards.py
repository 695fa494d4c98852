"""Shards, in which Xet says how files are made of chunks and what chunks a xorb holds.

A shard is a header of 48 bytes, the files, the xorbs and a footer, in rows of 48 bytes: 32 of a hash and four numbers.
Each file is a row (flags, number of terms), a row a term (size, first and last chunk), where the flags say so a row of
verification a term, and a row with the content's sha256. Each xorb is a row (number of chunks) and a row a chunk. Both
lists end in a row whose hash is all ones.
"""

import struct
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ckpt_core.testing.hub_names import Refusal

_TAG = b"HFRepoMetaData\0" + bytes([85, 105, 103, 69, 106, 123, 129, 87, 131, 165, 189, 217, 92, 205, 209, 74, 169])
_HEADER = struct.Struct("<32s2Q")
_ROW = struct.Struct("<32s4I")
_FOOTER = struct.Struct("<9Q32s2Q72sQ")
_END = _ROW.pack(b"\xff" * 32, 0, 0, 0, 0)
_VERIFIED, _WITH_SHA256 = 1 << 31, 1 << 30
_WEEK = 7 * 24 * 3600


@dataclass(frozen=True)
class Term:
    """Chunks `start` to `end` (exclusive) of a xorb, `size` bytes when unpacked."""

    xorb: str
    start: int
    end: int
    size: int


@dataclass(frozen=True)
class ShardFile:
    """A file by its Xet hash: the terms that make it up, and the sha256 of its content."""

    hash: str
    terms: list[Term]
    sha256: str


@dataclass(frozen=True)
class Shard:
    """What a client uploads last: its files, and the rows of its new xorbs by their hash."""

    files: list[ShardFile]
    xorbs: dict[str, bytes]


def parse_shard(data: bytes) -> Shard:
    """Read a shard; refused with 400 where it is none."""
    try:
        tag, version, _ = _HEADER.unpack_from(data)
        if tag != _TAG or version != 2:  # noqa: PLR2004  the only one there is
            raise Refusal(400, "The body is not a shard of version 2")
        rows = _rows(data)
        return Shard(files=list(_files(rows)), xorbs=dict(_xorbs(rows)))
    except struct.error:
        raise Refusal(400, "The shard ends before it is complete") from None


def chunk_hashes(rows: bytes) -> list[str]:
    """Return the hashes of a xorb's chunks, from its rows."""
    return [hash_hex(values[0]) for values in _ROW.iter_unpack(rows)][1:]


def shard_of(xorbs: Iterable[bytes]) -> bytes:
    """Return a shard without files that tells of these xorbs, each given as its rows, for a week."""
    files_at = _HEADER.size
    xorbs_at = files_at + len(_END)
    body = _END + b"".join(xorbs) + _END
    footer_at = files_at + len(body)
    now = int(time.time())
    no_tables = (footer_at, 0) * 3  # where tables of files, xorbs and chunks would begin, and their lengths
    footer = _FOOTER.pack(1, files_at, xorbs_at, *no_tables, bytes(32), now, now + _WEEK, bytes(72), footer_at)
    return _HEADER.pack(_TAG, 2, _FOOTER.size) + body + footer


def hash_hex(raw: bytes) -> str:
    """Write a hash as Xet does: four little-endian numbers of 64 bits."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", raw))


def _rows(data: bytes) -> Iterator[bytes]:
    for start in range(_HEADER.size, len(data), _ROW.size):
        yield data[start : start + _ROW.size]


def _next(rows: Iterator[bytes]) -> tuple[bytes, int, int, int, int]:
    return _ROW.unpack(next(rows, b""))


def _files(rows: Iterator[bytes]) -> Iterator[ShardFile]:
    while (head := _next(rows))[0] != _END[:32]:
        raw, flags, count, _, _ = head
        terms = [Term(hash_hex(xorb), start, end, size) for xorb, _, size, start, end in _take(rows, count)]
        _take(rows, count if flags & _VERIFIED else 0)
        if not flags & _WITH_SHA256:
            raise Refusal(400, "The shard gives no sha256 for a file; this server checks content by it")
        yield ShardFile(hash_hex(raw), terms, hash_hex(_next(rows)[0]))


def _xorbs(rows: Iterator[bytes]) -> Iterator[tuple[str, bytes]]:
    while not (row := next(rows, b"")).startswith(_END[:32]):
        raw, _, count, _, _ = _ROW.unpack(row)
        yield hash_hex(raw), row + b"".join(_ROW.pack(*values) for values in _take(rows, count))


def _take(rows: Iterator[bytes], count: int) -> list[tuple[bytes, int, int, int, int]]:
    return [_next(rows) for _ in range(count)]
