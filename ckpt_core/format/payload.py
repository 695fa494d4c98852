"""Where the raw bytes of a stored chunk lie.

In DCP's default format a chunk is a complete `torch.save` zip: stored, not compressed. Its central directory, at
the end of the chunk's span, leads to `*/data/0`, the elements, and to `*/data.pkl`, which says how they are
laid out. Both are read here without torch and without running the pickle.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from ckpt_core.errors import DamagedError
from ckpt_core.format import dtypes, pickles
from ckpt_core.format.index import Shape, Span

_END = struct.Struct("<4s4H2IH")
_END64_LOCATOR = struct.Struct("<4sIQI")
_END64 = struct.Struct("<4sQ2H2I4Q")
_ENTRY = struct.Struct("<4s6H3I5H2I")
_LOCAL = struct.Struct("<4s5H3I2H")
_MAX_DIRECTORY_BYTES = 1 << 20
_MAX_PICKLE_BYTES = 1 << 20
_U32 = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Payload:
    """One stored tensor: `nbytes` bytes from `offset` of its file, and how its elements lie in them."""

    offset: int
    nbytes: int
    crc32: int
    """0 where the writer left it out: then it is unchecked, not bad."""

    dtype: str
    shape: Shape
    stride: Shape
    storage_offset: int

    @property
    def contiguous(self) -> bool:
        """Whether the bytes are the elements in row-major order and nothing else."""
        return (
            self.storage_offset == 0
            and self.nbytes == math.prod(self.shape) * dtypes.ITEMSIZE[self.dtype]
            and self.stride == _row_major(self.shape, self.stride)
        )


@dataclass(frozen=True, slots=True)
class _Member:
    name: str
    offset: int
    nbytes: int
    crc32: int


def locate(file: BinaryIO, span: Span, where: str) -> Payload:
    """Find the elements of the tensor stored in `span` of the open `file`.

    Raises:
        DamagedError: the span does not hold one tensor as `torch.save` writes it.
    """
    members = _members(file, span, where)
    data = [m for m in members if m.name.split("/")[-2:] == ["data", "0"]]
    header = [m for m in members if m.name.split("/")[-1] == "data.pkl"]
    if len(data) != 1 or len(header) != 1:
        raise DamagedError(
            f"{where}: the zip at {span.offset} holds {[m.name for m in members]}, expected one tensor (data.pkl "
            "and data/0); restore a copy of the file."
        )
    if header[0].nbytes > _MAX_PICKLE_BYTES:
        raise DamagedError(f"{where}: a tensor's header of {header[0].nbytes} bytes; restore a copy of the file.")
    layout = _layout(_read(file, header[0].offset, header[0].nbytes, where), where)
    payload = Payload(data[0].offset, data[0].nbytes, data[0].crc32, *layout)
    _check_bounds(payload, where)
    return payload


def _members(file: BinaryIO, span: Span, where: str) -> list[_Member]:
    directory, count = _directory(file, span, where)
    members: list[_Member] = []
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
        name = directory[start : start + name_length].decode("utf-8", "replace")
        extra = directory[start + name_length : start + name_length + extra_length]
        size, packed, local = _zip64(extra, size, packed, local)
        if method != 0 or packed != size:
            raise DamagedError(
                f"{where}: {name} in the zip at {span.offset} is compressed; torch.save never does that."
            )
        members.append(_Member(name, _data_offset(file, span, local, size, where), size, crc32))
        position = start + name_length + extra_length + comment_length
    return members


def _directory(file: BinaryIO, span: Span, where: str) -> tuple[bytes, int]:
    """Return the zip's central directory and the number of its entries."""
    tail_length = min(span.length, _END.size + _END64_LOCATOR.size + _END64.size)
    tail = _read(file, span.offset + span.length - tail_length, tail_length, where)
    end = len(tail) - _END.size
    if end < 0 or tail[end : end + 4] != b"PK\x05\x06":
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


def _data_offset(file: BinaryIO, span: Span, local: int, size: int, where: str) -> int:
    header = _read(file, span.offset + local, _LOCAL.size, where)
    fields = _LOCAL.unpack(header)
    start = span.offset + local + _LOCAL.size + fields[9] + fields[10]
    if fields[0] != b"PK\x03\x04" or start + size > span.offset + span.length:
        raise DamagedError(f"{where}: a zip member at {span.offset + local} is damaged; restore a copy.")
    return start


def read_into(file: BinaryIO, offset: int, buffer: memoryview, where: str) -> None:
    """Fill `buffer` from `offset` of the open `file`; large reads come in parts.

    Raises:
        DamagedError: the file ends before the buffer is full.
    """
    done = 0
    while done < len(buffer):
        count = os.preadv(file.fileno(), [buffer[done:]], offset + done)
        if count == 0:
            raise DamagedError(
                f"{where}: ends before byte {offset + len(buffer)}, where the metadata says that data lies; the file "
                "is cut short: restore a copy of it."
            )
        done += count


def _read(file: BinaryIO, offset: int, length: int, where: str) -> bytes:
    data = bytearray(length)
    read_into(file, offset, memoryview(data), where)
    return bytes(data)


class _Layout:
    """What `_rebuild_tensor_v2` was called with."""

    def __init__(self, *args: Any) -> None:
        self.args = args


_GLOBALS: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): _Layout,
    ("torch._utils", "_rebuild_tensor_v3"): _Layout,
    ("torch._utils", "_rebuild_parameter"): pickles.first,
    ("collections", "OrderedDict"): dict,
    ("torch.storage", "UntypedStorage"): "uint8",
    **{("torch", name): dtype for name, dtype in dtypes.STORAGE_CLASSES.items()},
    **{("torch", name): name for name in dtypes.NAMES},
}


def _layout(pickled: bytes, where: str) -> tuple[str, Shape, Shape, int]:
    """Return dtype, shape, strides and storage offset (in elements) from a tensor's pickled header."""
    layout = pickles.loads(pickled, _GLOBALS, where)
    try:
        storage, offset, sizes, strides = layout.args[:4]
        named = layout.args[6:7] or (storage[1],)  # _rebuild_tensor_v3 names its dtype, v2 has its storage's
        dtype, shape, stride = cast("str", named[0]), cast("Shape", tuple(sizes)), cast("Shape", tuple(strides))
        integers = all(type(n) is int and n >= 0 for n in (*shape, *stride, offset))
        if dtype in dtypes.ITEMSIZE and len(shape) == len(stride) and integers:
            return dtype, shape, stride, offset
    except (AttributeError, TypeError, ValueError, IndexError):
        pass  # not the layout of a tensor: told below
    raise DamagedError(f"{where}: the header of a chunk is not that of a plain tensor; restore a copy.")


def _row_major(shape: Shape, stride: Shape) -> Shape:
    """Return the strides of `shape` in row-major order; where a size is 1 or nothing is stored, any will do."""
    if 0 in shape:
        return stride
    expected: list[int] = []
    step = 1
    for size, actual in zip(reversed(shape), reversed(stride), strict=True):
        expected.append(actual if size == 1 else step)
        step *= size
    return tuple(reversed(expected))


def _check_bounds(payload: Payload, where: str) -> None:
    if 0 in payload.shape:
        return
    pairs = list(zip(payload.shape, payload.stride, strict=True))
    last = payload.storage_offset + sum((size - 1) * step for size, step in pairs)
    if any(step == 0 and size > 1 for size, step in pairs):
        raise DamagedError(f"{where}: a chunk repeats elements (stride 0); torch's writer never does that.")
    if (last + 1) * dtypes.ITEMSIZE[payload.dtype] > payload.nbytes:
        raise DamagedError(
            f"{where}: a chunk of shape {payload.shape} needs more than the {payload.nbytes} bytes stored for it; "
            "restore a copy of the file."
        )
