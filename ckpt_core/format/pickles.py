"""Unpickling that can run nothing: an interpreter of the few opcodes that checkpoints are made of.

Every global resolves to a stand-in from a fixed table, or is refused. Keys of dicts are plain, memo and strings are
no larger than the file, so that no input makes it hang or use more memory than a small multiple of its size.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any, cast

from ckpt_core.errors import DamagedError, UntrustedError

Table = Mapping[tuple[str, str], Any]


class Record:
    """Stands in for a class: takes any state, runs nothing."""

    def __init__(self, *args: Any) -> None:
        self.args = args
        self.state: Any = None

    def field(self, name: str) -> Any:
        """Return an attribute of the instance that was pickled.

        Raises:
            ValueError: it has none of that name.
        """
        try:
            return self.state[name]
        except (KeyError, TypeError):
            raise ValueError(f"a {type(self).__name__} without {name}") from None


def record(name: str) -> type[Record]:
    """Make a stand-in class called `name`."""
    return type(name, (Record,), {})


def constant(value: Any) -> Callable[..., Any]:
    """Make a stand-in for a function or an enumeration, whose calls all give `value`."""

    def call(*_: Any) -> Any:
        return value

    return call


def first(value: Any, *_: Any) -> Any:
    """Stand in for a function that wraps its first argument."""
    return value


def empty_dict() -> dict[Any, Any]:
    """Stand in for `OrderedDict()`, which a pickle calls empty and fills afterwards."""
    return {}


def loads(data: bytes, table: Table, where: str) -> Any:
    """Unpickle `data`, resolving each global through `table`.

    Raises:
        UntrustedError: a global is not in the table.
        DamagedError: the bytes are not a pickle of plain data and stand-ins.
    """
    try:
        return _Machine(data, table, where).run()
    except (UntrustedError, DamagedError):
        raise
    except (struct.error, ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
        raise DamagedError(
            f"{where}: not a readable pickle ({type(error).__name__}: {str(error)[:200]}); restore a copy of the file."
        ) from None


_STOP = ord(".")
_SPENT_PER_BYTE = 8
_U16, _I32, _U32, _U64, _F64 = (struct.Struct(code) for code in ("<H", "<i", "<I", "<Q", ">d"))


class _Machine:
    def __init__(self, data: bytes, table: Table, where: str) -> None:
        self.data, self.table, self.where = data, table, where
        self.position = 0
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.spent = 0

    def run(self) -> Any:
        data, operations = self.data, _OPERATIONS
        while True:
            code = data[self.position]
            self.position += 1
            if code == _STOP:
                return self.stack.pop()
            operation = operations.get(code)
            if operation is None:
                raise ValueError(f"opcode {bytes([code])!r}, which checkpoints are not made of")
            operation(self)

    def take(self, length: int) -> bytes:
        start, self.position = self.position, self.position + length
        if self.position > len(self.data):
            raise ValueError(f"{length} bytes wanted at {start}, the pickle ends at {len(self.data)}")
        return self.data[start : self.position]

    def number(self, form: struct.Struct) -> Any:
        value = form.unpack_from(self.data, self.position)[0]
        self.position += form.size
        return value

    def line(self) -> str:
        end = self.data.index(b"\n", self.position)
        text = self.data[self.position : end].decode()
        self.position = end + 1
        return text

    def text(self, length: int) -> str:
        return self.take(length).decode("utf-8", "surrogatepass")

    def since_mark(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def find(self, module: str, name: str) -> Any:
        try:
            return self.table[module, name]
        except KeyError:
            raise UntrustedError(
                f"{self.where}: its pickle asks for {module[:99]}.{name[:99]}, which is not among the types that such "
                "a file is made of; nothing was run. Do not load this file with pickle or torch.load."
            ) from None

    def put(self, items: list[Any]) -> None:
        target: Any = self.stack[-1]
        if type(target) is not dict:
            raise TypeError("items for what is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not is_key(key):
                raise TypeError(f"a dict with a {type(key).__name__} for a key")
            target[key] = value

    def extend(self, items: list[Any]) -> None:
        target: Any = self.stack[-1]
        if type(target) is not list:
            raise TypeError("items for what is no list")
        cast("list[Any]", target).extend(items)

    def call(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if type(arguments) is not tuple or not callable(function):
            raise TypeError("a call of what is no function")
        items = cast("tuple[Any, ...]", arguments)
        self.spent += 1 + sum(len(cast("Any", i)) for i in items if isinstance(i, (list, tuple, dict, str, bytes)))
        if self.spent > _SPENT_PER_BYTE * len(self.data):  # each call may copy what it is given
            raise ValueError("calls with more than the pickle has bytes")
        self.stack.append(function(*cast("tuple[Any, ...]", arguments)))

    def build(self) -> None:
        state, instance = self.stack.pop(), self.stack[-1]
        if isinstance(instance, Record):
            instance.state = state
        elif type(instance) is not dict:  # an OrderedDict's own attributes say nothing
            raise TypeError(f"a state for a {type(instance).__name__}")

    def tuple_of(self, count: int) -> None:
        if len(self.stack) < count:
            raise IndexError("the stack is empty")
        items = tuple(self.stack[-count:])
        del self.stack[-count:]
        self.stack.append(items)


def is_key(key: Any) -> bool:
    """Whether a key can be hashed, and quickly: tuples of tuples may stand for more items than there are atoms."""
    if isinstance(key, tuple):
        return all(type(item) in _PLAIN for item in cast("tuple[Any, ...]", key))
    return type(key) in _PLAIN or isinstance(key, Record)


_PLAIN = {str, int, float, bool, type(None)}


def _push(make: Callable[[_Machine], Any]) -> Callable[[_Machine], None]:
    def operation(machine: _Machine) -> None:
        machine.stack.append(make(machine))

    return operation


def _global_from_stack(machine: _Machine) -> Any:
    name, module = machine.stack.pop(), machine.stack.pop()
    if type(name) is not str or type(module) is not str:
        raise TypeError("a global whose name is no text")
    return machine.find(module, name)


def _memoize(index: Callable[[_Machine], int]) -> Callable[[_Machine], None]:
    def operation(machine: _Machine) -> None:
        machine.memo[index(machine)] = machine.stack[-1]

    return operation


def _byte(machine: _Machine) -> int:
    return machine.take(1)[0]


_CODES: dict[str, Callable[[_Machine], object]] = {
    "\x80": lambda m: m.take(1),  # protocol
    "\x95": lambda m: m.take(8),  # frame
    "(": lambda m: m.marks.append(len(m.stack)),
    "N": _push(lambda _: None),
    "\x88": _push(lambda _: True),
    "\x89": _push(lambda _: False),
    "J": _push(lambda m: m.number(_I32)),
    "K": _push(_byte),
    "M": _push(lambda m: m.number(_U16)),
    "\x8a": _push(lambda m: int.from_bytes(m.take(_byte(m)), "little", signed=True)),
    "G": _push(lambda m: m.number(_F64)),
    "X": _push(lambda m: m.text(m.number(_U32))),
    "\x8c": _push(lambda m: m.text(_byte(m))),
    "\x8d": _push(lambda m: m.text(m.number(_U64))),
    "]": _push(lambda _: []),
    "}": _push(lambda _: {}),
    ")": _push(lambda _: ()),
    "t": _push(lambda m: tuple(m.since_mark())),
    "\x85": lambda m: m.tuple_of(1),
    "\x86": lambda m: m.tuple_of(2),
    "\x87": lambda m: m.tuple_of(3),
    "a": lambda m: m.extend([m.stack.pop()]),
    "e": lambda m: m.extend(m.since_mark()),
    "s": lambda m: m.put([m.stack.pop(-2), m.stack.pop()]),
    "u": lambda m: m.put(m.since_mark()),
    "c": _push(lambda m: m.find(m.line(), m.line())),
    "\x93": _push(_global_from_stack),
    "R": lambda m: m.call(),
    "\x81": lambda m: m.call(),  # cls.__new__(cls, *args)
    "b": lambda m: m.build(),
    "Q": lambda _: None,  # a persistent id stands for itself
    "q": _memoize(_byte),
    "r": _memoize(lambda m: m.number(_U32)),
    "\x94": _memoize(lambda m: len(m.memo)),
    "h": _push(lambda m: m.memo[_byte(m)]),
    "j": _push(lambda m: m.memo[m.number(_U32)]),
}
_OPERATIONS = {ord(code): operation for code, operation in _CODES.items()}
