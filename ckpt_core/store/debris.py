"""What dies in an object store: steps that are pruned, what dead writers, readers and pruners left, damaged steps."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from ckpt_core.errors import DamagedError, NotACheckpointError
from ckpt_core.format.manifest import MANIFEST_NAME, Manifest, parse_manifest
from ckpt_core.store import objects, records
from ckpt_core.store.checkpoint import Checkpoint, is_newer, open_remote
from ckpt_core.store.deletions import attempt
from ckpt_core.store.names import DAMAGED, TRASH, step_name

if TYPE_CHECKING:
    from upath import UPath

_TRASHED = "manifests.json"
"""The object that lists the manifests of steps that are being deleted."""


def bury(run: UPath, checkpoints: Sequence[Checkpoint]) -> UPath:
    """Move the manifests of steps, which ends them, to the trash; return where that is. Needs `records.alone`."""
    trash = run / f"{TRASH}{uuid.uuid4().hex}"
    _write_trash(trash, [checkpoint.manifest for checkpoint in checkpoints])
    objects.delete_all(run, [f"{checkpoint.path.name}/{MANIFEST_NAME}" for checkpoint in checkpoints])
    return trash


def empty(trash: UPath) -> None:
    """Delete the files of steps whose manifests are gone; those that somebody still reads go the next time."""
    run, manifests = trash.parent, _read_trash(trash)
    leased: set[str] = records.leased_keys(run) if manifests else set()
    busy = [m for m in manifests if records.lease_key(step_name(m.step), m) in leased]
    gone = [m for m in manifests if m not in busy]
    objects.delete_all(run, [f"{step_name(m.step)}/{name}" for m in gone for name in _names(m)])
    _replace_trash(trash, manifests, busy)


def _names(manifest: Manifest) -> Iterator[str]:
    """Yield the files of a step, by their paths below it: nothing else lies there, which its commit made sure of."""
    for name in manifest.files:
        yield f"{manifest.directory}/{name}" if manifest.directory else name


def _write_trash(trash: UPath, manifests: Sequence[Manifest]) -> None:
    objects.write(trash / _TRASHED, json.dumps([json.loads(manifest.to_bytes()) for manifest in manifests]).encode())


def _read_trash(trash: UPath) -> list[Manifest]:
    """Return the manifests of the steps that a pruner is deleting; none if it is done.

    Raises:
        DamagedError: they cannot be read.
    """
    place = trash / _TRASHED
    try:
        data = objects.read(place)
    except FileNotFoundError:
        return []
    try:
        documents = json.loads(data)
        return [parse_manifest(json.dumps(document).encode(), place) for document in documents]
    except (ValueError, TypeError, RecursionError) as error:
        raise DamagedError(f"{place}: not a list of manifests ({error}); look at it, then delete it.") from None


def _replace_trash(trash: UPath, manifests: Sequence[Manifest], left: Sequence[Manifest]) -> None:
    if not left:
        objects.delete(trash / _TRASHED)
    elif len(left) < len(manifests):
        _write_trash(trash, left)


def delete_unless_committed(target: UPath, directory: str) -> None:
    """Delete the files below a directory of a step, unless its manifest names that directory.

    Raises:
        DamagedError: the manifest cannot be read, so it may name it; nothing was deleted.
    """
    manifest = records.manifest_of(target)
    if manifest is None or manifest.directory != directory:
        objects.delete_all(target / directory, objects.sizes_below(target / directory))


def _keep_committed(trash: UPath) -> None:
    """Forget a pruner's intention about the steps whose manifests it did not delete before it died.

    Raises:
        DamagedError: a manifest cannot be read; nothing was deleted.
    """
    manifests = _read_trash(trash)
    committed = [records.manifest_of(trash.parent / step_name(manifest.step)) for manifest in manifests]
    pairs = zip(manifests, committed, strict=True)
    left = [m for m, found in pairs if found is None or found.digest() != m.digest()]
    _replace_trash(trash, manifests, left)


def find(run: UPath) -> list[UPath]:
    """Return what `sweep` would delete, as far as that is known without deleting."""
    kept = [each for kind in (records.LEASES, records.LOCKS) for each in records.records_in(run / kind)]
    staged = [each for each in records.records_in(run / records.STAGING) if each.dead]
    written = [run / step / data for step, _, data in (each.key.partition(".") for each in staged)]
    trash = [run / name for name in objects.names_in(run) if name.startswith(TRASH)]
    return [*(each.place for each in kept if each.dead), *written, *trash]


def sweep(run: UPath) -> Iterator[tuple[UPath, str | None]]:
    """Delete what dead writers, readers and pruners left; yield each place, with what went wrong."""
    for kind in (records.LEASES, records.LOCKS):
        for record in records.records_in(run / kind):
            if record.dead:
                yield record.place, attempt(record.place, partial(objects.delete, record.place))
    yield from sweep_staging(run)
    for name in objects.names_in(run):
        if name.startswith(TRASH):
            trash = run / name
            with records.alone(run):
                revived = attempt(trash, partial(_keep_committed, trash))
            error = revived or attempt(trash, partial(empty, trash))
            if error or not objects.exists(trash / _TRASHED):
                yield trash, error


def sweep_staging(run: UPath) -> Iterator[tuple[UPath, str | None]]:
    """Delete what writers left whose time is over; yield each place, with what went wrong."""
    for record in records.records_in(run / records.STAGING):
        if record.dead:
            step, _, data = record.key.partition(".")
            error = attempt(record.place, partial(delete_unless_committed, run / step, data))
            if error is None:
                record.delete()
            yield run / step / data, error


def set_aside(path: UPath, *, dry_run: bool = False) -> str | None:
    """Move a step's files, if it is damaged, but for those that somebody writes; return a sentence about it."""
    names = objects.sizes_below(path)
    writers = _writers(path)  # after the files, before the manifest: who commits meanwhile is seen to have
    committed = _directory_of(path)  # before the check, so that it is not that of a commit after it
    try:
        open_remote(path)
    except (DamagedError, NotACheckpointError) as error:
        if is_newer(path):
            return f"{path}: left as it is. {error}"
        if MANIFEST_NAME in names and committed is None and writers:
            return f"{path}: damaged, but left as it is: a writer may be at work; repair again in a day. {error}"
        if committed in writers:  # it died after its commit; what is set aside is not debris
            record = writers.pop(committed)
            if not dry_run:
                record.delete()
        try:
            busy = set(writers) | _in_trash(path)
        except DamagedError as unreadable:
            return f"{path}: damaged, but left as it is: what a pruner has yet to delete is not known. {unreadable}"
        loose = [name for name in names if not {name, name.partition("/")[0]} & busy]
        if dry_run:
            said = f"{path}: would be set aside, so that the step can be saved again. It is damaged: {error}"
            return said if loose else None
        if loose:
            aside = path.parent / f"{DAMAGED}{path.name}-{uuid.uuid4().hex}"
            for name in sorted(loose, key=lambda name: name != MANIFEST_NAME):
                objects.move(path / name, aside / name)
            return f"{path}: set aside as {aside.name}, so that the step can be saved again. It was damaged: {error}"
    return None


def _writers(path: UPath) -> dict[str | None, records.Record]:
    """Return the notes of those who may still write a step, by the directory that they write."""
    notes = [(*record.key.partition("."), record) for record in records.records_in(path.parent / records.STAGING)]
    return {directory: record for step, _, directory, record in notes if step == path.name and not record.dead}


def _in_trash(path: UPath) -> set[str]:
    """Return the names below a step's directory that pruners have yet to delete.

    Raises:
        DamagedError: what one left cannot be read.
    """
    trash = [path.parent / name for name in objects.names_in(path.parent) if name.startswith(TRASH)]
    manifests = [manifest for each in trash for manifest in _read_trash(each) if step_name(manifest.step) == path.name]
    return {name for m in manifests for name in ([m.directory] if m.directory else m.files)}


def _directory_of(path: UPath) -> str | None:
    """Return the directory that a step's manifest names; None if there is no manifest that can be read."""
    try:
        manifest = records.manifest_of(path)
    except DamagedError:
        return None
    return manifest.directory if manifest else None
