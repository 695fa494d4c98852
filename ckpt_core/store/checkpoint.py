"""`Checkpoint`: one committed step, wherever it lies."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ckpt_core import durable, locks
from ckpt_core.errors import DamagedError, NotACheckpointError
from ckpt_core.format.digests import algorithm_of
from ckpt_core.format.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    MAX_BYTES,
    FileRecord,
    Manifest,
    parse_manifest,
    read_manifest,
    record_file,
)
from ckpt_core.printable import printable_logger
from ckpt_core.store import objects, records
from ckpt_core.store.names import DAMAGED, STAGING, TRASH, parse_step

if TYPE_CHECKING:
    from upath import UPath

    from ckpt_core.urls import Place

_READERS = 4
"""How many files are digested at once: a core digests faster than most disks and networks deliver."""

_log = printable_logger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """One committed step."""

    path: Place
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

    @property
    def root(self) -> Place:
        """The directory that the manifest's files lie below."""
        return self.path / self.manifest.directory if self.manifest.directory else self.path

    def component(self, name: str) -> Place | None:
        """Return the directory of `model`, `optimizer`, `trainer` or `assets`; None if it has none."""
        path = self.root / name
        return path if any(file.startswith(f"{name}/") for file in self.manifest.files) else None

    @contextmanager
    def lease(self) -> Generator[None]:
        """Hold the checkpoint while reading it: a pruner leaves it alone meanwhile; in an object store, for a day.

        Raises:
            NotACheckpointError: a pruner deleted it before; what was saved there since is another checkpoint.
            DamagedError: its manifest cannot be read any more.
        """
        if not isinstance(self.path, Path):
            with records.leased(self.path, self.manifest):
                yield
            return
        with ExitStack() as stack:
            try:
                held = stack.enter_context(locks.locked(self.path / MANIFEST_NAME, locks.SHARED))
            except OSError as error:
                if error.errno not in locks.UNSUPPORTED or os.access(self.path.parent, os.W_OK, effective_ids=True):
                    raise
                _log.warning("%s: read without a lease, since the file system has no locks", self.path)
                held = self.path  # read-only for this user; where nothing can be locked, nothing is pruned
            if not held or read_manifest(self.path).digest() != self.manifest.digest():
                raise NotACheckpointError(f"{self.path}: deleted by a pruner before it could be read.")
            yield


def open_local(path: Path) -> Checkpoint:
    """Return the committed step in a directory; see `open_checkpoint`."""
    checkpoint = _read(path, lambda: read_manifest(path))
    root = path / checkpoint.manifest.directory
    sizes = {name: durable.file_size(root / name) for name in checkpoint.manifest.files}
    _check_whole(checkpoint, sizes, (path / MANIFEST_NAME).exists)
    return checkpoint


def open_remote(path: UPath) -> Checkpoint:
    """Return the committed step at a URL; see `open_checkpoint`. One listing tells the sizes of all files."""
    checkpoint = _read(path, lambda: read_remote_manifest(path))
    sizes = objects.sizes_below(path / checkpoint.manifest.directory)
    _check_whole(checkpoint, sizes, lambda: objects.exists(path / MANIFEST_NAME))
    return checkpoint


def check_digests(checkpoint: Checkpoint) -> None:
    """Read every file of a step and compare it with its digest, under a lease.

    Raises:
        NotACheckpointError: a pruner deleted the step.
        DamagedError: a file has other bytes.
    """

    def check(name: str, record: FileRecord) -> None:
        found = record_file(checkpoint.root / name, algorithm_of(record.digest))
        if found != record:
            raise DamagedError(
                f"{checkpoint.root}/{name}: has {found.digest}, the manifest says {record.digest}; restore a copy of "
                "it, or move the step elsewhere."
            )

    with checkpoint.lease(), ThreadPoolExecutor(_READERS) as pool:
        checks = [pool.submit(check, name, record) for name, record in checkpoint.manifest.files.items()]
        try:
            for each in checks:
                each.result()
        finally:
            for each in checks:
                each.cancel()


def is_newer(path: Place) -> bool:
    """Whether a step that this library cannot read was committed by a later version of it, which can."""
    place = path / MANIFEST_NAME
    try:
        size = durable.file_size(place) if isinstance(place, Path) else objects.size(place)
        if size is None or size > MAX_BYTES:
            return False
        data = place.read_bytes() if isinstance(place, Path) else objects.read(place)
        version = json.loads(data)["format_version"]
    except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
        return False
    return isinstance(version, int) and version > FORMAT_VERSION


def _read(path: Place, read: Callable[[], Manifest]) -> Checkpoint:
    if path.name.startswith((STAGING, TRASH, DAMAGED)):
        raise NotACheckpointError(f"{path}: never committed, deleted, or set aside; see `ckpt list` of the store.")
    try:
        return Checkpoint(path, read())
    except OSError as error:
        if not isinstance(error, FileNotFoundError) and error.errno not in {*durable.GONE, errno.ENAMETOOLONG}:
            raise
        raise NotACheckpointError(
            f"{path}: no {MANIFEST_NAME}, so no committed step; see `ckpt list` of the store."
        ) from None


def read_remote_manifest(path: UPath, size: int | None = None) -> Manifest:
    """Read the manifest of a step.

    Args:
        path: the step's.
        size: the manifest's size in bytes, if it is known.

    Raises:
        DamagedError: it is none, or too large for one.
    """
    place = path / MANIFEST_NAME
    nbytes = objects.size(place) if size is None else size
    if nbytes > MAX_BYTES:
        raise DamagedError(f"{place}: larger than {MAX_BYTES} bytes; restore a copy or delete the step.")
    return parse_manifest(objects.read(place, nbytes), place)


def _check_whole(checkpoint: Checkpoint, sizes: Mapping[str, int | None], is_there: Callable[[], bool]) -> None:
    """Compare the sizes of a step's files with its manifest, which a pruner takes away before them.

    Raises:
        NotACheckpointError: they differ, and the manifest is not there any more.
        DamagedError: they differ.
    """
    try:
        check_sizes(checkpoint, sizes)
    except DamagedError:
        if is_there():
            raise
        raise NotACheckpointError(f"{checkpoint.path}: deleted by a pruner meanwhile.") from None


def check_sizes(checkpoint: Checkpoint, sizes: Mapping[str, int | None]) -> None:
    """Compare the manifest with the directory's name, and with the sizes of its files in bytes, None for no file.

    Raises:
        DamagedError: they differ.
    """
    path, manifest = checkpoint.path, checkpoint.manifest
    if parse_step(path.name) not in {None, manifest.step}:
        raise DamagedError(f"{path}: its manifest is that of step {manifest.step}; give the directory its name back.")
    for name, record in manifest.files.items():
        found = sizes.get(name)
        if found != record.bytes:
            raise DamagedError(
                f"{checkpoint.root}/{name}: {'missing' if found is None else f'{found} bytes'}, the manifest says "
                f"{record.bytes} bytes; restore a copy, or set the step aside with `ckpt repair`."
            )
