"""File operations that survive a power cut: written, flushed to the device, and only then named."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path


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
    """Copy the regular files below `source` to `target`, each flushed to the device; links are followed."""
    for name, path in files_below(source):
        copy = target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        write_new(copy, path.read_bytes())


def remove_tree(path: Path) -> None:
    """Delete a directory and all that is in it; one that is gone already is fine."""
    with suppress(FileNotFoundError):
        shutil.rmtree(path)


def _sync(path: Path, flags: int) -> None:
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
