"""Files that every process tree keeps open to its end: a lock is free when nobody is left who works under it."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar

_held: ContextVar[tuple[int, ...]] = ContextVar("held", default=())


@contextmanager
def held_open(fd: int) -> Generator[None]:
    """Have each tree that `tasks.process` starts within keep the open file `fd`, which a lock of `flock` belongs to."""
    token = _held.set((*_held.get(), fd))
    try:
        yield
    finally:
        _held.reset(token)


def held() -> tuple[int, ...]:
    """Return the file descriptors that a tree is to keep open."""
    return _held.get()
