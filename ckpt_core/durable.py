"""File operations that survive a power cut: written, flushed to the device, and only then named.

Elsewhere than on a local file system, a file that was written whole is durable, and there are no directories to flush.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import stat
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, overload

import xxhash

from ckpt_core.errors import CommitError, StepExistsError, with_remedy

if TYPE_CHECKING:
    from upath import UPath

    from ckpt_core.urls import Place

_PART_BYTES = 16 << 20
"""What is sent to an object store in one request."""

GONE = {errno.ENOENT, errno.ENOTDIR, errno.ESTALE}
"""How a file system says that nothing has a name; NFS says the last where another client deleted what had it."""

NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
"""How a file system says that it has no links, or not that many."""

_HERE, _NO_REPLACE, _EXCHANGE = -100, 1, 2  # AT_FDCWD, RENAME_NOREPLACE and RENAME_EXCHANGE of Linux
_NO_EXCHANGE = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM}
"""How a file system says that it cannot exchange two names: NFS and Lustre, for example."""


def file_system(place: UPath) -> Any:
    """Return fsspec's file system of a place; it has no annotations."""
    return place.fs


class Sink(Protocol):
    """A new file that is being written."""

    def write(self, data: memoryview) -> None:
        """Append all of `data`."""
        ...

    def seal(self) -> None:
        """Make the file whole and durable."""
        ...

    def close(self) -> None:
        """End writing; what was not sealed may be cut short, or not there."""
        ...


@contextmanager
def explained(path: Path) -> Generator[None]:
    """Name the path in an error of the system, and what can be done about it; the class of the error stays.

    Raises:
        OSError: in place of the error of the system.
    """
    try:
        yield
    except OSError as error:
        raise with_remedy(error, path) from error.__cause__


def create(place: Place) -> Sink:
    """Begin a file that must not exist yet."""
    return LocalSink(place) if isinstance(place, Path) else RemoteSink(place)


class LocalSink:
    """A new file on a local file system; a link in its place is not followed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with explained(path):
            self.handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)

    def write(self, data: memoryview) -> None:
        """Append all of `data`."""
        with explained(self._path):
            while data:
                data = data[os.write(self.handle, data) :]

    def skip(self, nbytes: int) -> None:
        """Go on after bytes that the kernel put at the end of what was written."""
        os.lseek(self.handle, nbytes, os.SEEK_CUR)

    def seal(self) -> None:
        """Flush to the device, and close."""
        with explained(self._path):
            os.fsync(self.handle)
        self.close()

    def close(self) -> None:
        """Close."""
        handle, self.handle = self.handle, -1
        if handle >= 0:
            os.close(handle)


class RemoteSink:
    """A new object, sent in parts; it is there when it is sealed.

    Args:
        place: of the object.
        replace: whether one of that name may be there, which then stays until this one is sealed.
    """

    def __init__(self, place: UPath, *, replace: bool = False) -> None:
        mode = "wb" if replace else "xb"
        self._place = place
        self._digest, self._size = xxhash.xxh3_128(), 0
        self._file: Any = file_system(place).open(place.path, mode, block_size=_PART_BYTES)

    def write(self, data: memoryview) -> None:
        """Append all of `data`."""
        self._digest.update(data)
        self._size += len(data)
        self._file.write(data)

    def seal(self) -> None:
        """Send the rest."""
        try:
            self._file.close()
        except Exception:
            # The answer to an earlier attempt may have been lost: then this one was refused, since the object is there.
            if not _holds(self._place, self._size, self._digest.digest()):
                raise
            self.close()
        self._file = None

    def close(self) -> None:
        """Forget what was not sealed."""
        file, self._file = self._file, None
        if file is not None and hasattr(file, "discard"):
            with suppress(Exception):  # what it leaves is no file of anything; plugins raise errors of their own
                file.discard()
            with suppress(AttributeError):  # of a file that has no such state
                file.closed = True  # else it sends the rest when Python lets go of it


def _holds(place: UPath, size: int, digest: bytes) -> bool:
    """Whether an object has just these bytes; not if that cannot be found out."""
    files, found, offset = file_system(place), xxhash.xxh3_128(), 0
    try:
        files.invalidate_cache()
        if files.info(place.path)["size"] != size:
            return False
        while offset < size:
            block: bytes = files.cat_file(place.path, start=offset, end=min(offset + _PART_BYTES, size))
            found.update(block)
            offset += len(block) or size
    except Exception:  # noqa: BLE001 - plugins raise errors of their own; the first error is what counts
        return False
    return found.digest() == digest


def write_new(place: Place, data: bytes) -> None:
    """Write a file that must not exist yet, and flush it to the device."""
    if not isinstance(place, Path):
        try:
            file_system(place).pipe_file(place.path, data, mode="create")
        except Exception:
            if not _holds(place, len(data), xxhash.xxh3_128_digest(data)):  # as in `RemoteSink.seal`
                raise
        return
    sink = create(place)
    try:
        sink.write(memoryview(data))
        sink.seal()
    finally:
        sink.close()


def replace(path: Path, data: bytes) -> None:
    """Give `path` new content: a reader sees the old one or the new one, whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with suppress(FileNotFoundError):
        temporary.unlink()
    write_new(temporary, data)
    temporary.replace(path)
    sync_directory(path.parent)


def sync_file(place: Place) -> None:
    """Flush a file's bytes to the device."""
    if isinstance(place, Path):
        _sync(place, os.O_RDONLY | os.O_NOFOLLOW)


def sync_directory(path: Path) -> None:
    """Flush a directory's entries to the device."""
    _sync(path, os.O_RDONLY | os.O_DIRECTORY)


def sync_tree(root: Place) -> None:
    """Flush every directory below `root`, and `root`; the files in them are flushed by who wrote them."""
    if not isinstance(root, Path):
        return
    for directory in [*(p for p in walk(root) if p.is_dir()), root]:
        sync_directory(directory)


def file_size(place: Place) -> int | None:
    """Return the size in bytes of a regular file, or of what a link leads to; None if there is none."""
    try:
        status = place.stat()
    except OSError as error:
        if error.errno in GONE or isinstance(error, FileNotFoundError):  # plugins of fsspec set no errno
            return None
        raise
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def walk(root: Path) -> Iterator[Path]:
    """Yield everything below `root`, each directory after its content; an unreadable one is an error."""
    for entry in sorted(root.iterdir()):
        if entry.is_dir() and not entry.is_symlink():
            yield from walk(entry)
        yield entry


@overload
def files_below(root: Path) -> Iterator[tuple[str, Path]]: ...
@overload
def files_below(root: Place) -> Iterator[tuple[str, Place]]: ...
def files_below(root: Place) -> Iterator[tuple[str, Place]]:
    """Yield each file below `root` with its path relative to it, in order; a link to a directory is yielded as one."""
    if not isinstance(root, Path):
        base, files = root.path.rstrip("/"), file_system(root)
        files.invalidate_cache()
        for path in files.find(base):
            name = path.removeprefix(base).lstrip("/")
            yield name, root / name
        return
    for path in walk(root):
        if not path.is_dir() or path.is_symlink():
            yield path.relative_to(root).as_posix(), path


def files_through_links(root: Path, above: frozenset[Path] = frozenset()) -> Iterator[tuple[str, Path]]:
    """Yield each file below `root` as `files_below` does, and those below directories that links lead to.

    A link to a directory that it lies in is yielded as it is, and so is one that leads nowhere.
    """
    above |= {root.resolve()}
    for name, path in files_below(root):
        if not path.is_dir() or any(parent.is_relative_to(path.resolve()) for parent in above):
            yield name, path
        else:
            yield from ((f"{name}/{below}", each) for below, each in files_through_links(path, above))


def make_parents(place: Place) -> None:
    """Make the directories above a file, where there are directories."""
    if isinstance(place, Path):
        place.parent.mkdir(parents=True, exist_ok=True)


def remove_tree(path: Path) -> None:
    """Delete a directory and all that is in it; others may delete the same at the same time."""
    while os.path.lexists(path):
        with suppress(FileNotFoundError):
            shutil.rmtree(path)


def share(path: Path) -> None:
    """Let those who may read or write in a directory do so with a file or directory in it, whatever the umask."""
    mode = path.stat().st_mode
    own, others = (0o7700, 0o077) if stat.S_ISDIR(mode) else (0o7700, 0o066)
    with suppress(PermissionError):  # another user's
        path.chmod(mode & own | path.parent.stat().st_mode & others)


def make_directory(path: Path) -> None:
    """Make a directory with its parents, so that they survive a power cut; one that exists is fine."""
    if path.is_dir():
        return
    make_directory(path.parent)
    with explained(path):
        path.mkdir(exist_ok=True)
    sync_directory(path.parent)


def rename_new(source: Path, target: Path) -> None:
    """Give the directory `source` the name `target`, which nothing may have (an empty directory may), durably.

    Raises:
        StepExistsError: `target` is taken; nothing was changed.
        CommitError: renamed, but it may not survive a power cut.
    """
    try:
        source.rename(target)
    except OSError as error:
        if error.errno in {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}:
            raise StepExistsError(f"{target}: exists and is never overwritten; save under another name.") from None
        raise
    try:
        sync_directory(target.parent)
    except OSError as error:
        raise CommitError(
            f"{target}: written and named, but flushing its directory failed ({error}); it may not survive a power "
            "cut. Check the disk, then save the next step."
        ) from error


def exchange(first: Path, second: Path) -> bool:
    """Exchange what two names stand for, in one step and durably; False where the file system cannot do that.

    Raises:
        FileNotFoundError: one of the two does not exist.
    """
    try:
        _renameat2(first, second, _EXCHANGE)
    except OSError as error:
        if error.errno in _NO_EXCHANGE:
            return False
        raise
    sync_directory(second.parent)
    sync_directory(first.parent)
    return True


def link_new(source: Path, target: Path) -> bool:
    """Link a file durably to a name that none may have; False where the file system has no links, or not that many.

    Raises:
        FileExistsError: the name is taken.
    """
    make_directory(target.parent)
    try:
        os.link(source, target)
    except OSError as problem:
        if problem.errno in NO_LINKS:
            return False
        raise
    sync_directory(target.parent)
    return True


def create_whole(target: Path, data: bytes, apart: Path) -> None:
    """Write a file that is whole from the first moment, and that must not exist yet; it is written as `apart` first.

    Linking fails where there is one; so does the renaming, where there are no links.

    Raises:
        FileExistsError: there is one; nothing was changed.
    """
    write_new(apart, data)
    try:
        if not link_new(apart, target):
            _renameat2(apart, target, _NO_REPLACE)
            sync_directory(target.parent)
    finally:
        apart.unlink(missing_ok=True)


def _renameat2(source: Path, target: Path, flags: int) -> None:
    """Rename in one call of Linux that Python does not offer.

    Raises:
        OSError: it failed, with ENOSYS where the C library does not have it.
    """
    library = ctypes.CDLL(None, use_errno=True)
    if not hasattr(library, "renameat2"):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), str(target))
    if library.renameat2(_HERE, os.fsencode(source), _HERE, os.fsencode(target), flags):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(target))


def _sync(path: Path, flags: int) -> None:
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
