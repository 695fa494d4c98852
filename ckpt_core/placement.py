"""Several directories that appear together: each whole or not at all, the last one last.

Each is written under a hidden name beside its target and then renamed. A record beside the last target, locked while
the save runs, names what was made; with it the next save to that target deletes what a killed one left.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from ckpt_core import durable, locks, ranks
from ckpt_core.errors import ArgumentError, CommitError, StepExistsError
from ckpt_core.store import rename_new

Identity = list[int]


@dataclass(frozen=True)
class Part:
    """One directory: `write` fills a new one, on every rank; a shared one may have files already."""

    target: Path
    write: Callable[[Path], object]
    shared: bool = False


def place(parts: Sequence[Part]) -> None:
    """Collective: write all parts, then give them their names in their order.

    After an error, as after a kill and the next save, none but shared ones has its name, unless the last one has.

    Raises:
        FileExistsError: a target holds something; nothing was written.
        ArgumentError: two parts have one target.
        CommitError: another process is saving to the last target.
    """
    held: list[_Save] = []

    def finish() -> None:
        held[0].finish()

    try:
        staged = ranks.first(lambda: _begin(parts, held))
        for part, directory in zip(parts, staged, strict=True):
            part.write(directory)
        ranks.first(finish)
    finally:
        for save in held:
            save.end()


def _begin(parts: Sequence[Part], held: list[_Save]) -> list[Path]:
    """On rank 0: clear what a kill left, refuse what is there, and return the directory to write each part to."""
    save = _Save(parts)
    held.append(save)
    save.delete_leftovers()
    for part in parts:
        if not part.shared and _occupied(part.target):
            raise StepExistsError(f"{part.target}: exists, and a checkpoint is never overwritten; give a new path.")
    return save.stage()


class _Save:
    """One save on rank 0. Its roots are the parts that do not lie inside another one."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = parts
        self._roots = [part for part in parts if _root(part, parts) is part]
        self._last = _root(parts[-1], parts).target
        self._record = self._last.with_name(f".saving-{self._last.name}")
        durable.make_directory(self._record.parent)
        self._lock = _lock(self._record)
        self._staged: dict[Path, Path] = {}

    def delete_leftovers(self) -> None:
        """Delete what the record names, but for targets whose last one has its name too: that save was complete."""
        complete = _occupied(self._last)
        for path, identity in _entries(self._lock.handle):
            if identity is None or (not complete and identity == _identity(path)):
                _delete(path)

    def stage(self) -> list[Path]:
        """Make a directory beside each root's target; return where to write each part."""
        for root in self._roots:
            durable.make_directory(root.target.parent)
            staged = root.target.with_name(f".staging-{root.target.name}-{uuid.uuid4().hex}")
            self._note(staged, None)
            staged.mkdir()
            self._staged[root.target] = staged
        return [self._directory(part) for part in self._parts]

    def finish(self) -> None:
        """Give each root its name; a shared one whose name is taken puts its files there."""
        for root in self._roots:
            if not root.shared:
                self._note(root.target, _identity(self._staged[root.target]))
        for root in self._roots:
            if root.shared and root.target.exists():
                _merge(self._staged[root.target], root.target)
                continue
            rename_new(self._staged[root.target], root.target)

    def end(self) -> None:
        """Delete what did not get its name, then the record."""
        try:
            self.delete_leftovers()
            self._record.unlink(missing_ok=True)
        finally:
            self._lock.release()

    def _directory(self, part: Part) -> Path:
        root = _root(part, self._parts)
        return self._staged[root.target] / part.target.relative_to(root.target)

    def _note(self, path: Path, identity: Identity | None) -> None:
        os.write(self._lock.handle, json.dumps([str(path), identity]).encode() + b"\n")
        os.fsync(self._lock.handle)


def _root(part: Part, parts: Sequence[Part]) -> Part:
    """Return the outermost part whose target holds that of `part`; itself if none does."""
    outer = [p for p in parts if p is not part and not p.shared and part.target.is_relative_to(p.target)]
    if not part.shared and any(p.target == part.target for p in outer):
        raise ArgumentError(f"{part.target}: given for two things; give each a directory of its own.")
    return min([*outer, part], key=lambda p: len(p.target.parts))


def _lock(record: Path) -> locks.Lock:
    """Lock the record, new or a killed save's, to write at its end.

    Raises:
        CommitError: another process has it locked.
    """
    lock = locks.make_lock_file(record, locks.EXCLUSIVE_NOW)
    if lock is None:
        raise CommitError(f"{record}: another process is saving here; wait for its end.")
    os.lseek(lock.handle, 0, os.SEEK_END)
    return lock


def _entries(handle: int) -> Iterator[tuple[Path, Identity | None]]:
    """Yield the paths in a record, each with its inode, or none for one that nothing else can have."""
    for line in os.pread(handle, os.fstat(handle).st_size, 0).decode(errors="replace").splitlines():
        try:
            path, identity = cast("tuple[str, Identity | None]", json.loads(line))
        except ValueError:  # cut short by a power cut
            continue
        yield Path(path), identity


def _identity(path: Path) -> Identity | None:
    """Return what a directory keeps through a rename."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return None
    return [found.st_dev, found.st_ino]


def _occupied(path: Path) -> bool:
    if path.is_dir() and not path.is_symlink():
        return next(path.iterdir(), None) is not None
    return os.path.lexists(path)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        durable.remove_tree(path)
    else:
        path.unlink(missing_ok=True)


def _merge(source: Path, target: Path) -> None:
    """Put files into a directory that has files already, each whole."""
    for name, file in durable.files_below(source):
        place = target / name
        durable.make_directory(place.parent)
        file.replace(place)
    durable.sync_tree(target)
