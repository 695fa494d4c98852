"""Unpickling that can run nothing: an interpreter of the few opcodes that checkpoints are made of.

Every global resolves to a stand-in from a fixed table, or is refused. Keys of dicts are plain, memo and strings are
no larger than the file, and objects are counted, so that no input makes it hang or use more memory than about twenty
times its size.

`pickle.Unpickler` promises none of the latter, whatever its `find_class`: it would hash a key of 2 ** 64 atoms for
ever, and make room for a memo or for bytes as large as a number in the file says.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

from ckpt_core.errors import DamagedError, UnsupportedError, UntrustedError
from ckpt_core.format.pickled_names import may_run_code

Table = Mapping[tuple[str, str], Any]


class Record:
    """Stands in for a class: takes any state, runs nothing."""

    __slots__ = ("args", "state")

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


class Unknown(Record):
    """Stands in for a class that is not in the table; `name` says which."""

    __slots__ = ()
    name = ""


def record(name: str) -> type[Record]:
    """Make a stand-in class called `name`."""
    return type(name, (Record,), {"__slots__": ()})


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


def loads(data: bytes, table: Table, where: str, *, unknown: bool = False) -> Any:
    """Unpickle `data`, resolving each global through `table`.

    Args:
        data: the pickle.
        table: what stands for each global.
        where: for errors.
        unknown: let a class that is not in the table become a class below `Unknown`, instead of raising.

    Raises:
        UntrustedError: a global is not in the table, and could run code.
        UnsupportedError: a global is not in the table.
        DamagedError: the bytes are not a pickle of plain data and stand-ins.
    """
    try:
        return _Machine(data, table, where, unknown=unknown).run()
    except (UntrustedError, UnsupportedError, DamagedError):
        raise
    except (struct.error, ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
        raise DamagedError(
            f"{where}: not a readable pickle ({type(error).__name__}: {str(error)[:200]}); restore a copy of the file."
        ) from None


_U16, _I32, _U32, _U64, _F64 = (struct.Struct(code) for code in ("<H", "<i", "<I", "<Q", ">d"))
_ARGUMENTS_PER_BYTE = 8
_BYTES_PER_OBJECT = 5
"""Metadata has twelve bytes for each tuple, list, dict or object, a list of empty lists that `torch.save` wrote six. An
object takes up to a hundred bytes of memory, and may take a single byte of a pickle."""

_FREE_OBJECTS = 10_000
_MAX_MARKS = 10_000
"""How deep containers may be in each other; pickling ends in a RecursionError long before."""

_MAX_UNKNOWN = 1000
_BUILD = ord("b")
_NEW = b"\x81\x94}\x94("
"""NEWOBJ MEMOIZE EMPTY_DICT MEMOIZE MARK: what follows the EMPTY_TUPLE of each object with attributes."""

_CALL = b"\x94\x85\x94R\x94"
"""MEMOIZE TUPLE1 MEMOIZE REDUCE MEMOIZE: what follows the tuple of each `torch.Size`."""


class _Machine:
    def __init__(self, data: bytes, table: Table, where: str, *, unknown: bool) -> None:
        self.data, self.table, self.where = data, table, where
        self.unknown: dict[tuple[str, str], type[Unknown]] | None = {} if unknown else None
        self.limit = _FREE_OBJECTS + len(data) // _BYTES_PER_OBJECT
        self.made = 0
        self.position = 0
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: list[Any] | _SparseMemo = []
        self.arguments = 0

    def run(self) -> Any:  # noqa: C901, PLR0912, PLR0915 - one loop: a call for each opcode would take minutes
        """Run the opcodes: here those that each chunk in metadata needs, some in groups; in the table the others."""
        data, stack, marks, memo = self.data, self.stack, self.marks, self.memo
        push, i32, u32 = stack.append, _I32.unpack_from, _U32.unpack_from
        position, made, limit = 0, 0, self.limit
        while True:
            if made > limit:
                raise ValueError(f"more than {limit} objects in {len(data)} bytes")
            code = data[position]
            position += 1
            match code:
                case 0x6A:  # LONG_BINGET
                    push(memo[u32(data, position)[0]])
                    position += 4
                case 0x68:  # BINGET
                    push(memo[data[position]])
                    position += 1
                case 0x4B:  # BININT1
                    push(data[position])
                    position += 1
                case 0x94:  # MEMOIZE
                    memo.append(stack[-1])
                case 0x29:  # EMPTY_TUPLE
                    if data.startswith(_NEW, position) and isinstance(stack[-1], type):
                        instance = stack[-1] = stack[-1]()
                        state: dict[Any, Any] = {}
                        made += 2
                        push(state)
                        memo.extend((instance, state))
                        marks.append(len(stack))
                        position += len(_NEW)
                    else:
                        push(())
                case 0x75 | 0x73:  # SETITEMS, SETITEM
                    start = marks.pop() if code == 0x75 else len(stack) - 2  # noqa: PLR2004 - named in the line above
                    items = iter(stack[start:])
                    if (len(stack) - start) % 2:
                        raise ValueError("a key without a value")
                    del stack[start:]
                    target = stack[-1]
                    if isinstance(target, Record):  # of a foreign class that is a dict, whose items say nothing
                        continue
                    if type(target) is not dict:
                        raise TypeError("items for what is no dict")
                    made += not target  # the first item takes more memory than the empty dict
                    for key in items:
                        if type(key) is not str and not is_key(key):
                            raise TypeError(f"a dict with a {type(key).__name__} for a key")
                        target[key] = next(items)
                    if data[position] == _BUILD and isinstance(owner := stack[-2], Record):
                        stack.pop()
                        owner.state = target
                        position += 1
                case 0x62:  # BUILD
                    self.build()
                case 0x4D:  # BININT2
                    push(data[position] | data[position + 1] << 8)
                    position += 2
                case 0x85 | 0x86:  # TUPLE1, TUPLE2
                    last = stack.pop()
                    made += 1
                    items = (last,) if code == 0x85 else (stack.pop(), last)  # noqa: PLR2004 - named two lines above
                    if data.startswith(_CALL, position) and callable(stack[-1]):
                        value = stack[-1] = stack[-1](items)
                        memo.extend((items, (items,), value))
                        position += len(_CALL)
                    else:
                        push(items)
                case 0x4A:  # BININT
                    push(i32(data, position)[0])
                    position += 4
                case 0x8C:  # SHORT_BINUNICODE
                    start = position + 1
                    position = start + data[position]
                    push(_text(data[start:position], position - start))
                case 0x7D:  # EMPTY_DICT
                    push({})
                    made += 1
                case 0x28:  # MARK
                    marks.append(len(stack))
                    if len(marks) > _MAX_MARKS:
                        raise ValueError(f"more than {_MAX_MARKS} containers in each other")
                case 0x2E:  # STOP
                    return stack.pop()
                case _:
                    self.position = position
                    operation = _OPERATIONS.get(code)
                    if operation is None:
                        raise ValueError(f"opcode {bytes([code])!r}, which checkpoints are not made of")
                    operation(self)
                    position, memo = self.position, self.memo

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
        return _text(self.take(length), length)

    def memoize(self, number: int) -> None:
        memo = self.memo
        if number == len(memo):
            memo.append(self.stack[-1])
            return
        if number > len(memo) and isinstance(memo, list):
            self.memo = memo = _SparseMemo(enumerate(memo))
            memo.limit = self.limit + len(memo)
        memo[number] = self.stack[-1]

    def since_mark(self) -> list[Any]:
        self.count()
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def find(self, module: str, name: str) -> Any:
        try:
            return self.table[module, name]
        except KeyError:
            return self.stranger(module, name)

    def stranger(self, module: str, name: str) -> type[Unknown]:
        """Return what stands in for a class that is not in the table."""
        path = f"{module[:99]}.{name[:99]}"
        if may_run_code(module, name):
            raise UntrustedError(
                f"{self.where}: its pickle asks for {path}, which could run code; nothing was run. Do not load this "
                "file with pickle or torch.load."
            )
        if self.unknown is None:
            raise UnsupportedError(
                f"{self.where}: its pickle asks for {path}, which this library does not read; save numbers, text, "
                "lists, dicts and tensors."
            )
        if len(self.unknown) == _MAX_UNKNOWN:
            raise ValueError(f"more than {_MAX_UNKNOWN} classes")
        if (module, name) not in self.unknown:
            self.unknown[module, name] = type("Unknown", (Unknown,), {"__slots__": (), "name": path})
        return self.unknown[module, name]

    def count(self) -> None:
        """Count an object that an operation of the table makes."""
        self.made += 1
        if self.made > self.limit:
            raise ValueError(f"more than {self.limit} objects in {len(self.data)} bytes")

    def extend(self, items: list[Any]) -> None:
        target: Any = self.stack[-1]
        if isinstance(target, Record):  # of a foreign class that is a list, or a deque
            return
        if type(target) is not list:
            raise TypeError("items for what is no list")
        cast("list[Any]", target).extend(items)

    def call(self) -> None:
        self.count()
        arguments, function = self.stack.pop(), self.stack[-1]
        if type(arguments) is not tuple or not callable(function):
            raise TypeError("a call of what is no function")
        arguments = cast("tuple[Any, ...]", arguments)
        if len(arguments) > 1:  # a call may copy them, and they may be in the file once for many calls
            self.arguments += len(arguments)
            if self.arguments > _ARGUMENTS_PER_BYTE * len(self.data):
                raise ValueError("calls with more than the pickle has bytes")
        self.stack[-1] = function(*arguments)

    def build(self) -> None:
        state, instance = self.stack.pop(), self.stack[-1]
        if isinstance(instance, Record):
            instance.state = state
        elif type(instance) is not dict:  # an OrderedDict's own attributes say nothing
            raise TypeError(f"a state for a {type(instance).__name__}")

    def tuple_of(self, count: int) -> None:
        self.count()
        stack = self.stack
        if len(stack) < count:
            raise IndexError("the stack is empty")
        stack[-count:] = [tuple(stack[-count:])]


class _SparseMemo(dict[int, Any]):
    """A memo whose numbers leave some out; what is added has the number of those before it, as in pickle."""

    limit = 0

    def append(self, value: Any) -> None:
        if len(self) > self.limit:
            raise ValueError(f"more than {self.limit} entries of a memo that leaves numbers out")
        self[len(self)] = value

    def extend(self, values: Iterable[Any]) -> None:
        for value in values:
            self.append(value)


def is_key(key: Any) -> bool:
    """Whether a key can be hashed, and quickly: tuples of tuples may stand for more items than there are atoms."""
    if type(key) is tuple:
        return _PLAIN.issuperset(map(type, cast("tuple[Any, ...]", key)))
    return type(key) in _PLAIN or isinstance(key, Record)


_PLAIN: set[type] = {str, int, float, bool, type(None)}


def _text(data: bytes, length: int) -> str:
    if len(data) < length:
        raise ValueError(f"a text of {length} bytes, of which the pickle has {len(data)}")
    return data.decode("utf-8", "surrogatepass")


def _push(make: Callable[[_Machine], Any]) -> Callable[[_Machine], None]:
    def operation(machine: _Machine) -> None:
        machine.stack.append(make(machine))

    return operation


def _global_from_stack(machine: _Machine) -> Any:
    name, module = machine.stack.pop(), machine.stack.pop()
    if type(name) is not str or type(module) is not str:
        raise TypeError("a global whose name is no text")
    return machine.find(module, name)


def _empty_list(machine: _Machine) -> list[Any]:
    machine.count()
    return []


def _byte(machine: _Machine) -> int:
    return machine.take(1)[0]


def _huge_integer(machine: _Machine) -> None:
    machine.take(machine.number(_U32))
    raise UnsupportedError(f"{machine.where}: an integer of more than 255 bytes, which this library does not read.")


_CODES: dict[str, Callable[[_Machine], object]] = {
    "\x80": lambda m: m.take(1),  # protocol
    "\x95": lambda m: m.take(8),  # frame
    "N": _push(lambda _: None),
    "\x88": _push(lambda _: True),
    "\x89": _push(lambda _: False),
    "\x8a": _push(lambda m: int.from_bytes(m.take(_byte(m)), "little", signed=True)),
    "\x8b": _huge_integer,
    "G": _push(lambda m: m.number(_F64)),
    "X": _push(lambda m: m.text(m.number(_U32))),
    "\x8d": _push(lambda m: m.text(m.number(_U64))),
    "]": _push(_empty_list),
    "t": _push(lambda m: tuple(m.since_mark())),
    "\x87": lambda m: m.tuple_of(3),
    "R": lambda m: m.call(),
    "\x81": lambda m: m.call(),  # cls.__new__(cls, *args)
    "a": lambda m: m.extend([m.stack.pop()]),
    "e": lambda m: m.extend(m.since_mark()),
    "c": _push(lambda m: m.find(m.line(), m.line())),
    "\x93": _push(_global_from_stack),
    "Q": lambda _: None,  # a persistent id stands for itself
    "q": lambda m: m.memoize(_byte(m)),
    "r": lambda m: m.memoize(m.number(_U32)),
}
_OPERATIONS = {ord(code): operation for code, operation in _CODES.items()}
