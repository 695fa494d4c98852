"""A file to read ranges of, by several threads at once: on a local file system, or by requests for bytes elsewhere."""

from __future__ import annotations

import errno
import os
from collections import OrderedDict
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Protocol

from ckpt_core.durable import explained, file_size, file_system
from ckpt_core.errors import DamagedError, with_remedy
from ckpt_core.format.digests import CACHED_BYTES

if TYPE_CHECKING:
    from upath import UPath

    from ckpt_core.urls import Place

_COPY_BYTES = 256 << 20
_NO_KERNEL_COPY = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.ETXTBSY}
_WINDOW = 32 << 10
_WINDOWS = 64


class Source(Protocol):
    """An open file. Use it in a `with` statement, or close it."""

    gap_bytes: int
    """Reading so many bytes that nobody asked for costs less than reading once more."""

    block_bytes: int
    """How much to read at a time."""

    def read_at(self, offset: int, buffer: memoryview) -> int:
        """Read bytes from `offset` on into `buffer`; return how many, 0 at the end of the file."""
        ...

    def close(self) -> None:
        """End reading."""
        ...

    def __enter__(self) -> Source: ...

    def __exit__(self, *_: object) -> None: ...


def open_source(place: Place) -> Source:
    """Open a file for reading.

    Raises:
        DamagedError: it is not there, or not a regular file.
    """
    size = file_size(place)
    if size is None:
        raise DamagedError(f"{place}: missing, or not a regular file; restore a copy of the checkpoint.")
    return LocalSource(place) if isinstance(place, Path) else RemoteSource(place, size)


def read_into(source: Source, offset: int, buffer: memoryview, where: str) -> None:
    """Fill `buffer` from `offset` of an open file; large reads come in parts.

    Raises:
        DamagedError: the file ends before the buffer is full.
    """
    done = 0
    while done < len(buffer):
        try:
            count = source.read_at(offset + done, buffer[done:])
        except OSError as error:
            raise with_remedy(error, where) from error.__cause__
        if count == 0:
            raise DamagedError(
                f"{where}: ends before byte {offset + len(buffer)}, where the metadata says that data lies; the file "
                "is cut short: restore a copy of it."
            )
        done += count


class _Closing:
    def __enter__(self) -> Source:
        return self  # pyright: ignore[reportReturnType] - both of its classes are sources

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End reading."""


class LocalSource(_Closing):
    """A file that the system reads."""

    gap_bytes = 0
    block_bytes = CACHED_BYTES

    def __init__(self, path: Path) -> None:
        self._path = path
        with explained(path):
            self._handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read_at(self, offset: int, buffer: memoryview) -> int:
        """Read bytes from `offset` on into `buffer`; return how many."""
        with explained(self._path):
            return os.preadv(self._handle, [buffer], offset)

    def copy_to(self, offset: int, count: int, target: int, place: int) -> None:
        """Have the kernel copy bytes to the open file `target`, which may come to share them with this one.

        Raises:
            DamagedError: the file ends before that.
        """
        while count:
            try:
                copied = _copy(self._handle, target, min(count, _COPY_BYTES), offset, place)
            except OSError as error:
                if error.errno != errno.EIO:  # which of both files it is about is not told: that one is mostly read
                    raise
                raise with_remedy(error, self._path) from None
            if copied == 0:
                raise DamagedError(
                    f"{self._path}: ends before byte {offset + count}; it is cut short: restore a copy of it."
                )
            offset, place, count = offset + copied, place + copied, count - copied

    def close(self) -> None:
        """End reading."""
        handle, self._handle = self._handle, -1
        if handle >= 0:
            os.close(handle)


def _copy(source: int, target: int, count: int, offset: int, place: int) -> int:
    """Copy bytes between files, through the kernel where it can do that; return how many."""
    try:
        return os.copy_file_range(source, target, count, offset, place)
    except OSError as error:
        if error.errno not in _NO_KERNEL_COPY:
            raise
    data = os.pread(source, min(count, _WINDOW << 5), offset)
    return os.pwrite(target, data, place) if data else 0


class RemoteSource(_Closing):
    """A file of which each read is a request. Headers lie close together, so small reads share a window of bytes."""

    gap_bytes = 256 << 10
    block_bytes = 8 << 20

    def __init__(self, place: UPath, size: int) -> None:
        self._fs, self._path, self._size = file_system(place), place.path, size
        self._windows: OrderedDict[int, bytes] = OrderedDict()
        self._lock = Lock()

    def read_at(self, offset: int, buffer: memoryview) -> int:
        """Read bytes from `offset` on into `buffer`; return how many."""
        start, end = offset, min(offset + len(buffer), self._size)
        if start >= end:
            return 0
        if end - start >= _WINDOW:
            data = self._fetch(start, end)
        else:
            base = start // _WINDOW * _WINDOW
            data = self._window(base)[start - base : end - base]
        buffer[: len(data)] = data
        return len(data)

    def _window(self, base: int) -> bytes:
        with self._lock:
            if base in self._windows:
                self._windows.move_to_end(base)
                return self._windows[base]
        data = self._fetch(base, min(base + _WINDOW, self._size))
        with self._lock:
            self._windows[base] = data
            if len(self._windows) > _WINDOWS:
                self._windows.popitem(last=False)
        return data

    def _fetch(self, start: int, end: int) -> bytes:
        return self._fs.cat_file(self._path, start=start, end=end)
