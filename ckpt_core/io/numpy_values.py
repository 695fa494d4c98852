"""Values in which numpy's scalars and arrays stand among plain data and tensors, made without numpy's own unpickling.

numpy's types believe the state that a pickle gives them: the state of a dtype alone can make it read memory that is
none of its own. Here each one is made from bytes and the name of a plain type.
"""

# torch's constructors are only partly annotated.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch

from ckpt_core.errors import UnsupportedError
from ckpt_core.format import dtypes, pickles

_PLAIN = re.compile(r"b1|[iu][1248]|f(2|4|8|16)|c(8|16|32)|[SU][0-9]{1,9}")
_ORDERS = {"<": "<", ">": ">", "|": "|", "=": "<"}
_MAX_DEPTH = 200
_Dtype, _Array = pickles.record("dtype"), pickles.record("ndarray")


def load(records: Mapping[str, bytes], where: str) -> Any:
    """Return the value in the records of a zip that `torch.save` wrote.

    Raises:
        UnsupportedError: something in it is of another kind.
        DamagedError: its pickle is not readable.
        ValueError, TypeError, KeyError, IndexError: its parts contradict each other.
    """
    return _Plain().of(pickles.loads(records["data.pkl"], _Table(records), where), 0)


class _Table(dict[tuple[str, str], Any]):
    """What a pickle of values may ask for."""

    def __init__(self, records: Mapping[str, bytes]) -> None:
        storages: dict[str, Any] = {}

        def rebuild(storage: Any, offset: int, size: Any, stride: Any, *rest: Any) -> torch.Tensor:
            kind, unit, key, _, count = storage
            dtype = rest[2] if len(rest) > 2 and isinstance(rest[2], torch.dtype) else unit  # noqa: PLR2004
            if (
                kind != "storage"
                or type(key) is not str
                or type(count) is not int
                or len(records[f"data/{key}"]) != count * unit.itemsize
            ):
                raise ValueError("a storage of another size than its elements")
            if key not in storages:
                storages[key] = torch.frombuffer(bytearray(records[f"data/{key}"] or b"\0"), dtype=torch.uint8)
            last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True) if n)
            if min(offset, *size, *stride, 0) < 0 or (
                0 not in size and (last + 1) * dtype.itemsize > count * unit.itemsize
            ):
                raise ValueError("a tensor with elements beyond its storage")
            elements = storages[key][: len(records[f"data/{key}"]) // dtype.itemsize * dtype.itemsize].view(dtype)
            return elements.as_strided(size, stride, offset)

        types = {name: getattr(torch, name) for name in dtypes.NAMES}
        super().__init__({
            **{("torch", name): dtype for name, dtype in types.items()},
            **{("torch", name): types[dtype] for name, dtype in dtypes.STORAGE_CLASSES.items()},
            ("torch.storage", "UntypedStorage"): torch.uint8,
            ("torch._utils", "_rebuild_tensor_v2"): rebuild,
            ("torch._utils", "_rebuild_tensor_v3"): rebuild,
            ("torch._utils", "_rebuild_parameter"): pickles.first,
            ("torch", "Size"): _size,
            ("collections", "OrderedDict"): pickles.empty_dict,
            ("_codecs", "encode"): _encode,
            ("__builtin__", "bytes"): _no_bytes,
            ("__builtin__", "set"): _set,
            ("__builtin__", "complex"): _complex,
            ("numpy", "dtype"): _Dtype,
            ("numpy", "ndarray"): _Array,
            **{
                (f"numpy.{core}.multiarray", name): function
                for core in ("core", "_core")
                for name, function in (("scalar", _scalar), ("_reconstruct", _reconstruct))
            },
        })  # fmt: skip


def _size(numbers: Any = ()) -> torch.Size:
    return torch.Size(numbers)


def _encode(text: Any, encoding: Any = "") -> bytes:
    if type(text) is not str or encoding != "latin1":
        raise TypeError("bytes in a form that torch.save does not write")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    return b""


def _set(items: Any = ()) -> set[Any]:
    return {item if pickles.is_key(item) else _refuse(item) for item in items}


def _complex(real: Any, imaginary: Any) -> complex:
    return complex(float(real), float(imaginary))


def _refuse(item: object) -> Any:
    raise TypeError(f"a set with a {type(item).__name__}")


def _scalar(dtype: Any, data: Any) -> Any:
    kind = _plain_dtype(dtype)
    if type(data) is not bytes or len(data) != kind.itemsize:
        raise ValueError(f"a number of {kind} without its {kind.itemsize} bytes")
    return np.frombuffer(data, kind)[0] if kind.itemsize else kind.type()


def _reconstruct(cls: Any, *_: Any) -> pickles.Record:
    if cls is not _Array:
        raise TypeError("an array of another class")
    return _Array()


def _array(record: pickles.Record) -> np.ndarray[Any, Any]:
    state: Any = record.state
    _, shape, dtype, by_column, data = state
    kind = _plain_dtype(dtype)
    sizes = tuple(int(size) for size in shape)
    if type(data) is not bytes or min(sizes, default=0) < 0 or math.prod(sizes) * kind.itemsize != len(data):
        raise ValueError(f"an array of {sizes} with other bytes than those of {kind}")
    elements = np.frombuffer(data, kind) if data else np.empty(0, kind)
    return elements.reshape(sizes, order="F" if by_column else "C").copy("K")


def _plain_dtype(record: Any) -> np.dtype[Any]:
    """Return numpy's type of the name and byte order that a pickled one has.

    Raises:
        UnsupportedError: it is none of plain numbers or text: of objects, of fields, of times.
    """
    name = record.args[0] if isinstance(record, _Dtype) and record.args else None
    if type(name) is not str or not _PLAIN.fullmatch(name):
        said = repr(name[:40]) if type(name) is str else f"named by a {type(name).__name__}"
        raise UnsupportedError(f"an array of numpy's type {said}, which this library does not read")
    state: Any = record.state
    order = "<" if state is None else state[1]
    if type(order) is not str:  # a tuple may stand for more items than there are atoms: it is neither hashed nor shown
        raise TypeError("a byte order that is no text")
    return np.dtype(_ORDERS[order] + name)


class _Plain:
    """Values with the arrays that their pickle describes; each is made once, however often it stands in the pickle."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[Any, Any]] = {}

    def of(self, value: Any, depth: int) -> Any:
        """Return `value` with arrays."""
        if id(value) not in self._made:
            self._made[id(value)] = value, self._make(value, depth)
        return self._made[id(value)][1]

    def _make(self, value: Any, depth: int) -> Any:
        if depth > _MAX_DEPTH:
            raise ValueError(f"more than {_MAX_DEPTH} containers in each other")
        if isinstance(value, _Array):
            return _array(value)
        if isinstance(value, (pickles.Record, type)):
            raise UnsupportedError("a type in place of a value, which this library does not read")
        if type(value) is dict:
            return {key: self.of(inner, depth + 1) for key, inner in cast("dict[Any, Any]", value).items()}
        if isinstance(value, (list, tuple)):
            items = [self.of(inner, depth + 1) for inner in cast("list[Any]", value)]
            return items if isinstance(value, list) else tuple(items)
        return value
