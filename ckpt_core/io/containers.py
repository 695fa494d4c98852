"""Types of containers and values that DCP's flattening loses: recorded on save, restored on load.

DCP turns every key into text, drops empty dicts and makes every mapping a dict. `pack` leaves the names and values on
disk as stock DCP has them, and puts a record beside them where that loses something; `unpack` undoes both.
"""

# torch and numpy are only partly annotated.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false

from __future__ import annotations

import io
import json
import math
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from types import NoneType
from typing import Any, cast

import numpy as np
import torch
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ckpt_core.errors import ArgumentError, CkptError, DamagedError
from ckpt_core.format.dtypes import SAVED
from ckpt_core.format.index import Span
from ckpt_core.io.reader import load_value

KINDS_KEY = "_kinds._extra_state"
"""Where a state dict's record stands: JSON text, so that stock DCP reads it as a value like any other.

Its last part is what no converter of models looks at.
"""

Kind = list[Any] | None
"""What a container or value was, where nesting what was flattened does not give it: its name, then its details."""

_MISSING = object()
_MAX_DEPTH = 100
_SURE_DEPTH = 10
_SMALL_BITS = 64
_SMALL_TEXT = 1 << 16
_SURE = frozenset({NoneType, bool, int, float, str})
_SCALARS = _SURE | {complex, bytes, torch.dtype, torch.device, torch.Size}
_KEYS = frozenset({str, int, bool, float, NoneType})


def _as_text(data: bytes | bytearray) -> str:
    return data.decode("latin-1")


_DICTS: dict[type, str] = {dict: "dict", OrderedDict: "OrderedDict", Counter: "Counter", defaultdict: "defaultdict"}
_FACTORIES: dict[Any, str | None] = {None: None, **{kind: kind.__name__ for kind in (dict, list, set, int, float, str)}}
_CONVERTED: dict[type, tuple[str, Callable[[Any], Any], Callable[[Any], Any]]] = {
    frozenset: ("frozenset", list, frozenset),
    bytearray: ("bytearray", _as_text, lambda text: bytearray(text, "latin-1")),
    io.BytesIO: ("BytesIO", lambda file: _as_text(file.getvalue()), lambda text: io.BytesIO(text.encode("latin-1"))),
    bytes: ("bytes", _as_text, lambda text: text.encode("latin-1")),
}
"""Types that weights-only loading refuses: their names, and the ways to a plain value and back."""

_RESTORED = {name: restored for name, _, restored in _CONVERTED.values()}

_NUMBERS = {kind.__name__: kind for kind in (
    np.bool_, np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64, np.float16, np.float32,
    np.float64, np.complex64, np.complex128,
)}  # fmt: skip


def pack(state: Mapping[str, Any], where: str, *, offload: bool = False, sharded: bool = False) -> dict[str, Any]:
    """Return a state dict as DCP can store it, with the record of what DCP would lose.

    Args:
        state: nested containers, values and tensors.
        where: what the names in errors begin with.
        offload: bring tensors to the CPU.
        sharded: allow ShardedTensors, which are left where they are.

    Raises:
        ArgumentError (a ValueError): something in it could not be read back as it is; the message names it.
    """
    packed, kind = _Packer(offload=offload, sharded=sharded).visit(dict(state), (where,))
    if kind is not None:
        packed[KINDS_KEY] = json.dumps(kind[1])
    return packed


def unpack(state: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the state dict that was packed; without a record, `state` itself.

    Raises:
        DamagedError: the record does not fit the state.
    """
    kinds = read_kinds(state.get(KINDS_KEY), where)
    if not kinds:
        return state
    content = {name: value for name, value in state.items() if name != KINDS_KEY}
    return _checked(["dict", list(kinds.items())], content, where)


def read_kinds(record: Any, where: str) -> dict[str, Kind]:
    """Return the kind of each entry of a state dict, from its record; empty if it has none.

    Raises:
        DamagedError: it is no such record.
    """
    if record is None:
        return {}
    try:
        return {str(name): kind for name, kind in json.loads(record)}
    except (ValueError, TypeError, RecursionError):
        raise DamagedError(f"{where}.{KINDS_KEY}: not a record of types; restore a copy of the checkpoint.") from None


def unpack_entry(kind: Kind, name: str, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the entry `name` of a state dict as a dict of it alone; empty if there is none.

    Raises:
        DamagedError: its recorded kind does not fit it.
    """
    if kind is None:
        return {name: values[name]} if name in values else {}
    return {name: _checked(kind, values.get(name, _MISSING), f"{where}.{name}")}


class _Packer:
    """One pass over a state dict."""

    def __init__(self, *, offload: bool, sharded: bool) -> None:
        self._offload, self._sharded = offload, sharded
        self._names: set[str] = set()

    def visit(self, value: Any, path: tuple[str, ...]) -> tuple[Any, Kind]:  # noqa: PLR0911 - one line a type
        """Return what is stored for a value, and its kind where that alone does not give the value back."""
        kind = type(value)
        if len(path) > _MAX_DEPTH:
            raise ArgumentError(f"{'.'.join(path[:9])}...: nested more than {_MAX_DEPTH} deep, or within itself.")
        if isinstance(value, torch.Tensor):
            self._name(path)
            return self._tensor(value, path), None
        if kind in _DICTS:
            return self._dict(value, path)
        if kind is list or kind is tuple:
            return self._sequence(value, path)
        self._name(path)
        if kind in _CONVERTED and (kind is not bytes or not value):  # of bytes, only empty ones are refused
            name, plain, _ = _CONVERTED[kind]
            return _readable(plain(value), value, path), [name]
        if kind is np.ndarray:
            return self._tensor(_from_numpy(value, path), path), ["ndarray"]
        if isinstance(value, np.generic) and _NUMBERS.get(kind.__name__) is kind:
            return value.item(), ["numpy", kind.__name__]
        return _readable(value, value, path), None

    def _dict(self, value: dict[Any, Any], path: tuple[str, ...]) -> tuple[dict[str, Any], Kind]:
        packed: dict[str, Any] = {}
        kinds: list[tuple[Any, Kind]] = []
        for key, entry in value.items():
            _check_key(key, path)
            packed[str(key)], kind = self.visit(entry, (*path, str(key)))
            kinds.append((key, kind))
        name = _DICTS[type(value)]
        if name == "dict" and packed and all(type(key) is str and kind is None for key, kind in kinds):
            return packed, None
        if isinstance(value, defaultdict):
            if value.default_factory not in _FACTORIES:
                raise _refusal(value.default_factory, (*path, "default_factory"))
            return packed, [name, kinds, _FACTORIES[value.default_factory]]
        return packed, [name, kinds]

    def _sequence(self, value: list[Any] | tuple[Any, ...], path: tuple[str, ...]) -> tuple[Any, Kind]:
        """Visit a list or tuple; DCP stores one of plain values whole, which keeps its type."""
        if _has_plain_types(value):
            self._name(path)
            return _readable(value, value, path), None
        visited = [self.visit(entry, (*path, str(place))) for place, entry in enumerate(value)]
        entries, kinds = [entry for entry, _ in visited], [kind for _, kind in visited]
        plain = type(value) is list and all(kind is None for kind in kinds)
        return entries, None if plain else [type(value).__name__, kinds]

    def _tensor(self, tensor: torch.Tensor, path: tuple[str, ...]) -> torch.Tensor:
        """Check that a tensor can be written and read back.

        Raises:
            ArgumentError: it cannot.
        """
        name = ".".join(path)
        if isinstance(tensor, ShardedTensor):
            if self._sharded:
                return tensor
            raise ArgumentError(f"{name}: a ShardedTensor could not be loaded into a module again; use DTensors.")
        if is_lazy(tensor):
            raise ArgumentError(f"{name}: a lazy parameter without a shape yet; run a batch through the module first.")
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if is_traceable_wrapper_subclass(local):
            raise ArgumentError(
                f"{name}: a {type(local).__module__}.{type(local).__qualname__} could not be read back as one; save "
                "the plain tensors that it consists of."
            )
        if isinstance(tensor, DTensor) and any(placement.is_partial() for placement in tensor.placements):
            raise ArgumentError(f"{name}: a DTensor with partial sums ({tensor.placements}); redistribute it first.")
        if local.device.type == "meta":
            raise ArgumentError(f"{name}: a tensor on the meta device, without elements; give the module its weights.")
        if str(tensor.dtype).removeprefix("torch.") not in SAVED or local.layout != torch.strided:
            raise ArgumentError(
                f"{name}: a tensor of {tensor.dtype} and {local.layout} could not be read back; save it in another "
                "form."
            )
        return tensor.to("cpu") if self._offload else tensor

    def _name(self, path: tuple[str, ...]) -> None:
        """Note the name that an entry has in the checkpoint."""
        name = ".".join(path)
        if name in self._names:
            raise ArgumentError(f"{name}: two entries of the state dict have this name once keys are text; rename one.")
        self._names.add(name)


def _check_key(key: Any, path: tuple[str, ...]) -> None:
    fits = type(key) in _KEYS and _is_sure(key) and (type(key) is not float or math.isfinite(key))
    if not fits:
        raise ArgumentError(
            f"{'.'.join(path)}: the key {key!r:.80} of type {type(key).__module__}.{type(key).__qualname__} could not "
            "be read back; use text or numbers for keys."
        )


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _readable(stored: Any, value: Any, path: tuple[str, ...]) -> Any:
    """Return `stored` if weights-only loading gives it back.

    Raises:
        ArgumentError: it does not, or gives something of another type.
    """
    if not _has_plain_types(stored):
        raise _refusal(value, path)
    if _is_sure(stored):
        return stored
    buffer = io.BytesIO()
    try:
        torch.save(stored, buffer)
        with _Bytes(buffer.getbuffer()) as source:
            load_value(source, Span("", 0, len(buffer.getbuffer())), ".".join(path))
    except (CkptError, ValueError, OverflowError, RecursionError, RuntimeError):
        raise _refusal(value, path) from None
    return stored


def _is_sure(value: Any, depth: int = 0) -> bool:
    """Whether it is known without a trial that a plain value can be read back."""
    if type(value) in {list, tuple}:
        return depth < _SURE_DEPTH and all(_is_sure(entry, depth + 1) for entry in value)
    if type(value) is int:
        return value.bit_length() <= _SMALL_BITS
    return type(value) in _SURE and (type(value) is not str or (len(value) <= _SMALL_TEXT and _is_unicode(value)))


def _has_plain_types(value: Any, depth: int = 0) -> bool:
    """Whether a value consists of exactly the types that weights-only loading makes: none of their subclasses."""
    if type(value) in _SCALARS:
        return True
    if type(value) not in {list, tuple, set} or depth > _MAX_DEPTH:
        return False
    return all(_has_plain_types(entry, depth + 1) for entry in value)


def _refusal(value: Any, path: tuple[str, ...]) -> ArgumentError:
    kind = value if isinstance(value, type) else type(value)
    return ArgumentError(
        f"{'.'.join(path)}: a {kind.__module__}.{kind.__qualname__} could not be read back as it is without running "
        "code; keep numbers, text, lists, dicts and tensors in state dicts."
    )


def _from_numpy(array: np.ndarray[Any, Any], path: tuple[str, ...]) -> torch.Tensor:
    try:
        return torch.from_numpy(np.array(array, order="C"))
    except (TypeError, ValueError):
        raise ArgumentError(
            f"{'.'.join(path)}: a numpy array of {array.dtype} has no tensor that holds it; convert its elements."
        ) from None


class _Bytes:
    """A source of bytes in memory."""

    gap_bytes = 0
    block_bytes = 1 << 20

    def __init__(self, data: memoryview) -> None:
        self._data = data

    def __enter__(self) -> _Bytes:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read_at(self, offset: int, buffer: memoryview) -> int:
        """Read bytes from `offset` on into `buffer`; return how many."""
        part = self._data[offset : offset + len(buffer)]
        buffer[: len(part)] = part
        return len(part)

    def close(self) -> None:
        """End reading."""
        self._data.release()


def _checked(kind: list[Any], value: Any, where: str) -> Any:
    try:
        return _unpacked(kind, value)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError, OverflowError):
        raise DamagedError(f"{where}: is not of the recorded type; restore a copy of the checkpoint.") from None


def _unpacked(kind: Kind, value: Any) -> Any:
    """Return a value as it was before it was packed; anything but a fitting pair is some common exception."""
    if kind is None:
        if value is _MISSING:
            raise ValueError("nothing stored")
        return value
    name, details = kind[0], kind[1:]
    if name in {"list", "tuple"}:
        return _unpacked_sequence(name, details[0], value)
    if name in _DICTS.values():
        return _unpacked_dict(name, details, value)
    if value is _MISSING:
        raise ValueError("nothing stored")
    if name == "numpy":
        return _NUMBERS[details[0]](value)
    if name == "ndarray":
        return value.cpu().numpy()
    return _RESTORED[name](value)


def _unpacked_sequence(name: str, kinds: list[Kind], value: Any) -> list[Any] | tuple[Any, ...]:
    if not isinstance(value, (list, tuple)) and value is not _MISSING:
        raise TypeError("no sequence")
    stored: list[Any] = [] if value is _MISSING else list(value)
    # What is empty has no name in the checkpoint, so a list that ends with it comes shorter.
    stored += [_MISSING] * (len(kinds) - len(stored))
    entries = [
        _unpacked(kind, _MISSING if _is_hole(kind, entry) else entry) for kind, entry in zip(kinds, stored, strict=True)
    ]
    return tuple(entries) if name == "tuple" else entries


def _is_hole(kind: Kind, entry: Any) -> bool:
    """Whether nothing is stored for an entry of a list: nesting puts an empty dict there."""
    is_container = kind is not None and kind[0] in {"list", "tuple", *_DICTS.values()}
    return is_container and isinstance(entry, dict) and not entry


def _unpacked_dict(name: str, details: list[Any], value: Any) -> dict[Any, Any]:
    kinds: list[tuple[Any, Kind]] = details[0]
    stored = cast("dict[str, Any]", {} if value is _MISSING else value)
    if not isinstance(value, dict) and value is not _MISSING:
        raise TypeError("no dict")
    pairs = [(key, _unpacked(kind, stored.get(str(key), _MISSING))) for key, kind in kinds]
    if len(stored.keys() - {str(key) for key, _ in kinds}):
        raise ValueError("more is stored than recorded")
    if name == "defaultdict":
        return defaultdict({known: made for made, known in _FACTORIES.items()}[details[1]], pairs)
    made: dict[Any, Any] = {"dict": dict, "OrderedDict": OrderedDict, "Counter": Counter}[name](dict(pairs))
    return made
