"""Where checkpoints live: staged in a hidden directory, committed by one rename, listed, leased and pruned.

    <store>/<run>/step_0000000500/   a checkpoint: it has its name only when it is whole and on the device
    <store>/<run>/.staging-...       being written by the process that holds its lock; else debris
    <store>/<run>/.trash-...         being deleted

Readers hold a shared lock on a step's manifest; a pruner takes it alone, so that it never deletes what is read.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import uuid
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from ckpt_core import durable
from ckpt_core.errors import ArgumentError, CommitError, DamagedError, NotACheckpointError, StepExistsError
from ckpt_core.format.manifest import MANIFEST_NAME, Manifest, read_manifest

MAX_STEP = 10**10 - 1
_STEP_NAME = re.compile(r"step_([0-9]{10})")
_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
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
        with _locked(self.path / MANIFEST_NAME, fcntl.LOCK_SH) as held:
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
        return [p.name for p in sorted(self.root.iterdir()) if p.is_dir() and _step_directories(p)]

    def list(self, run: str) -> list[Checkpoint]:
        """Return the committed steps of a run, oldest first; damaged ones are left out and logged."""
        return list(reversed(list(self._newest_first(run))))

    def latest(self, run: str) -> Checkpoint | None:
        """Return the newest committed step of a run that is all there, or None."""
        return next(self._newest_first(run), None)

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
        directory.mkdir(parents=True, exist_ok=True)
        durable.sync_directory(directory.parent)
        self._sweep(directory)
        path = directory / f".staging-{step_name(step)}-{uuid.uuid4().hex}"
        self._locks[path] = _make_locked(path)
        return Staging(path, target)

    def release(self, staging: Staging) -> None:
        """End what `stage` began; without a commit, nothing of it stays."""
        durable.remove_tree(staging.path)
        os.close(self._locks.pop(staging.path))

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

    def _newest_first(self, run: str) -> Iterator[Checkpoint]:
        for path in reversed(_step_directories(self._run_directory(run))):
            try:
                yield open_checkpoint(path)
            except (DamagedError, NotACheckpointError) as error:
                _log.warning("skipped: %s", error)

    def _run_directory(self, run: str) -> Path:
        if not _RUN_NAME.fullmatch(run):
            raise ArgumentError(f"run {run!r}: expected 1 to 64 letters, digits, '.', '_' or '-', no '.' first.")
        return self.root / run

    def _sweep(self, directory: Path) -> None:
        """Delete what dead writers and dead pruners left."""
        for path in directory.iterdir():
            if path.name.startswith(".trash-"):
                durable.remove_tree(path)
            elif path.name.startswith(".staging-"):
                with _locked(path, fcntl.LOCK_EX | fcntl.LOCK_NB) as held:
                    if held:
                        durable.remove_tree(path)

    def _delete(self, checkpoint: Checkpoint) -> bool:
        with _locked(checkpoint.path / MANIFEST_NAME, fcntl.LOCK_EX | fcntl.LOCK_NB) as held:
            if not held:
                _log.warning("%s: being read, so not deleted", checkpoint.path)
                return False
            trash = checkpoint.path.with_name(f".trash-{checkpoint.path.name}-{uuid.uuid4().hex}")
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
    if not (path / MANIFEST_NAME).is_file():
        raise NotACheckpointError(f"{path}: no {MANIFEST_NAME}, so no committed step; see `ckpt list` of the store.")
    manifest = read_manifest(path)
    for name, record in manifest.files.items():
        file = path / name
        found = file.stat().st_size if file.is_file() else None
        if found != record.bytes:
            raise DamagedError(
                f"{file}: {'missing' if found is None else f'{found} bytes'}, the manifest says {record.bytes} "
                "bytes; restore a copy or delete the step."
            )
    return Checkpoint(path, manifest)


def local_path(url: str | Path) -> Path:
    """Return the absolute path that `url` names: a path or a `file://` URL.

    Raises:
        ArgumentError: a URL of another scheme.
    """
    parts = urlsplit(str(url))
    if "://" not in str(url):
        return Path(url).absolute()
    if parts.scheme == "file" and parts.netloc in {"", "localhost"}:
        return Path(unquote(parts.path))
    raise ArgumentError(f"{url}: expected a local path or a file:// URL; other stores are not supported yet.")


def step_name(step: int) -> str:
    """Return the directory name of a step; `parse_step` is its inverse."""
    return f"step_{step:010d}"


def parse_step(name: str) -> int | None:
    """Return the step that a directory name stands for, or None if it is not a step's."""
    match = _STEP_NAME.fullmatch(name)
    return int(match[1]) if match else None


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
        durable.sync_directory(target.parent)
    except OSError as error:
        raise CommitError(
            f"{target}: written and named, but flushing its directory failed ({error}); it may not survive a power "
            "cut. Check the disk, then save the next step."
        ) from error


def _step_directories(directory: Path) -> list[Path]:
    if not directory.is_dir():
        return []
    return sorted(p for p in directory.iterdir() if parse_step(p.name) is not None)


def _make_locked(path: Path) -> int:
    """Make a directory and lock it; a sweeper that comes between the two deletes it, and it is made again."""
    while True:
        path.mkdir()
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(handle, fcntl.LOCK_EX)
        if _still_there(handle, path):
            return handle
        os.close(handle)


@contextmanager
def _locked(path: Path, mode: int) -> Generator[bool]:
    """Try to lock `path` and tell whether that worked: False if it is held by others, gone or moved away."""
    try:
        handle = os.open(path, os.O_RDONLY)
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
