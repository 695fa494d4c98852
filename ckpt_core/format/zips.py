"""Zips as `torch.save` writes them, found at the end of a span of a file: stored, not compressed."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

from ckpt_core.errors import DamagedError, UnsupportedError
from ckpt_core.format.index import Span
from ckpt_core.format.source import Source, read_into

MAX_HEADER_BYTES = 1 << 20
_END = struct.Struct("<4s4H2IH")
_END64_LOCATOR = struct.Struct("<4sIQI")
_END64 = struct.Struct("<4sQ2H2I4Q")
_ENTRY = struct.Struct("<4s6H3I5H2I")
_LOCAL = struct.Struct("<4s5H3I2H")
_MAX_DIRECTORY_BYTES = 1 << 20
_U32 = 0xFFFFFFFF
_STREAMS = {
    b"\x28\xb5\x2f\xfd": "compressed by zstd", b"\x1f\x8b": "compressed by gzip", b"BZh": "compressed by bzip2",
    b"\xfd7zXZ\0": "compressed by xz", b"\x04\x22\x4d\x18": "compressed by lz4",
    b"\xff\x06\0\0sNaPpY": "compressed by snappy",
}  # fmt: skip
"""What streams begin with that DCP's extensions can make of a chunk."""


@dataclass(frozen=True, slots=True)
class Member:
    """One file in a zip, by its name below the zip's top directory."""

    name: str
    header: int
    """Where its own header begins in the file; its bytes follow that."""

    nbytes: int
    crc32: int


def read_all(file: Source, span: Span, where: str) -> dict[str, bytes]:
    """Return all that the zip in `span` holds, by name, checked.

    Raises:
        DamagedError: there is no zip as `torch.save` writes it, or it is not what was written.
    """
    return {m.name: content(file, span, m, where, span.length) for m in members(file, span, where)}


def members(file: Source, span: Span, where: str) -> list[Member]:
    """Read the directory of the zip that fills `span` of the open `file`.

    Raises:
        DamagedError: there is no zip as `torch.save` writes it.
    """
    directory, count = _directory(file, span, where)
    found: list[Member] = []
    position = 0
    for _ in range(count):
        if position + _ENTRY.size > len(directory):
            raise DamagedError(f"{where}: the zip directory at {span.offset} is cut short; restore a copy.")
        fields = _ENTRY.unpack_from(directory, position)
        if fields[0] != b"PK\x01\x02":
            raise DamagedError(f"{where}: the zip directory at {span.offset} is damaged; restore a copy.")
        method, crc32, packed, size = fields[4], fields[7], fields[8], fields[9]
        name_length, extra_length, comment_length, local = fields[10], fields[11], fields[12], fields[16]
        start = position + _ENTRY.size
        name = directory[start : start + name_length].decode("utf-8", "replace").partition("/")[2]
        extra = directory[start + name_length : start + name_length + extra_length]
        size, packed, local = _zip64(extra, size, packed, local)
        if method != 0 or packed != size:
            raise UnsupportedError(
                f"{where}: {name} in the zip at {span.offset} is compressed (method {method}), which this library does "
                "not read; save it again with torch.save."
            )
        found.append(Member(name, span.offset + local, size, crc32))
        position = start + name_length + extra_length + comment_length
    if sum(member.nbytes for member in found) > span.length:
        raise DamagedError(f"{where}: the zip at {span.offset} names more bytes than it has; restore a copy.")
    if len({member.name for member in found}) != count:
        raise DamagedError(f"{where}: the zip at {span.offset} holds a name twice; restore a copy of the file.")
    return found


def _directory(file: Source, span: Span, where: str) -> tuple[bytes, int]:
    """Return the zip's central directory and the number of its entries."""
    tail_length = min(span.length, _END.size + _END64_LOCATOR.size + _END64.size)
    tail = _read(file, span.offset + span.length - tail_length, tail_length, where)
    end = len(tail) - _END.size
    if end < 0 or tail[end : end + 4] != b"PK\x05\x06":
        _check_known(file, span, where)
        raise DamagedError(
            f"{where}: no zip ends at byte {span.offset + span.length}, where the metadata says that a chunk does; "
            "the file is cut short, damaged or of another save: restore a copy of it."
        )
    *_, count, size, offset, _ = _END.unpack_from(tail, end)
    locator = end - _END64_LOCATOR.size
    if locator >= 0 and tail[locator : locator + 4] == b"PK\x06\x07":
        record = locator - _END64.size
        if record < 0 or tail[record : record + 4] != b"PK\x06\x06":
            raise DamagedError(f"{where}: the zip64 end at {span.offset} is damaged; restore a copy of the file.")
        *_, count, size, offset = _END64.unpack_from(tail, record)
    if size > _MAX_DIRECTORY_BYTES or offset + size > span.length:
        raise DamagedError(f"{where}: the zip directory at {span.offset} points outside it; restore a copy.")
    return _read(file, span.offset + offset, size, where), count


def _check_known(file: Source, span: Span, where: str) -> None:
    """Check that what is no zip is no stream of another known form either.

    Raises:
        UnsupportedError: it is.
    """
    head = _read(file, span.offset, min(span.length, 16), where)
    form = next((form for mark, form in _STREAMS.items() if head.startswith(mark)), None)
    if head[8:10] == b'{"' and int.from_bytes(head[:8], "little") <= span.length:
        form = "safetensors"
    if form:
        raise UnsupportedError(
            f"{where}: what is stored at {span.offset} is {form}, which this library does not read in a DCP directory; "
            "save it in DCP's default format."
        )


def _zip64(extra: bytes, size: int, packed: int, local: int) -> tuple[int, int, int]:
    """Replace each 32-bit field that is all ones by its 64-bit value from the extra field."""
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, position)
        if kind == 1:
            body = extra[position + 4 : position + 4 + length]
            wide = iter(struct.unpack(f"<{len(body) // 8}Q", body[: len(body) // 8 * 8]))
            size = next(wide, size) if size == _U32 else size
            packed = next(wide, packed) if packed == _U32 else packed
            local = next(wide, local) if local == _U32 else local
        position += 4 + length
    return size, packed, local


def data_offset(file: Source, span: Span, member: Member, where: str) -> int:
    """Return where in the file a member's bytes begin.

    Raises:
        DamagedError: they are not inside the span.
    """
    end = span.offset + span.length
    if member.header + _LOCAL.size <= end:
        fields = _LOCAL.unpack(_read(file, member.header, _LOCAL.size, where))
        start = member.header + _LOCAL.size + fields[9] + fields[10]
        if fields[0] == b"PK\x03\x04" and start + member.nbytes <= end:
            return start
    raise DamagedError(f"{where}: {member.name} in the zip at {span.offset} is damaged; restore a copy of the file.")


def content(file: Source, span: Span, member: Member, where: str, limit: int = MAX_HEADER_BYTES) -> bytes:
    """Return a small member's bytes, whose CRC32 is checked where the writer stored one.

    Raises:
        DamagedError: it is larger than `limit`, or its bytes are not what was written.
    """
    if member.nbytes > limit:
        raise DamagedError(
            f"{where}: {member.name} has {member.nbytes} bytes, expected {limit} at most; restore a copy."
        )
    content = _read(file, data_offset(file, span, member, where), member.nbytes, where)
    if member.crc32 and zlib.crc32(content) != member.crc32:
        raise DamagedError(
            f"{where}: {member.name} has not the CRC32 that was stored with it; restore a copy of the file."
        )
    return content


def _read(file: Source, offset: int, length: int, where: str) -> bytes:
    data = bytearray(length)
    read_into(file, offset, memoryview(data), where)
    return bytes(data)
