"""Locks on files and directories, by `flock`: the system drops them when their holder dies."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

SHARED = fcntl.LOCK_SH
EXCLUSIVE = fcntl.LOCK_EX
EXCLUSIVE_NOW = fcntl.LOCK_EX | fcntl.LOCK_NB


def make_locked(path: Path) -> int:
    """Make a directory and lock it; a sweeper that comes between the two deletes it, and it is made again."""
    while True:
        path.mkdir()
        try:
            handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue
        fcntl.flock(handle, fcntl.LOCK_EX)
        if _still_there(handle, path):
            return handle
        os.close(handle)


@contextmanager
def locked(path: Path, mode: int) -> Generator[bool]:
    """Try to lock `path` and tell whether that worked: False if it is held by others, gone or moved away."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a FIFO in its place does not block
    except FileNotFoundError:
        yield False
        return
    try:
        yield _try_lock(handle, mode) and _still_there(handle, path)
    finally:
        os.close(handle)


def _try_lock(handle: int, mode: int) -> bool:
    try:
        fcntl.flock(handle, mode)
    except BlockingIOError:
        return False
    return True


def _still_there(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False
