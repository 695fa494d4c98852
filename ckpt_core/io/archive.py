"""What `torch.save` puts around the elements of a tensor: a zip of stored records, written without a copy of them.

The bytes are those of `torch.save`, but for the 40 digits of the serialization id, which no reader looks at. The CRC32
follows the elements, so it can be taken while they are written.
"""

# torch's pickle helpers are only partly annotated.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false

from __future__ import annotations

import io
import math
import pickle
import struct
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch._utils import _rebuild_tensor_v2, _rebuild_tensor_v3  # pyright: ignore[reportPrivateUsage] - the format

from ckpt_core.format.dtypes import STORAGE_CLASSES
from ckpt_core.format.index import Shape

_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR = struct.Struct("<4sIQI")
_END = struct.Struct("<4s4H2IH")
_UTF8, _DESCRIPTOR = 0x800, 0x8
_ALIGNMENT = 64
_PAGE, _LARGE = 4096, 4 << 20
"""Bytes that begin with a page are copied faster, and some file systems can share them between files. That takes
28 KB of padding, so only large tensors have it; `torch.save` can be configured to write the same."""

_U32 = 0xFFFFFFFF
_ZIP64 = 1
_MADE_BY, _NEEDED = 0x031E, 0x2D
"""Versions that the zip64 end names: zip 3.0 on Unix, and 4.5 to read it."""

_STORAGES = {dtype: name for name, dtype in STORAGE_CLASSES.items() if name != "UntypedStorage"}


class Archive:
    """The zip around one tensor: `head`, then the elements in row-major order, then `tail` with their CRC32.

    Args:
        dtype: of the tensor.
        shape: of the tensor, whose elements follow in row-major order.

    Attributes:
        head: what goes in front of the elements.
        page: where in its file it has to begin: at a multiple of this. The elements of a large one then do too.
    """

    def __init__(self, dtype: torch.dtype, shape: Shape) -> None:
        self._records: list[_Record] = []
        self._size = 0
        self._nbytes = math.prod(shape) * dtype.itemsize
        self.page = _PAGE if self._nbytes >= _LARGE else 1
        self._alignment = max(self.page, _ALIGNMENT)
        small = {"data.pkl": _pickled(dtype, shape), ".format_version": b"1"}
        small |= {".storage_alignment": str(self._alignment).encode(), "byteorder": b"little"}
        head = [self._whole(name, data) for name, data in small.items()]
        self.head = b"".join(head) + self._begin("data/0", self._nbytes)

    def tail(self, crc32: int) -> bytes:
        """Return what follows the elements."""
        end = self._end(self._nbytes, crc32)
        end += self._whole("version", b"3\n") + self._whole(".data/serialization_id", b"%040d" % crc32)
        directory = b"".join(record.entry() for record in self._records)
        count, start, size = len(self._records), self._size, len(directory)
        end64 = _END64.pack(b"PK\x06\x06", _END64.size - 12, _MADE_BY, _NEEDED, 0, 0, count, count, size, start)
        locator = _LOCATOR.pack(b"PK\x06\x07", 0, start + size, 1)
        last = _END.pack(b"PK\x05\x06", 0, 0, count, count, size, min(start, _U32), 0)
        return end + directory + end64 + locator + last

    def _whole(self, name: str, data: bytes) -> bytes:
        return self._begin(name, len(data)) + data + self._end(len(data), zlib.crc32(data))

    def _begin(self, name: str, nbytes: int) -> bytes:
        """Return a record's header, padded so that its data is aligned."""
        record = _Record(f"archive/{name}".encode(), self._size, nbytes)
        self._records.append(record)
        wide = record.wide([nbytes, 0])
        padding = -(self._size + _LOCAL.size + len(record.name) + len(wide) + 4) % self._alignment
        extra = wide + struct.pack("<2sH", b"FB", padding) + b"Z" * padding
        header = _LOCAL.pack(b"PK\x03\x04", 0, record.flags, *[0] * 6, len(record.name), len(extra))
        self._size += len(header) + len(record.name) + len(extra) + nbytes
        return header + record.name + extra

    def _end(self, nbytes: int, crc32: int) -> bytes:
        """Return what follows a record's data."""
        record = self._records[-1]
        record.crc32 = crc32
        if nbytes == 0:
            return b""
        descriptor = struct.pack("<4sI2Q" if record.wide([]) else "<4s3I", b"PK\x07\x08", crc32, nbytes, nbytes)
        self._size += len(descriptor)
        return descriptor


@dataclass
class _Record:
    name: bytes
    offset: int
    nbytes: int
    crc32: int = 0

    @property
    def flags(self) -> int:
        return _UTF8 | (_DESCRIPTOR if self.nbytes else 0)

    def wide(self, sizes: list[int]) -> bytes:
        """Return the zip64 field with what does not fit 32 bits: `sizes`, and where the record lies."""
        if max(self.nbytes, self.offset) < _U32:
            return b""
        numbers = (sizes if self.nbytes >= _U32 else []) + ([self.offset] if self.offset >= _U32 else [])
        return struct.pack(f"<2H{len(numbers)}Q", _ZIP64, 8 * len(numbers), *numbers)

    def entry(self) -> bytes:
        """Return the record's entry in the zip's directory."""
        size, extra = min(self.nbytes, _U32), self.wide([self.nbytes, self.nbytes])
        lengths = (len(self.name), len(extra))
        fields = (0, 0, self.flags, 0, 0, 0, self.crc32, size, size, *lengths, *[0] * 4, min(self.offset, _U32))
        return _CENTRAL.pack(b"PK\x01\x02", *fields) + self.name + extra


class _Storage:
    """Stands for a tensor's storage in the pickle that describes it."""


@lru_cache(maxsize=1024)
def _pickled(dtype: torch.dtype, shape: Shape) -> bytes:
    """Return the pickle by which `torch.load` knows a tensor, with its elements in a record of their own."""
    name = _STORAGES.get(str(dtype).removeprefix("torch."))
    kind: Any = getattr(torch, name) if name else torch.UntypedStorage
    identity = ("storage", kind, "0", "cpu", math.prod(shape) * (1 if name else dtype.itemsize))
    buffer = io.BytesIO()
    pickler = _Pickler(buffer, identity)
    hooks: Any = OrderedDict()
    layout = (_Storage(), 0, shape, torch.empty(shape, device="meta").stride(), False, hooks)
    rebuilt = (_rebuild_tensor_v2, layout) if name else (_rebuild_tensor_v3, (*layout, dtype))
    pickler.dump(_Reduced(rebuilt))
    return buffer.getvalue()


class _Reduced:
    """Pickles as a call."""

    def __init__(self, call: tuple[Any, Any]) -> None:
        self._call = call

    def __reduce__(self) -> tuple[Any, Any]:
        return self._call


class _Pickler(pickle.Pickler):
    def __init__(self, buffer: io.BytesIO, identity: tuple[Any, ...]) -> None:
        super().__init__(buffer, protocol=2)
        self._identity = identity

    def persistent_id(self, obj: object) -> Any:
        return self._identity if isinstance(obj, _Storage) else None
