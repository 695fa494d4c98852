"""A store in a directory: staged in a hidden one, committed by one rename.

    <store>/<run>/step_0000000500/   a checkpoint: it has its name only when it is whole and on the device
    <store>/<run>/pins/best          names a step that stays
    <store>/<run>/.staging-...       being written by the process that has locked `.staging-....lock`; else debris
    <store>/<run>/.trash-...         being deleted
    <store>/<run>/.damaged-...       set aside by `repair`

Readers hold a shared lock on a step's manifest; a pruner takes it alone, so that it never deletes what is read. Under
that lock it looks at the pins once more: who pins a step holds it as a reader does. Lock files exist only while they
are locked, and every user of the run's directory may lock them.
"""

from __future__ import annotations

import errno
import logging
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from ckpt_core import durable, locks
from ckpt_core.durable import rename_new
from ckpt_core.errors import ArgumentError, DamagedError, NotACheckpointError, StepExistsError
from ckpt_core.format.manifest import MANIFEST_NAME, Manifest, read_manifest
from ckpt_core.retention import Retention
from ckpt_core.store.checkpoint import Checkpoint, is_newer, open_local
from ckpt_core.store.deletions import Deletions, not_deleted
from ckpt_core.store.names import (
    DAMAGED,
    LOCK,
    PINS,
    STAGING,
    TRASH,
    check_name,
    check_step,
    is_debris,
    is_name,
    parse_step,
    step_name,
)
from ckpt_core.store.pins import no_pin, parse_pin, pin_bytes
from ckpt_core.store.protocol import Pruned, Staging
from ckpt_core.store.pruning import Plan, plan, take_away
from ckpt_core.urls import local_path

_REPAIRING = ".repairing"
"""The lock file of a run that is being repaired."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LocalStaging:
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


class LocalStore:
    """A store in a directory of a local or shared POSIX file system."""

    def __init__(self, root: str | Path) -> None:
        self.root = local_path(root, "root")
        self._locks: dict[Path, locks.Lock] = {}
        self._deletions = Deletions()

    @property
    def url(self) -> str:
        """Where the store is, as a URL."""
        return self.root.as_uri()

    def runs(self) -> list[str]:
        """Return the names of the runs that have a committed step, sorted; unreadable ones are left out and logged."""
        if not self.root.is_dir():
            return []
        return [path.name for path in sorted(self.root.iterdir()) if is_name(path.name) and _has_steps(path)]

    def list(self, run: str) -> list[Checkpoint]:
        """Return the committed steps of a run, oldest first; damaged and unreadable ones are left out and logged."""
        return list(reversed(list(_newest_first(_step_directories(self._directory(run))))))

    def latest(self, run: str) -> Checkpoint | None:
        """Return the newest committed step of a run that is all there, or None."""
        seen: list[Path] = []
        while (paths := _step_directories(self._directory(run))) != seen:
            newest = next(_newest_first(paths), None)
            if newest is not None:
                return newest
            seen = paths  # a pruner may have deleted them after a newer one was committed: look again
        return None

    def stage(self, run: str, step: int) -> LocalStaging:
        """Make a staging directory for a step, locked by this process; those of dead ones are removed.

        What pruners have yet to delete is left to them: it may be a terabyte.

        Raises:
            StepExistsError: the step is committed already.
        """
        directory = self._directory(run)
        target = directory / step_name(check_step(step))
        if directory.is_dir():
            list(_sweep_staging(directory))
        if target.exists():
            raise StepExistsError(
                f"{target}: step {step} of run {run!r} is committed, and a committed step never changes; save "
                "under another step or run."
            )
        durable.make_directory(directory)
        path = directory / f"{STAGING}{step_name(step)}-{uuid.uuid4().hex}"
        lock = locks.make_lock_file(_lock_of(path))
        assert lock is not None  # it waits
        try:
            path.mkdir()
        except OSError:
            locks.remove_lock_file(lock)
            raise
        self._locks[path] = lock
        return LocalStaging(path, target)

    def release(self, staging: Staging) -> None:
        """End what `stage` began; without a commit, nothing of it stays. Raises no OSError: the outcome stands."""
        assert isinstance(staging, LocalStaging)
        lock = self._locks.pop(staging.path)
        try:
            durable.remove_tree(staging.path)
        except OSError as error:
            _log.warning("%s: not removed (%s); the next save to the run removes it", staging.path, error)
        locks.remove_lock_file(lock)

    def prune(self, run: str, retention: Retention, *, background: bool = False, dry_run: bool = False) -> Pruned:
        """Delete the steps of a run that the policy does not keep and nobody reads, and debris.

        The newest step that is kept is read first. If its bytes are not those of its digests it stays, but does not
        count, and the next older one is read.

        Args:
            run: the run.
            retention: what stays, besides the newest sound step, pinned ones, and damaged and unreadable ones.
            background: rename the steps now, and delete their bytes on a thread; `wait` tells how that went.
            dry_run: delete nothing, and return what would be deleted if nobody reads it.

        Raises:
            ArgumentError: the steps cannot be ranked by the policy's metric, or the run is a symbolic link; nothing was
                deleted.
            DamagedError: a pin does not name a step; nothing was deleted.
        """
        directory = self._directory(run)
        if not directory.is_dir():
            return Pruned()
        planned = self._plan(directory, retention)
        if dry_run:
            return Pruned(tuple(checkpoint.step for checkpoint in planned.old), errors=planned.errors)
        swept = [error for _, error in _sweep(directory) if error]
        pruned = take_away(planned.old, self._bury, self._deletions, background=background)
        return replace(pruned, errors=(*swept, *planned.errors, *pruned.errors))

    def _plan(self, directory: Path, retention: Retention) -> Plan:
        _refuse_link(directory)
        steps = _step_directories(directory)
        present = [int(path.name[-10:]) for path in steps]
        # A link is left as it is: what it leads to is not this store's.
        whole = [checkpoint for checkpoint in _newest_first(steps) if not checkpoint.path.is_symlink()]
        return plan(present, whole, retention, self.pins(directory.name))

    def wait(self) -> tuple[str, ...]:
        """Wait for deletions in the background; return what went wrong with them since the last call, in sentences."""
        return self._deletions.wait()

    def pin(self, run: str, name: str, step: int) -> None:
        """Give a committed step a name, which keeps it; a pin of that name moves.

        Raises:
            NotACheckpointError: the step is not committed.
            DamagedError: it is damaged.
        """
        place = self._directory(run) / PINS / check_name("pin", name)
        checkpoint = open_local(self.root / run / step_name(check_step(step)))
        with checkpoint.lease():
            if not place.parent.is_dir():
                durable.make_directory(place.parent)
                durable.share(place.parent)
            with locks.lock_file(_lock_of(place.parent)):
                durable.replace(place, pin_bytes(step))
                durable.share(place)  # a pruner that cannot read a pin can delete nothing

    def unpin(self, run: str, name: str) -> None:
        """Take a pin away.

        Raises:
            ArgumentError: the run has no pin of that name.
        """
        place = self._directory(run) / PINS / check_name("pin", name)
        try:
            place.unlink()
        except FileNotFoundError:
            raise no_pin(run, name, self.pins(run)) from None
        durable.sync_directory(place.parent)

    def pins(self, run: str) -> dict[str, int]:
        """Return the steps of a run that have a name, by that.

        Raises:
            DamagedError: a pin does not name a step.
        """
        directory = self._directory(run) / PINS
        if not directory.is_dir():
            return {}
        found: dict[str, int] = {}
        for path in sorted(directory.iterdir()):
            if is_name(path.name):
                with suppress(FileNotFoundError):  # unpinned meanwhile
                    found[path.name] = parse_pin(path.read_bytes(), path)
        return found

    def repair(self, run: str, *, dry_run: bool = False) -> list[str]:
        """Remove debris, and set damaged steps aside as `.damaged-...`, whole, so that they can be saved again.

        Returns:
            What was done, in sentences; with `dry_run` what would be done, and nothing changes.
        """
        directory = self._directory(run)
        if not directory.is_dir():
            return []
        _refuse_link(directory)
        removed = "would be removed" if dry_run else "removed"
        done = [
            error or f"{path}: {removed}; a dead writer or pruner left it."
            for path, error in _sweep(directory, dry_run=dry_run)
        ]
        with locks.lock_file(directory / _REPAIRING, locks.EXCLUSIVE_NOW) as alone:
            if alone is None:
                return [*done, f"{directory}: being repaired by somebody else."]
            set_aside = partial(_set_aside, dry_run=dry_run)
            return [*done, *filter(None, map(set_aside, _step_directories(directory)))]

    def _directory(self, run: str) -> Path:
        return self.root / check_name("run", run)

    def _bury(self, checkpoint: Checkpoint) -> Callable[[], None] | None:
        path = self.root / checkpoint.path.parent.name / checkpoint.path.name
        with locks.locked(path / MANIFEST_NAME, locks.EXCLUSIVE_NOW) as held:
            if not held and path.exists():
                return None
            if not held or read_manifest(path).digest() != checkpoint.manifest.digest():
                raise NotACheckpointError(f"{path}: deleted by another pruner.")
            if checkpoint.step in self.pins(path.parent.name).values():
                return None
            _require_deletable(path)
            trash = path.with_name(f"{TRASH}{path.name}-{uuid.uuid4().hex}")
            path.rename(trash)
        return partial(_empty, trash)


def _lock_of(path: Path) -> Path:
    """Return the lock file of a directory."""
    return path.with_name(f"{path.name}{LOCK}" if path.name.startswith(".") else f".{path.name}{LOCK}")


def _refuse_link(run: Path) -> None:
    """Refuse to delete through a symbolic link, which may lead into another store.

    Raises:
        ArgumentError: the run's directory is one.
    """
    if run.is_symlink():
        raise ArgumentError(
            f"{run}: a symbolic link, to {run.resolve()}; nothing is deleted through a link. Name the store that the "
            "run itself lies in."
        )


def _sweep(directory: Path, *, dry_run: bool = False) -> Iterator[tuple[Path, str | None]]:
    """Delete what dead writers and dead pruners left; yield each path, with what went wrong.

    What this user has no permission to delete is another's; it is logged, and left to that one. With `dry_run` the
    paths are yielded, and nothing is deleted.
    """
    yield from _sweep_staging(directory, dry_run=dry_run)
    for path in directory.iterdir():
        if is_debris(path.name, TRASH):
            yield from _delete_debris(path, partial(_empty, path), dry_run=dry_run)
    yield from _sweep_pins(directory / PINS, dry_run=dry_run)


def _sweep_staging(directory: Path, *, dry_run: bool = False) -> Iterator[tuple[Path, str | None]]:
    """Delete what dead writers left; yield each path, with what went wrong."""
    found = {
        path.with_name(path.name.removesuffix(LOCK)) for path in directory.iterdir() if is_debris(path.name, STAGING)
    }
    for path in sorted(found):
        try:
            with locks.lock_file(_lock_of(path), locks.EXCLUSIVE_NOW) as held:
                if held and os.path.lexists(path):
                    yield from _delete_debris(path, partial(durable.remove_tree, path), dry_run=dry_run)
        except PermissionError as error:
            _log.warning("%s: left, another user writes or wrote it (%s)", path, error)


def _sweep_pins(pins: Path, *, dry_run: bool) -> Iterator[tuple[Path, str | None]]:
    """Delete pins that were half written; yield each path, with what went wrong."""
    try:
        if not pins.is_dir() or all(is_name(path.name) for path in pins.iterdir()):
            return
        with locks.lock_file(_lock_of(pins), locks.EXCLUSIVE_NOW) as held:
            for path in pins.iterdir() if held else ():
                if not is_name(path.name):
                    yield from _delete_debris(path, path.unlink, dry_run=dry_run)
    except PermissionError as error:
        _log.warning("%s: left, another user's (%s)", pins, error)


def _delete_debris(path: Path, delete: Callable[[], None], *, dry_run: bool) -> Iterator[tuple[Path, str | None]]:
    """Delete a path, unless that needs another user's permission; yield it, with what went wrong."""
    try:
        if not dry_run:
            delete()
    except PermissionError as error:
        _log.warning("%s: left, another user's (%s)", path, error)
    except OSError as error:
        yield path, not_deleted(path, error)
    else:
        yield path, None


def _require_deletable(step: Path) -> None:
    """Refuse to take a step's name away whose files this user may not delete: they would stay as debris.

    Raises:
        PermissionError: names the directory.
    """
    for directory in (step, *(path for path in durable.walk(step) if path.is_dir() and not path.is_symlink())):
        if not os.access(directory, os.R_OK | os.W_OK | os.X_OK, effective_ids=True):
            raise PermissionError(errno.EACCES, "this user may not delete what is in it", str(directory))


def _empty(trash: Path) -> None:
    """Delete a step that has lost its name, once that is durable: no power cut brings half of it back."""
    durable.sync_directory(trash.parent)
    durable.remove_tree(trash)


def _set_aside(path: Path, *, dry_run: bool) -> str | None:
    """Rename a step if it is damaged; return a sentence about it.

    The run is locked against others that repair, the step's manifest against those that prune or read.
    """
    try:
        found = path.lstat()
        with ExitStack() as stack:
            unread = stack.enter_context(locks.locked(path / MANIFEST_NAME, locks.EXCLUSIVE_NOW))
            try:
                open_local(path)
            except (DamagedError, NotACheckpointError) as error:
                read = unread is None and (path / MANIFEST_NAME).exists()
                return _rename_damaged(path, found, error, read=read, dry_run=dry_run)
    except FileNotFoundError:  # pruned
        return None
    except PermissionError as error:
        return f"{path}: left as it is; this user may not look into it ({error})."
    return None


def _rename_damaged(path: Path, found: os.stat_result, error: Exception, *, read: bool, dry_run: bool) -> str | None:
    """Set a damaged step aside; return a sentence about it."""
    if is_newer(path):
        return f"{path}: left as it is. {error}"
    if not os.path.samestat(found, path.lstat()):  # pruned before its manifest was locked, and saved again
        return None
    if read:
        return f"{path}: damaged, but left as it is: somebody reads it; repair again when that is over. {error}"
    if dry_run:
        return f"{path}: would be set aside, so that the step can be saved again. It is damaged: {error}"
    aside = path.with_name(f"{DAMAGED}{path.name}-{uuid.uuid4().hex}")
    path.rename(aside)
    durable.sync_directory(aside.parent)
    return f"{path}: set aside as {aside.name}, so that the step can be saved again. It was damaged: {error}"


def _has_steps(run: Path) -> bool:
    try:
        return bool(_step_directories(run))
    except PermissionError as error:
        _log.warning("skipped: %s", error)
        return False


def _step_directories(directory: Path) -> list[Path]:
    if not directory.is_dir():
        return []
    return sorted(p for p in directory.iterdir() if parse_step(p.name) is not None)


def _newest_first(steps: list[Path]) -> Iterator[Checkpoint]:
    for path in reversed(steps):
        try:
            yield open_local(path)
        except PermissionError as error:
            _log.warning("skipped: %s; its owner has to let this user read it", error)
        except (DamagedError, NotACheckpointError) as error:
            if path.exists():  # else a pruner was faster
                _log.warning("skipped: %s", error)
