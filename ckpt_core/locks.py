"""Locks on files and directories, by `flock`: the system drops them when their holder dies."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SHARED = fcntl.LOCK_SH
EXCLUSIVE = fcntl.LOCK_EX
EXCLUSIVE_NOW = fcntl.LOCK_EX | fcntl.LOCK_NB


@dataclass(frozen=True)
class Lock:
    """A file or directory that is locked."""

    path: Path
    handle: int

    @property
    def in_place(self) -> bool:
        """Whether `path` is what was locked, and not gone, moved away or followed by another."""
        try:
            return os.path.samestat(os.fstat(self.handle), self.path.stat())
        except (FileNotFoundError, NotADirectoryError):
            return False


def make_locked(path: Path) -> int:
    """Make a directory and lock it; a sweeper that comes between the two deletes it, and it is made again."""
    while True:
        path.mkdir()
        try:
            handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue
        fcntl.flock(handle, fcntl.LOCK_EX)
        if Lock(path, handle).in_place:
            return handle
        os.close(handle)


@contextmanager
def locked(path: Path, mode: int) -> Generator[Lock | None]:
    """Try to lock `path` and give the lock: None if it is held by others, gone or moved away."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a FIFO in its place does not block
    except (FileNotFoundError, NotADirectoryError):
        yield None
        return
    try:
        lock = Lock(path, handle)
        yield lock if _try_lock(handle, mode) and lock.in_place else None
    finally:
        os.close(handle)


def _try_lock(handle: int, mode: int) -> bool:
    try:
        fcntl.flock(handle, mode)
    except BlockingIOError:
        return False
    return True
