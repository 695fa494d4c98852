"""A store in an object store, by any URL that fsspec knows: data first, then the manifest, which makes it a step.

    <store>/<run>/step_0000000500/manifest.json   written last, and only if there is none: the commit
    <store>/<run>/step_0000000500/<id>/model/...  its files; the manifest names the directory
    <store>/<run>/pins/best                       names a step that stays
    <store>/<run>/.trash-step_...-<digest>/       the manifest of a step whose files are being deleted
    <store>/<run>/.damaged-step_...-<id>/         set aside by `repair`
    <store>/<run>/.staging, .leases, .locks       see `records`

There is no rename and no lock. Every `<id>` is named by a manifest, by a note of who writes it, or by one in the trash,
from before its first byte to after its last: so debris is found without looking at all files. Credentials and endpoint
come from the environment.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ckpt_core.errors import ArgumentError, CommitError, DamagedError, NotACheckpointError, StepExistsError
from ckpt_core.format.manifest import MANIFEST_NAME, Manifest
from ckpt_core.retention import Retention
from ckpt_core.store import debris, objects, records
from ckpt_core.store.checkpoint import Checkpoint, open_remote
from ckpt_core.store.deletions import Deletions, attempt
from ckpt_core.store.names import PINS, check_name, check_step, is_name, parse_step, step_name
from ckpt_core.store.pins import no_pin, parse_pin, pin_bytes
from ckpt_core.store.protocol import Pruned, Staging
from ckpt_core.store.pruning import plan, take_away
from ckpt_core.urls import place_of

if TYPE_CHECKING:
    from upath import UPath

    from ckpt_core.urls import Place

_THREADS = 8
_log = logging.getLogger(__name__)


class RemoteStaging:
    """A step that is being written below `path`; `commit` writes the manifest that names it."""

    def __init__(self, target: UPath, record: records.Record, directory: str) -> None:
        self.target = target
        self.record = record
        self.path = target / directory
        self.committed: bool | None = False
        """Whether a commit happened; None if that is not known."""

    def commit(self, manifest: Manifest) -> Checkpoint:
        """Write the manifest, if there is none.

        Raises:
            StepExistsError: the step was committed meanwhile; nothing was changed.
            CommitError: it was not committed, or that is not known; the message says which.
        """
        if not self.record.live:
            raise CommitError(
                f"{self.target}: not committed; its writing began more than {records.STAGING_S // 3600} hours ago, and "
                "others may have taken it for debris. Save again."
            )
        manifest = replace(manifest, directory=self.path.name)
        data = manifest.to_bytes()
        self.committed = None  # whatever stops the request, the store may still have it
        try:
            objects.create(self.target / MANIFEST_NAME, data)
        except StepExistsError:
            self.committed = False
            raise
        self.committed = True
        return Checkpoint(self.target, manifest)


class RemoteStore:
    """A store at `s3://`, `gs://`, `memory://` or any other URL that fsspec knows."""

    def __init__(self, url: str | Place) -> None:
        place = place_of(url, "url")
        if isinstance(place, Path):
            raise ArgumentError(f"{url}: a local path; open it with `open_store`.")
        self.root = place
        self._deletions = Deletions()

    @property
    def url(self) -> str:
        """Where the store is, as a URL."""
        return self.root.as_uri()

    def runs(self) -> list[str]:
        """Return the names of the runs that have a committed step, sorted."""
        names = [name for name in objects.names_in(self.root) if is_name(name)]
        return [name for name in names if any(self._is_committed(path) for path in self._steps(name))]

    def list(self, run: str) -> list[Checkpoint]:
        """Return the committed steps of a run, oldest first; damaged ones are left out and logged."""
        with ThreadPoolExecutor(_THREADS) as pool:
            return [checkpoint for checkpoint in pool.map(_open_or_skip, self._steps(run)) if checkpoint is not None]

    def latest(self, run: str) -> Checkpoint | None:
        """Return the newest committed step of a run that is all there, or None."""
        seen: list[str] = []
        while (names := self._step_names(run)) != seen:
            for name in reversed(names):
                if (checkpoint := _open_or_skip(self._directory(run) / name)) is not None:
                    return checkpoint
            seen = names  # pruned after a newer one was committed: look again
        return None

    def stage(self, run: str, step: int) -> RemoteStaging:
        """Begin to write a step; debris of writers whose time is over is removed.

        Raises:
            StepExistsError: the step is committed already.
        """
        target = self._directory(run) / step_name(check_step(step))
        if self._is_committed(target):
            raise StepExistsError(
                f"{target}: step {step} of run {run!r} is committed, and a committed step never changes; save "
                "under another step or run."
            )
        list(debris.sweep_staging(self._directory(run)))
        directory = uuid.uuid4().hex
        record = records.write(self._directory(run) / records.STAGING, f"{target.name}.{directory}", records.STAGING_S)
        return RemoteStaging(target, record, directory)

    def release(self, staging: Staging) -> None:
        """End what `stage` began; without a commit, nothing of it stays. Raises no OSError: the outcome stands."""
        assert isinstance(staging, RemoteStaging)
        if staging.committed is None:  # the manifest may still come: the data waits for it until the record expires
            return
        delete = partial(debris.delete_unless_committed, staging.target, staging.path.name)
        if staging.committed or attempt(staging.path, delete) is None:
            staging.record.delete()

    def prune(self, run: str, retention: Retention, *, background: bool = False, dry_run: bool = False) -> Pruned:
        """Delete the steps of a run that the policy does not keep and nobody reads, and debris; see `Store.prune`.

        Args:
            run: the run.
            retention: what stays, besides the newest sound step, pinned ones and damaged ones.
            background: delete the manifests now, and the files on a thread; `wait` tells how that went.
            dry_run: delete nothing, and return what would be deleted if nobody reads it.
        """
        present = [int(path.name[-10:]) for path in self._steps(run)]
        planned = plan(present, self.list(run), retention, self.pins(run))
        if dry_run:
            return Pruned(tuple(checkpoint.step for checkpoint in planned.old), errors=planned.errors)
        swept = [error for _, error in debris.sweep(self._directory(run)) if error]
        pruned = take_away(planned.old, self._bury, self._deletions, background=background)
        return replace(pruned, errors=(*swept, *planned.errors, *pruned.errors))

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
        path = self._directory(run) / step_name(check_step(step))
        open_remote(path)
        with records.alone(self._directory(run)):
            if not self._is_committed(path):
                raise NotACheckpointError(f"{path}: deleted by a pruner before it could be pinned.")
            objects.write(place, pin_bytes(step))

    def unpin(self, run: str, name: str) -> None:
        """Take a pin away.

        Raises:
            ArgumentError: the run has no pin of that name.
        """
        check_name("pin", name)
        pins = self.pins(run)
        if name not in pins:
            raise no_pin(run, name, pins)
        objects.delete(self._directory(run) / PINS / name)

    def pins(self, run: str) -> dict[str, int]:
        """Return the steps of a run that have a name, by that.

        Raises:
            DamagedError: a pin does not name a step.
        """
        directory = self._directory(run) / PINS
        found: dict[str, int] = {}
        for name in filter(is_name, objects.names_in(directory)):
            try:
                found[name] = parse_pin(objects.read(directory / name), directory / name)
            except FileNotFoundError:  # unpinned meanwhile
                continue
        return found

    def repair(self, run: str) -> list[str]:
        """Remove debris, and set damaged steps aside as `.damaged-...`, whole, so that they can be saved again.

        Returns:
            What was done, in sentences.
        """
        done = [
            error or f"{place}: removed; a dead writer or pruner left it."
            for place, error in debris.sweep(self._directory(run))
        ]
        paths = self._steps(run)
        if paths:
            with records.alone(self._directory(run)):
                done += filter(None, map(debris.set_aside, paths))
        return done

    def _directory(self, run: str) -> UPath:
        return self.root / check_name("run", run)

    def _steps(self, run: str) -> list[UPath]:
        return [self._directory(run) / name for name in self._step_names(run)]

    def _step_names(self, run: str) -> list[str]:
        return [name for name in objects.names_in(self._directory(run)) if parse_step(name) is not None]

    def _is_committed(self, path: UPath) -> bool:
        return objects.exists(path / MANIFEST_NAME)

    def _bury(self, checkpoint: Checkpoint) -> Callable[[], None] | None:
        path = self.root / checkpoint.path.parent.name / checkpoint.path.name
        with records.alone(path.parent):  # so no pin comes between the look at them and the end of the manifest
            manifest = records.manifest_of(path)
            if manifest is None or manifest.digest() != checkpoint.manifest.digest():
                raise NotACheckpointError(f"{path}: deleted by another pruner.")
            in_use = records.is_leased(path.parent, path.name, manifest)
            if in_use or checkpoint.step in self.pins(path.parent.name).values():
                return None
            return partial(debris.empty, debris.bury(path, manifest))


def _open_or_skip(path: UPath) -> Checkpoint | None:
    try:
        return open_remote(path)
    except NotACheckpointError:  # being written, or deleted
        return None
    except DamagedError as error:
        _log.warning("skipped: %s", error)
        return None
