"""Where checkpoints live: staged in a hidden directory, committed by one rename, listed, leased and pruned.

    <store>/<run>/step_0000000500/   a checkpoint: it has its name only when it is whole and on the device
    <store>/<run>/.staging-...       being written by the process that holds its lock; else debris
    <store>/<run>/.trash-...         being deleted

Readers hold a shared lock on a step's manifest; a pruner takes it alone, so that it never deletes what is read.
"""

from __future__ import annotations

import logging
import os
import re
import uuid
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from ckpt_core import durable, locks
from ckpt_core.durable import rename_new
from ckpt_core.errors import ArgumentError, DamagedError, NotACheckpointError, StepExistsError
from ckpt_core.format.manifest import MANIFEST_NAME, Manifest, read_manifest
from ckpt_core.urls import local_path

__all__ = [
    "Checkpoint", "LocalStore", "Staging", "Store", "local_path", "open_checkpoint", "open_store", "parse_step",
    "rename_new", "step_name",
]  # fmt: skip

MAX_STEP = 10**10 - 1
_STEP_NAME = re.compile(r"step_([0-9]{10})")
_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_STAGING, _TRASH = ".staging-", ".trash-"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """One committed step."""

    path: Path
    manifest: Manifest = field(repr=False)

    @property
    def run(self) -> str:
        """The run that it belongs to."""
        return self.manifest.run

    @property
    def step(self) -> int:
        """Its step."""
        return self.manifest.step

    @property
    def url(self) -> str:
        """Where it lies, as a URL that `open_checkpoint` takes."""
        return self.path.as_uri()

    def component(self, name: str) -> Path | None:
        """Return the directory of `model`, `optimizer`, `trainer` or `assets`; None if it has none."""
        path = self.path / name
        return path if path.is_dir() else None

    @contextmanager
    def lease(self) -> Generator[None]:
        """Hold the checkpoint while reading it: a pruner leaves it alone meanwhile."""
        with locks.locked(self.path / MANIFEST_NAME, locks.SHARED) as held:
            if not held:
                raise NotACheckpointError(f"{self.path}: deleted by a pruner before it could be read.")
            yield


@dataclass(frozen=True)
class Staging:
    """A step that is being written below `path`; `commit` gives it its name."""

    path: Path
    target: Path

    def commit(self, manifest: Manifest) -> Checkpoint:
        """Write the manifest last, flush everything, and rename.

        Raises:
            StepExistsError: the step was committed meanwhile; nothing was changed.
            CommitError: the step has its name, but may not survive a power cut.
        """
        durable.write_new(self.path / MANIFEST_NAME, manifest.to_bytes())
        durable.sync_tree(self.path)
        rename_new(self.path, self.target)
        return Checkpoint(self.target, manifest)


class Store(Protocol):
    """What a store does; a directory does it here, an object store may."""

    @property
    def url(self) -> str:
        """Where the store is."""
        ...

    def runs(self) -> list[str]:
        """Return the names of the runs, sorted."""
        ...

    def list(self, run: str) -> list[Checkpoint]:
        """Return the committed steps of a run, oldest first; damaged ones are left out and logged."""
        ...

    def latest(self, run: str) -> Checkpoint | None:
        """Return the newest committed step of a run, or None."""
        ...

    def stage(self, run: str, step: int) -> Staging:
        """Make a staging directory for a step, locked by this process.

        Raises:
            StepExistsError: the step is committed already.
        """
        ...

    def release(self, staging: Staging) -> None:
        """End what `stage` began; without a commit, nothing of it stays."""
        ...

    def prune(self, run: str, *, keep_last: int) -> list[int]:
        """Delete all but the newest `keep_last` steps that nobody reads; return the deleted ones."""
        ...


class LocalStore:
    """A store in a directory of a local or shared POSIX file system."""

    def __init__(self, root: str | Path) -> None:
        self.root = local_path(root)
        self._locks: dict[Path, int] = {}

    @property
    def url(self) -> str:
        """Where the store is, as a URL."""
        return self.root.as_uri()

    def runs(self) -> list[str]:
        """Return the names of the runs that have a committed step, sorted."""
        if not self.root.is_dir():
            return []
        names = sorted(p.name for p in self.root.iterdir() if _RUN_NAME.fullmatch(p.name))
        return [name for name in names if _step_directories(self.root / name)]

    def list(self, run: str) -> list[Checkpoint]:
        """Return the committed steps of a run, oldest first; damaged ones are left out and logged."""
        return list(reversed(list(_newest_first(_step_directories(self._run_directory(run))))))

    def latest(self, run: str) -> Checkpoint | None:
        """Return the newest committed step of a run that is all there, or None."""
        seen: list[Path] = []
        while (paths := _step_directories(self._run_directory(run))) != seen:
            newest = next(_newest_first(paths), None)
            if newest is not None:
                return newest
            seen = paths  # a pruner may have deleted them after a newer one was committed: look again
        return None

    def stage(self, run: str, step: int) -> Staging:
        """Make a staging directory for a step, locked by this process; debris of dead ones is removed.

        Raises:
            StepExistsError: the step is committed already.
        """
        if not 0 <= step <= MAX_STEP:
            raise ArgumentError(f"step {step}: expected 0 to {MAX_STEP}.")
        directory = self._run_directory(run)
        target = directory / step_name(step)
        if target.exists():
            raise StepExistsError(
                f"{target}: step {step} of run {run!r} is committed, and a committed step never changes; save "
                "under another step or run."
            )
        durable.make_directory(directory)
        self._sweep(directory)
        path = directory / f"{_STAGING}{step_name(step)}-{uuid.uuid4().hex}"
        self._locks[path] = locks.make_locked(path)
        return Staging(path, target)

    def release(self, staging: Staging) -> None:
        """End what `stage` began; without a commit, nothing of it stays. Raises no OSError: the outcome stands."""
        lock = self._locks.pop(staging.path)
        try:
            durable.remove_tree(staging.path)
        except OSError as error:
            _log.warning("%s: not removed (%s); the next save to the run removes it", staging.path, error)
        with suppress(OSError):  # it is closed all the same
            os.close(lock)

    def prune(self, run: str, *, keep_last: int) -> list[int]:
        """Delete all but the newest `keep_last` steps; one that is being read stays until the next time.

        Returns:
            The steps that were deleted, oldest first.
        """
        if keep_last < 1:
            raise ArgumentError(f"keep_last={keep_last}: the newest checkpoint always stays, so at least 1.")
        directory = self._run_directory(run)
        if not directory.is_dir():
            return []
        self._sweep(directory)
        return [c.step for c in self.list(run)[:-keep_last] if self._delete(c)]

    def _run_directory(self, run: str) -> Path:
        if not _RUN_NAME.fullmatch(run):
            raise ArgumentError(f"run {run!r}: expected 1 to 64 letters, digits, '.', '_' or '-', no '.' first.")
        return self.root / run

    def _sweep(self, directory: Path) -> None:
        """Delete what dead writers and dead pruners left."""
        for path in directory.iterdir():
            if path.name.startswith(_TRASH):
                durable.remove_tree(path)
            elif path.name.startswith(_STAGING):
                with locks.locked(path, locks.EXCLUSIVE_NOW) as held:
                    if held:
                        durable.remove_tree(path)

    def _delete(self, checkpoint: Checkpoint) -> bool:
        with locks.locked(checkpoint.path / MANIFEST_NAME, locks.EXCLUSIVE_NOW) as held:
            if not held:
                _log.warning("%s: being read, so not deleted", checkpoint.path)
                return False
            trash = checkpoint.path.with_name(f"{_TRASH}{checkpoint.path.name}-{uuid.uuid4().hex}")
            checkpoint.path.rename(trash)
            durable.sync_directory(trash.parent)
        durable.remove_tree(trash)
        return True


def open_store(url: str | Path) -> Store:
    """Return the store at `url`: a path or a `file://` URL."""
    return LocalStore(url)


def open_checkpoint(url: str | Path) -> Checkpoint:
    """Return the committed step at `url`: a path or a `file://` URL. Checks the manifest and every file's size.

    Raises:
        NotACheckpointError: there is no committed step.
        DamagedError: its manifest is damaged, or a file is missing or has another size.
    """
    path = local_path(url)
    if path.name.startswith((_STAGING, _TRASH)):
        raise NotACheckpointError(f"{path}: never committed, or deleted; see `ckpt list` of the store.")
    try:
        manifest = read_manifest(path)
    except (FileNotFoundError, NotADirectoryError):
        raise NotACheckpointError(
            f"{path}: no {MANIFEST_NAME}, so no committed step; see `ckpt list` of the store."
        ) from None
    if parse_step(path.name) not in {None, manifest.step}:
        raise DamagedError(f"{path}: its manifest is that of step {manifest.step}; give the directory its name back.")
    for name, record in manifest.files.items():
        file = path / name
        found = durable.file_size(file)
        if found != record.bytes:
            raise DamagedError(
                f"{file}: {'missing' if found is None else f'{found} bytes'}, the manifest says {record.bytes} "
                "bytes; restore a copy or delete the step."
            )
    return Checkpoint(path, manifest)


def step_name(step: int) -> str:
    """Return the directory name of a step; `parse_step` is its inverse."""
    return f"step_{step:010d}"


def parse_step(name: str) -> int | None:
    """Return the step that a directory name stands for, or None if it is not a step's."""
    match = _STEP_NAME.fullmatch(name)
    return int(match[1]) if match else None


def _step_directories(directory: Path) -> list[Path]:
    if not directory.is_dir():
        return []
    return sorted(p for p in directory.iterdir() if parse_step(p.name) is not None)


def _newest_first(steps: list[Path]) -> Iterator[Checkpoint]:
    for path in reversed(steps):
        try:
            yield open_checkpoint(path)
        except (DamagedError, NotACheckpointError) as error:
            if path.exists():  # else a pruner was faster
                _log.warning("skipped: %s", error)
