"""Locks on files, by `flock`: the system drops them when the process that took them dies.

On NFS, Linux makes a lock of `flock` one on the bytes of the file, so that all clients see it (man 2 flock, "NFS
details"). Two things follow: an exclusive lock needs a file that is open for writing, and a directory cannot be locked
at all, since each client then sees only its own locks. So only files are locked here.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from ckpt_core import durable

SHARED = fcntl.LOCK_SH
EXCLUSIVE = fcntl.LOCK_EX
EXCLUSIVE_NOW = fcntl.LOCK_EX | fcntl.LOCK_NB

UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
"""How a file system says that it has no locks."""

_HELD_BY_OTHERS = {errno.EAGAIN, errno.EACCES}
_NOT_WRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ETXTBSY}

_taken: dict[int, Lock] = {}
"""The locks of this process, by file descriptor."""


class Lock:
    """A file that this process has locked."""

    def __init__(self, path: Path, handle: int) -> None:
        self.path = path
        self.handle = handle
        self._process = os.getpid()
        _taken[handle] = self

    @property
    def in_place(self) -> bool:
        """Whether `path` is what was locked, and not gone, moved away or followed by another."""
        try:
            return os.path.samestat(os.fstat(self.handle), self.path.stat())
        except OSError as error:
            if error.errno in durable.GONE:
                return False
            raise

    def release(self) -> None:
        """Unlock the file and close it; raises nothing, since what was done under the lock stands."""
        handle, self.handle = self.handle, -1
        if handle < 0:
            return
        del _taken[handle]
        # Closing is not enough: a process that was forked meanwhile has the same open file, and so the lock.
        if self._process == os.getpid():
            with suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_UN)
        with suppress(OSError):  # it is closed all the same
            os.close(handle)

    def close_inherited(self) -> None:
        """Close the file in a forked process, without unlocking it for the process that locked it."""
        handle, self.handle = self.handle, -1
        with suppress(OSError):
            os.close(handle)


def _close_inherited() -> None:
    """Close all locked files: else a worker that outlives a trainer that was killed would keep the trainer's locks."""
    inherited = list(_taken.values())
    _taken.clear()
    for lock in inherited:
        lock.close_inherited()


os.register_at_fork(after_in_child=_close_inherited)


@contextmanager
def locked(path: Path, mode: int) -> Generator[Lock | None]:
    """Try to lock a file and give the lock: None if others hold it, or if the file is gone or was moved away.

    Raises:
        PermissionError: the file has to be open for writing to be locked, and this user may not write it.
        OSError: the file system has no locks.
    """
    try:
        lock = Lock(path, _open(path, mode))
    except OSError as error:
        if error.errno not in durable.GONE:
            raise
        yield None
        return
    try:
        yield lock if take(lock.handle, mode, path) and lock.in_place else None
    finally:
        lock.release()


@contextmanager
def lock_file(path: Path, mode: int = EXCLUSIVE) -> Generator[Lock | None]:
    """Lock a file that is made for that; give None if others hold it and `mode` does not wait.

    It goes with an exclusive lock. One that was shared stays until then, since others may share it.
    """
    lock = make_lock_file(path, mode)
    try:
        yield lock
    finally:
        if lock is not None and mode == SHARED:
            lock.release()
        elif lock is not None:
            remove_lock_file(lock)


def make_lock_file(path: Path, mode: int = EXCLUSIVE) -> Lock | None:
    """Make and lock a file that `remove_lock_file` removes; one that a dead process left is taken over.

    Returns:
        None if others hold it and `mode` does not wait for them.
    """
    while True:
        lock = Lock(path, os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
        try:
            # Other users of the directory have to lock this file, too, to see whether its maker still lives.
            durable.share(path)
            if not take(lock.handle, mode, path):
                lock.release()
                return None
            if lock.in_place:
                return lock
        except FileNotFoundError:  # removed by the one who had it
            pass
        except OSError as error:
            if error.errno in UNSUPPORTED:  # then nobody has it
                remove_lock_file(lock)
            lock.release()
            raise
        lock.release()


def remove_lock_file(lock: Lock) -> None:
    """Remove a lock file and unlock it; in this order, so that nobody locks a file that is about to go."""
    try:
        with suppress(OSError):  # what stays is taken over by the next one
            lock.path.unlink()
    finally:
        lock.release()


def take(handle: int, mode: int, path: Path) -> bool:
    """Lock an open file; return False if others hold it and `mode` does not wait for them.

    Raises:
        PermissionError: it has to be open for writing to be locked, and is not.
        OSError: the file system has no locks.
    """
    try:
        fcntl.flock(handle, mode)
    except OSError as error:
        if error.errno in _HELD_BY_OTHERS:
            return False
        if error.errno == errno.EBADF:
            reason = "this user may not write it, and on NFS only a file that is open for writing can be locked"
            raise PermissionError(errno.EACCES, reason, str(path)) from None
        if error.errno in UNSUPPORTED:
            raise OSError(
                error.errno,
                f"cannot be locked, since its file system has no flock ({error.strerror}); mount Lustre with "
                "`-o flock` (not `localflock`), NFS without `nolock` and with its lock service running",
                str(path),
            ) from None
        raise
    return True


def _open(path: Path, mode: int) -> int:
    """Open a file to lock it: for writing where that is needed and allowed. A FIFO in its place does not block."""
    flags = os.O_NONBLOCK | os.O_CLOEXEC
    if mode != SHARED:
        try:
            return os.open(path, os.O_RDWR | flags)
        except OSError as error:
            if error.errno not in _NOT_WRITABLE:
                raise
    return os.open(path, os.O_RDONLY | flags)
