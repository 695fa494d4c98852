"""The header of a safetensors file: which tensors it holds, and where. Read strictly, for a file may be hostile."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from ckpt_core.durable import file_size
from ckpt_core.errors import DamagedError
from ckpt_core.format import dtypes
from ckpt_core.format.source import open_source, read_into

if TYPE_CHECKING:
    from ckpt_core.urls import Place

MAX_HEADER_BYTES = 100_000_000
MAX_METADATA_BYTES = 16 << 20
MAX_NAME_LENGTH = 1024
MAX_TENSORS = 100_000
_MAX_ENTRY_BYTES = 2048
MAX_RANK = 64
_MAX = 1 << 62
_SHARDING_KEY = "DCP_SHARDING_INFO"
_LENGTH = struct.Struct("<Q")

_DTYPES = {code: name for name, code in dtypes.SAFETENSORS.items()}
_BITS = {code: 8 * dtypes.ITEMSIZE[name] for code, name in _DTYPES.items()} | {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a safetensors file: `nbytes` bytes from `offset` of the file, row-major."""

    code: str
    """Element type by its name in safetensors, such as `BF16`."""

    shape: tuple[int, ...]
    offset: int
    nbytes: int
    begin: tuple[int, ...] | None = None
    """Where it begins in the whole tensor, in a file that holds parts of tensors as torch's distributed savers write
    them; None elsewhere."""

    @property
    def dtype(self) -> str | None:
        """Element type by torch's name; None for those that torch packs several to a byte."""
        return _DTYPES.get(self.code)


def read_header(place: Place) -> Mapping[str, StoredTensor]:
    """Read which tensors a safetensors file holds, in the order of their bytes.

    Raises:
        DamagedError: it is no safetensors file, or its tensors leave a gap, overlap, or end before the file or after.
    """
    size = file_size(place)
    if size is None:
        raise DamagedError(f"{place}: missing, or not a regular file; restore a copy of it.")
    try:
        return _tensors(*_read(place, size))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        said = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
        raise DamagedError(f"{place}: not a sound safetensors file ({said[:300]}); restore a copy of it.") from None


def _read(place: Place, size: int) -> tuple[dict[str, Any], int, int]:
    """Return the header's JSON, where the data begins, and how many bytes it has."""
    if size < _LENGTH.size:
        raise ValueError(f"{size} bytes, expected 8 at least")
    with open_source(place) as source:
        start = bytearray(_LENGTH.size)
        read_into(source, 0, memoryview(start), str(place))
        [length] = _LENGTH.unpack(start)
        if not 0 < length <= min(MAX_HEADER_BYTES, size - _LENGTH.size):
            raise ValueError(f"a header of {length} bytes in a file of {size}, expected at most {MAX_HEADER_BYTES}")
        text = bytearray(length)
        read_into(source, _LENGTH.size, memoryview(text), str(place))
    _check_count(text)
    document = json.loads(text.decode(), object_pairs_hook=_without_twice)
    begin = _LENGTH.size + length
    return document, begin, size - begin


def _check_count(text: bytearray) -> None:
    """Count tensors before they are parsed: parsed, they would take ten times the memory of their text."""
    count = text.count(b'"data_offsets"')
    if count > MAX_TENSORS:
        raise ValueError(f"{count} tensors, expected at most {MAX_TENSORS}")
    if len(text) > MAX_METADATA_BYTES + count * _MAX_ENTRY_BYTES:
        raise ValueError(f"a header of {len(text)} bytes for {count} tensors")


def _without_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice in the header")
    return found


def _tensors(document: dict[str, Any], begin: int, nbytes: int) -> dict[str, StoredTensor]:
    metadata = document.pop("__metadata__", {})
    _check_metadata(metadata)
    if len(document) > MAX_TENSORS:
        raise ValueError(f"{len(document)} tensors, expected at most {MAX_TENSORS}")
    tensors = {name: _tensor(name, entry, begin) for name, entry in document.items()}
    if _SHARDING_KEY in metadata:
        parts = json.loads(metadata[_SHARDING_KEY])
        tensors = {name: replace(tensor, begin=_begin(name, tensor, parts)) for name, tensor in tensors.items()}
    ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)))
    position = begin
    for name, tensor in ordered.items():
        if tensor.offset != position:
            kind = "a gap" if tensor.offset > position else "an overlap"
            raise ValueError(f"{kind} before {name}: data at {tensor.offset - begin}, expected {position - begin}")
        position += tensor.nbytes
    if position != begin + nbytes:
        raise ValueError(f"tensors of {position - begin} bytes, and the file has {nbytes} for them")
    return ordered


def _check_metadata(metadata: Any) -> None:
    texts = [text for pair in metadata.items() for text in pair]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("__metadata__ holds something that is no text")
    if sum(map(len, texts)) > MAX_METADATA_BYTES:
        raise ValueError(f"__metadata__ has more than {MAX_METADATA_BYTES} bytes")


def _tensor(name: str, entry: dict[str, Any], begin: int) -> StoredTensor:
    if len(name) > MAX_NAME_LENGTH:
        raise ValueError(f"a name of {len(name)} characters, expected at most {MAX_NAME_LENGTH}: {name[:40]}...")
    if entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name} has {sorted(entry)[:9]}, expected dtype, shape and data_offsets")
    code, shape, (start, stop) = entry["dtype"], _numbers(entry["shape"]), _numbers(entry["data_offsets"])
    if type(code) is not str or code not in _BITS:
        raise ValueError(f"{name} has dtype {str(code)[:40]!r}, which is none that this library reads")
    if math.prod(shape) >= _MAX:
        raise ValueError(f"{name} has more elements than any file: {list(shape)}")
    bits = math.prod(shape) * _BITS[code]
    if bits % 8 or stop - start != bits // 8:
        raise ValueError(f"{name} has {stop - start} bytes, and {code} {list(shape)} needs {bits / 8:g}")
    return StoredTensor(code, shape, begin + start, stop - start)


def _begin(name: str, tensor: StoredTensor, parts: dict[str, Any]) -> tuple[int, ...]:
    begin = _numbers(parts[name]["saved_offsets"])
    if len(begin) != len(tensor.shape):
        raise ValueError(f"{name} of shape {list(tensor.shape)} begins at {list(begin)} of the whole")
    return begin


def _numbers(value: Any) -> tuple[int, ...]:
    numbers = tuple(cast("list[Any]", value)) if isinstance(value, list) else None
    if numbers is None or len(numbers) > MAX_RANK or not all(type(n) is int and 0 <= n < _MAX for n in numbers):
        raise ValueError(f"{str(cast('object', value))[:60]}: no list of sizes")
    return numbers
