"""A store in a directory: staged in a hidden one, committed by one rename.

    <store>/<run>/step_0000000500/   a checkpoint: it has its name only when it is whole and on the device
    <store>/<run>/pins/best          names a step that stays
    <store>/<run>/.staging-...       being written by the process that holds its lock; else debris
    <store>/<run>/.trash-...         being deleted
    <store>/<run>/.damaged-...       set aside by `repair`

Readers hold a shared lock on a step's manifest; a pruner takes it alone, so that it never deletes what is read. Under
that lock it looks at the pins once more: who pins a step holds it as a reader does.
"""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from ckpt_core import durable, locks
from ckpt_core.durable import rename_new
from ckpt_core.errors import DamagedError, NotACheckpointError, StepExistsError
from ckpt_core.format.manifest import MANIFEST_NAME, Manifest, read_manifest
from ckpt_core.retention import Retention
from ckpt_core.store.checkpoint import Checkpoint, is_newer, open_local
from ckpt_core.store.deletions import Deletions, attempt
from ckpt_core.store.names import DAMAGED, PINS, STAGING, TRASH, check_name, check_step, is_name, parse_step, step_name
from ckpt_core.store.pins import no_pin, parse_pin, pin_bytes
from ckpt_core.store.protocol import Pruned, Staging
from ckpt_core.store.pruning import given_up, take_away
from ckpt_core.urls import local_path

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
        self._locks: dict[Path, int] = {}
        self._deletions = Deletions()

    @property
    def url(self) -> str:
        """Where the store is, as a URL."""
        return self.root.as_uri()

    def runs(self) -> list[str]:
        """Return the names of the runs that have a committed step, sorted."""
        if not self.root.is_dir():
            return []
        names = sorted(path.name for path in self.root.iterdir() if is_name(path.name))
        return [name for name in names if _step_directories(self.root / name)]

    def list(self, run: str) -> list[Checkpoint]:
        """Return the committed steps of a run, oldest first; damaged ones are left out and logged."""
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
        """Make a staging directory for a step, locked by this process; debris of dead ones is removed.

        Raises:
            StepExistsError: the step is committed already.
        """
        directory = self._directory(run)
        target = directory / step_name(check_step(step))
        if target.exists():
            raise StepExistsError(
                f"{target}: step {step} of run {run!r} is committed, and a committed step never changes; save "
                "under another step or run."
            )
        durable.make_directory(directory)
        list(self._sweep(directory))
        path = directory / f"{STAGING}{step_name(step)}-{uuid.uuid4().hex}"
        self._locks[path] = locks.make_locked(path)
        return LocalStaging(path, target)

    def release(self, staging: Staging) -> None:
        """End what `stage` began; without a commit, nothing of it stays. Raises no OSError: the outcome stands."""
        assert isinstance(staging, LocalStaging)
        lock = self._locks.pop(staging.path)
        try:
            durable.remove_tree(staging.path)
        except OSError as error:
            _log.warning("%s: not removed (%s); the next save to the run removes it", staging.path, error)
        with suppress(OSError):  # it is closed all the same
            os.close(lock)

    def prune(self, run: str, retention: Retention, *, background: bool = False) -> Pruned:
        """Delete the steps of a run that the policy does not keep and nobody reads, and debris.

        Args:
            run: the run.
            retention: what stays, besides the newest whole step, pinned ones and damaged ones.
            background: rename the steps now, and delete their bytes on a thread; `wait` tells how that went.
        """
        directory = self._directory(run)
        if not directory.is_dir():
            return Pruned()
        swept = [error for _, error in self._sweep(directory) if error]
        present = [int(path.name[-10:]) for path in _step_directories(directory)]
        old = given_up(present, self.list(run), retention, self.pins(run))
        pruned = take_away(old, self._bury, self._deletions, background=background)
        return replace(pruned, errors=(*swept, *pruned.errors))

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
            durable.make_directory(place.parent)
            with locks.locked(place.parent, locks.EXCLUSIVE):
                durable.replace(place, pin_bytes(step))

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

    def repair(self, run: str) -> list[str]:
        """Remove debris, and set damaged steps aside as `.damaged-...`, whole, so that they can be saved again.

        Returns:
            What was done, in sentences.
        """
        directory = self._directory(run)
        if not directory.is_dir():
            return []
        done = [error or f"{path}: removed; a dead writer or pruner left it." for path, error in self._sweep(directory)]
        return [*done, *filter(None, map(_set_aside, _step_directories(directory)))]

    def _directory(self, run: str) -> Path:
        return self.root / check_name("run", run)

    def _sweep(self, directory: Path) -> Iterator[tuple[Path, str | None]]:
        """Delete what dead writers and dead pruners left; yield each path, with what went wrong."""
        for path in directory.iterdir():
            if path.name.startswith(TRASH):
                yield path, attempt(path, partial(_empty, path))
            elif path.name.startswith(STAGING):
                with locks.locked(path, locks.EXCLUSIVE_NOW) as held:
                    if held:
                        yield path, attempt(path, partial(durable.remove_tree, path))
        pins = directory / PINS
        with locks.locked(pins, locks.EXCLUSIVE_NOW) as held:
            for path in pins.iterdir() if held else ():
                if not is_name(path.name):  # half of a pin that was being written
                    yield path, attempt(path, path.unlink)

    def _bury(self, checkpoint: Checkpoint) -> Callable[[], None] | None:
        path = self.root / checkpoint.path.parent.name / checkpoint.path.name
        with locks.locked(path / MANIFEST_NAME, locks.EXCLUSIVE_NOW) as held:
            if not held and path.exists():
                return None
            if not held or read_manifest(path).digest() != checkpoint.manifest.digest():
                raise NotACheckpointError(f"{path}: deleted by another pruner.")
            if checkpoint.step in self.pins(path.parent.name).values():
                return None
            trash = path.with_name(f"{TRASH}{path.name}-{uuid.uuid4().hex}")
            path.rename(trash)
        return partial(_empty, trash)


def _empty(trash: Path) -> None:
    """Delete a step that has lost its name, once that is durable: no power cut brings half of it back."""
    durable.sync_directory(trash.parent)
    durable.remove_tree(trash)


def _set_aside(path: Path) -> str | None:
    """Rename a step if it is damaged; return a sentence about it.

    Its directory is locked against others that repair, its manifest against those that prune or read.
    """
    manifest = path / MANIFEST_NAME
    with locks.locked(path, locks.EXCLUSIVE_NOW) as held, locks.locked(manifest, locks.EXCLUSIVE_NOW) as unread:
        if not held:
            return None
        try:
            open_local(path)
        except (DamagedError, NotACheckpointError) as error:
            if is_newer(path):
                return f"{path}: left as it is. {error}"
            if not held.in_place:  # pruned before its manifest was locked, and maybe saved again
                return None
            if not unread and manifest.exists():
                return f"{path}: damaged, but left as it is: somebody reads it; repair again when that is over. {error}"
            aside = path.with_name(f"{DAMAGED}{path.name}-{uuid.uuid4().hex}")
            path.rename(aside)
            durable.sync_directory(aside.parent)
            return f"{path}: set aside as {aside.name}, so that the step can be saved again. It was damaged: {error}"
    return None


def _step_directories(directory: Path) -> list[Path]:
    if not directory.is_dir():
        return []
    return sorted(p for p in directory.iterdir() if parse_step(p.name) is not None)


def _newest_first(steps: list[Path]) -> Iterator[Checkpoint]:
    for path in reversed(steps):
        try:
            yield open_local(path)
        except (DamagedError, NotACheckpointError) as error:
            if path.exists():  # else a pruner was faster
                _log.warning("skipped: %s", error)
