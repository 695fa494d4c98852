"""Unpickling that can run nothing: every global resolves to a stand-in from a fixed table, or is refused."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping
from typing import Any, cast

from ckpt_core.errors import DamagedError, UntrustedError


class Record:
    """Stands in for a class: takes any state, runs nothing."""

    def __init__(self, *args: Any) -> None:
        self.args = args
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __getattr__(self, name: str) -> Any:
        state = self.__dict__.get("state")
        if isinstance(state, dict) and name in state:
            return cast("dict[str, Any]", state)[name]
        raise AttributeError(name)

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other


def record(name: str) -> type[Record]:
    """Make a stand-in class called `name`."""
    return type(name, (Record,), {})


class _TableUnpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, table: Mapping[tuple[str, str], Any], where: str) -> None:
        super().__init__(file)
        self._table = table
        self._where = where

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._table[module, name]
        except KeyError:
            raise UntrustedError(
                f"{self._where}: its pickle asks for {module}.{name}, which is not among the types that such a "
                "file is made of; nothing was run. Do not load this file with pickle or torch.load."
            ) from None

    def persistent_load(self, pid: Any) -> Any:
        return pid


def loads(data: bytes, table: Mapping[tuple[str, str], Any], where: str) -> Any:
    """Unpickle `data`, resolving each global through `table`.

    Raises:
        UntrustedError: a global is not in the table.
        DamagedError: the bytes are not a pickle.
    """
    try:
        return _TableUnpickler(io.BytesIO(data), table, where).load()
    except UntrustedError:
        raise
    except (
        pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, IndexError, KeyError,
        OverflowError, MemoryError, RecursionError, UnicodeDecodeError, ImportError,
    ) as error:  # fmt: skip
        raise DamagedError(
            f"{where}: not a readable pickle ({type(error).__name__}: {error}); restore a copy of the file."
        ) from None


def constant(value: Any) -> Callable[..., Any]:
    """Make a stand-in for a function or an enumeration, whose calls all give `value`."""

    def call(*_: Any) -> Any:
        return value

    return call


def first(value: Any, *_: Any) -> Any:
    """Stand in for a function that wraps its first argument."""
    return value
