"""File operations that survive a power cut: written, flushed to the device, and only then named."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from ckpt_core.errors import ArgumentError, CommitError, StepExistsError


def write_new(path: Path, data: bytes) -> None:
    """Write a file that must not exist yet, and flush it to the device."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
    with os.fdopen(handle, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace(path: Path, data: bytes) -> None:
    """Give `path` new content: a reader sees the old one or the new one, whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with suppress(FileNotFoundError):
        temporary.unlink()
    write_new(temporary, data)
    temporary.replace(path)
    sync_directory(path.parent)


def sync_file(path: Path) -> None:
    """Flush a file's bytes to the device."""
    _sync(path, os.O_RDONLY | os.O_NOFOLLOW)


def sync_directory(path: Path) -> None:
    """Flush a directory's entries to the device."""
    _sync(path, os.O_RDONLY | os.O_DIRECTORY)


def sync_tree(root: Path) -> None:
    """Flush every directory below `root`, and `root`; the files in them are flushed by who wrote them."""
    for directory in [*(p for p in walk(root) if p.is_dir()), root]:
        sync_directory(directory)


def file_size(path: Path) -> int | None:
    """Return the size in bytes of a regular file, or of what a link leads to; None if there is none."""
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def walk(root: Path) -> Iterator[Path]:
    """Yield everything below `root`, each directory after its content; an unreadable one is an error."""
    for entry in sorted(root.iterdir()):
        if entry.is_dir() and not entry.is_symlink():
            yield from walk(entry)
        yield entry


def files_below(root: Path) -> Iterator[tuple[str, Path]]:
    """Yield each file below `root` with its path relative to it, in order."""
    for path in walk(root):
        if not path.is_dir():
            yield path.relative_to(root).as_posix(), path


def copy_tree(source: Path, target: Path) -> None:
    """Copy the files below `source` to `target`, each flushed to the device; links to files are followed.

    Raises:
        ArgumentError: something there is no file.
    """
    for name, path in files_below(source):
        if not path.is_file():
            raise ArgumentError(f"{path}: neither a file nor a link to one; take it out of the directory.")
        copy = target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        write_new(copy, path.read_bytes())


def remove_tree(path: Path) -> None:
    """Delete a directory and all that is in it; others may delete the same at the same time."""
    while os.path.lexists(path):
        with suppress(FileNotFoundError):
            shutil.rmtree(path)


def make_directory(path: Path) -> None:
    """Make a directory with its parents, so that they survive a power cut; one that exists is fine."""
    if path.is_dir():
        return
    make_directory(path.parent)
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


def _sync(path: Path, flags: int) -> None:
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
