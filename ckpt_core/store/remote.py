"""A store in an object store, by any URL that fsspec knows: data first, then the manifest, which makes it a step.

    <store>/<run>/step_0000000500/manifest.json   written last, and only if there is none: the commit
    <store>/<run>/step_0000000500/<id>/model/...  its files; the manifest names the directory
    <store>/<run>/pins/best                       names a step that stays
    <store>/<run>/.trash-<id>/manifests.json      the manifests of steps whose files are being deleted
    <store>/<run>/.damaged-step_...-<id>/         set aside by `repair`
    <store>/<run>/.staging, .leases, .locks       see `records`
    <store>/<run>/.manifests.json                 see `manifest_cache`

There is no rename and no lock. Every `<id>` is named by a manifest, by a note of who writes it, or by one in the trash,
from before its first byte to after its last: so debris is found without looking at all files. Credentials and endpoint
come from the environment.

Where the store ignores the condition that nothing exists, a commit looks first and writes then, under a note that keeps
others away; see `records.alone`.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckpt_core.errors import (
    ArgumentError,
    CheckpointError,
    CommitError,
    DamagedError,
    NotACheckpointError,
    StepExistsError,
)
from ckpt_core.format.manifest import MANIFEST_NAME, Manifest
from ckpt_core.retention import Retention
from ckpt_core.store import debris, manifest_cache, objects, records
from ckpt_core.store.checkpoint import Checkpoint, check_sizes, open_remote, read_remote_manifest
from ckpt_core.store.deletions import Deletions, attempt, not_deleted
from ckpt_core.store.manifest_cache import ManifestCache
from ckpt_core.store.names import PINS, check_name, check_step, is_name, parse_step, step_name
from ckpt_core.store.pins import no_pin, parse_pin, pin_bytes
from ckpt_core.store.protocol import Pruned, Staging
from ckpt_core.store.pruning import plan
from ckpt_core.urls import place_of

if TYPE_CHECKING:
    from upath import UPath

    from ckpt_core.urls import Place

Entry = dict[str, Any]

_THREADS = 16
_BATCH = 100
"""How many steps are deleted together: their manifests are in one object meanwhile."""

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
        place = self.target / MANIFEST_NAME
        with ExitStack() as stack:
            create = objects.create
            if not objects.is_conditional(self.target.parent):
                stack.enter_context(records.alone(self.target.parent))
                create = objects.create_alone
            self.committed = None  # whatever stops the request, the store may still have it
            try:
                create(place, data)
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
        self._caches: dict[str, ManifestCache] = {}

    @property
    def url(self) -> str:
        """Where the store is, as a URL."""
        return self.root.as_uri()

    def runs(self) -> list[str]:
        """Return the names of the runs that have a committed step, sorted."""
        names = [name for name in objects.names_in(self.root) if is_name(name)]
        return [name for name in names if any(self._is_committed(path) for path in self._steps(name))]

    def list(self, run: str) -> list[Checkpoint]:
        """Return the committed steps of a run, oldest first; damaged and unreadable ones are left out and logged.

        One listing tells the sizes of all files; only manifests that are not known are read, see `manifest_cache`.
        """
        entries = objects.entries_below(self._directory(run))
        steps = {name: below for name, below in _by_step(entries).items() if MANIFEST_NAME in below}
        tags = {name: tag for name, below in steps.items() if (tag := _tag(below[MANIFEST_NAME]))}
        cache = self._caches.setdefault(run, ManifestCache(self._directory(run)))
        cached = entries.get(manifest_cache.NAME)
        cache.load(tags, None if cached is None else int(cached["size"]))
        read: list[str] = []

        def open_step(name: str) -> Checkpoint | None:
            path, tag = self._directory(run) / name, tags.get(name, "")
            try:
                manifest = cache.find(name, tag)
                if manifest is None:
                    read.append(name)
                    manifest = read_remote_manifest(path, int(steps[name][MANIFEST_NAME]["size"]))
                    if tag:
                        cache.add(name, tag, manifest)
                return _check_listed(Checkpoint(path, manifest), steps[name])
            except (CheckpointError, OSError):
                return _open_or_skip(path)  # it may have been committed or pruned during the listing: look again

        with ThreadPoolExecutor(_THREADS) as pool:
            opened = list(pool.map(open_step, sorted(steps)))
        cache.save(tags, len(read))
        return [checkpoint for checkpoint in opened if checkpoint is not None]

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
        objects.is_conditional(self._directory(run))  # found out now, and not when all data is written
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
        present = [int(name[-10:]) for name in self._step_names(run)]
        planned = plan(present, self.list(run), retention, self.pins(run))
        if dry_run:
            return Pruned(tuple(checkpoint.step for checkpoint in planned.old), errors=planned.errors)
        swept = [error for _, error in debris.sweep(self._directory(run)) if error]
        pruned = self._delete(run, planned.old, background=background)
        return replace(pruned, errors=(*swept, *planned.errors, *pruned.errors))

    def _delete(self, run: str, old: Sequence[Checkpoint], *, background: bool) -> Pruned:
        """Delete steps, many with a request; what goes wrong with some does not stop the rest."""
        deleted: list[int] = []
        leased: list[int] = []
        errors: list[str] = []
        for batch in (old[i : i + _BATCH] for i in range(0, len(old), _BATCH)):
            try:
                trash, buried, busy = self._bury(run, batch)
            except (OSError, CheckpointError) as error:
                errors.append(not_deleted(self._directory(run), error))
                continue
            leased += busy
            deleted += buried
            if trash is None:
                continue
            free = partial(debris.empty, trash)
            if background:
                self._deletions.begin(trash, free)
            elif error := attempt(trash, free):
                errors.append(error)
        return Pruned(tuple(deleted), tuple(leased), tuple(errors))

    def _bury(self, run: str, old: Sequence[Checkpoint]) -> tuple[UPath | None, list[int], list[int]]:
        """Move manifests to the trash, but for those of steps that others read, pinned or deleted meanwhile.

        Returns:
            Where the trash is, which steps are in it, and which ones somebody reads or pinned.
        """
        directory = self._directory(run)
        with records.alone(directory):  # so no pin comes between the look at them and the end of the manifests
            now = {checkpoint.step: checkpoint.manifest.digest() for checkpoint in self.list(run)}
            same = [checkpoint for checkpoint in old if now.get(checkpoint.step) == checkpoint.manifest.digest()]
            leases, pinned = records.leased_keys(directory), set(self.pins(run).values())
            free = [
                checkpoint
                for checkpoint in same
                if checkpoint.step not in pinned
                and records.lease_key(checkpoint.path.name, checkpoint.manifest) not in leases
            ]
            busy = [checkpoint.step for checkpoint in same if checkpoint not in free]
            if busy:
                _log.warning("%s: steps %s are being read, or were pinned just now, so not deleted", directory, busy)
            if not free:
                return None, [], busy
            return debris.bury(directory, free), [checkpoint.step for checkpoint in free], busy

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

    def repair(self, run: str, *, dry_run: bool = False) -> list[str]:
        """Remove debris, and set damaged steps aside as `.damaged-...`, whole, so that they can be saved again.

        Returns:
            What was done, in sentences; with `dry_run` what would be done, and nothing changes.
        """
        if dry_run:
            found = [
                f"{p}: would be removed; a dead writer or pruner left it." for p in debris.find(self._directory(run))
            ]
            return [*found, *filter(None, (debris.set_aside(path, dry_run=True) for path in self._steps(run)))]
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


def _by_step(entries: Mapping[str, Entry]) -> dict[str, dict[str, Entry]]:
    """Return what the store tells of the objects of each step, by their paths below it."""
    steps: dict[str, dict[str, Entry]] = {}
    for path, entry in entries.items():
        name, _, below = path.partition("/")
        if parse_step(name) is not None and below:
            steps.setdefault(name, {})[below] = entry
    return steps


def _tag(entry: Entry) -> str | None:
    """Return what the store tells of an object that changes with its bytes."""
    return next((str(entry[key]) for key in ("ETag", "etag", "generation") if entry.get(key)), None)


def _check_listed(checkpoint: Checkpoint, entries: Mapping[str, Entry]) -> Checkpoint:
    """Compare a step with the listed sizes of its objects.

    Raises:
        DamagedError: they differ.
    """
    below = f"{checkpoint.manifest.directory}/" if checkpoint.manifest.directory else ""
    sizes = {name.removeprefix(below): int(e["size"]) for name, e in entries.items() if name.startswith(below)}
    check_sizes(checkpoint, sizes)
    return checkpoint


def _open_or_skip(path: UPath) -> Checkpoint | None:
    try:
        return open_remote(path)
    except NotACheckpointError:  # being written, or deleted
        return None
    except PermissionError as error:
        _log.warning("skipped: %s: %s; its owner has to let this user read it", path, error)
        return None
    except DamagedError as error:
        _log.warning("skipped: %s", error)
        return None
