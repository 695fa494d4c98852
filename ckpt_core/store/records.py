"""Records that expire: object stores have no locks, so who reads, writes or prunes leaves a note, with a time on it.

    <run>/.staging/<step>.<directory>.<expiry>.<id>   data is being written below <run>/<step>/<directory>
    <run>/.leases/<step>.<digest>.<expiry>.<id>       the checkpoint with that digest is being read
    <run>/.locks/run.<expiry>.<id>                    somebody prunes, pins or repairs

Everything is in the name, `expiry` in seconds since 1970, so that one listing tells of all.
"""

from __future__ import annotations

import errno
import logging
import random
import re
import time
import uuid
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ckpt_core.errors import CheckpointError, NotACheckpointError
from ckpt_core.format.manifest import MANIFEST_NAME, Manifest, parse_manifest
from ckpt_core.store import objects
from ckpt_core.store.names import parse_step

if TYPE_CHECKING:
    from upath import UPath

STAGING, LEASES, LOCKS = ".staging", ".leases", ".locks"
STAGING_S = 24 * 3600
"""How long a step may be in writing."""

LEASE_S = 24 * 3600
"""How long a reader holds a step that it never lets go of, because it died."""

LOCK_S = 600
"""How long a run is locked by who died while pruning, pinning or repairing; these hold it for some requests only."""

GRACE_S = 3600
"""How far the clocks of those who share a store may be apart; for those that prune, pin or repair, see `alone`."""

_LOCK_WAIT_S = 60
_NAME = re.compile(r"(.+)\.([0-9]{1,12})\.([0-9a-f]{32})")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Record:
    """A note of `key` in a directory, until `expiry` in seconds since 1970."""

    place: UPath
    key: str
    expiry: int

    @property
    def live(self) -> bool:
        """Whether it counts."""
        return time.time() < self.expiry

    @property
    def dead(self) -> bool:
        """Whether it counts on nobody's clock."""
        return time.time() > self.expiry + GRACE_S

    def delete(self) -> None:
        """Take it back; if that fails, it expires."""
        try:
            objects.delete(self.place)
        except OSError as error:
            _log.warning("%s: not deleted (%s); it expires by itself", self.place, error)


def write(directory: UPath, key: str, seconds: int) -> Record:
    """Leave a note."""
    expiry = int(time.time()) + seconds
    place = directory / f"{key}.{expiry}.{uuid.uuid4().hex}"
    objects.write(place, b"")
    return Record(place, key, expiry)


def records_in(directory: UPath) -> list[Record]:
    """Return all notes in a directory."""
    matches = [(name, _NAME.fullmatch(name)) for name in objects.names_in(directory)]
    return [Record(directory / name, match[1], int(match[2])) for name, match in matches if match]


@contextmanager
def alone(run: UPath) -> Generator[None]:
    """Be the only one that prunes, pins or repairs in a run.

    Each leaves a note and then looks for others': of two at the same time, at least one sees the other's and draws
    back for a random time. A dead one's expires after `LOCK_S`, 10 minutes: clocks may be apart by that, less the time
    that the run is held.

    Raises:
        CheckpointError: others never let go.
    """
    end = time.monotonic() + _LOCK_WAIT_S
    while True:
        mine = write(run / LOCKS, "run", LOCK_S)
        try:
            notes = records_in(run / LOCKS)
            others = [record for record in notes if record.live and record.place.name != mine.place.name]
            if not others:
                yield
                return
        finally:
            mine.delete()
        if time.monotonic() > end:
            until = time.strftime("%H:%M:%S UTC", time.gmtime(max(record.expiry for record in others)))
            raise CheckpointError(
                f"{run}: being pruned, pinned or repaired by somebody else for {_LOCK_WAIT_S} s; wait, or if that one "
                f"is dead, until {until}."
            )
        time.sleep(random.uniform(0.02, 0.5))  # noqa: S311 - not for secrets


def lease_key(step: str, manifest: Manifest) -> str:
    """Return the key of leases on what is committed under a step's name with this manifest."""
    return f"{step}.{manifest.digest().partition(':')[2][:32]}"


def leased_keys(run: UPath) -> set[str]:
    """Return the keys of all leases that count."""
    return {record.key for record in records_in(run / LEASES) if record.live}


@contextmanager
def leased(path: UPath, manifest: Manifest) -> Generator[None]:
    """Keep the data of a committed step from being deleted.

    First the lease is written, then the manifest is looked for; a pruner deletes the manifest first, and then looks
    for leases. Whatever the order of these four, a reader that finds the manifest is found by the pruner.

    Raises:
        NotACheckpointError: a pruner was faster.
    """
    record = None
    if parse_step(path.name) is not None:  # a copy elsewhere is nobody's to prune
        try:
            record = write(path.parent / LEASES, lease_key(path.name, manifest), LEASE_S)
        except OSError as error:
            if not _is_read_only(error):
                raise
            _log.warning("%s: read without a lease, which needs a right to write; a pruner may delete it", path)
    try:
        _check_there(path, manifest)
        yield
    finally:
        if record is not None:
            record.delete()


def _is_read_only(error: OSError) -> bool:
    """Whether an error says that nothing can be written there, now or later: for fsspec, that it knows no way to."""
    refused = isinstance(error, PermissionError) or error.errno == errno.EROFS
    return refused or isinstance(error.__cause__, NotImplementedError)


def manifest_of(directory: UPath) -> Manifest | None:
    """Return the manifest in a directory; None if there is none.

    Raises:
        DamagedError: it cannot be read.
    """
    place = directory / MANIFEST_NAME
    try:
        return parse_manifest(objects.read(place), place)
    except FileNotFoundError:
        return None


def _check_there(path: UPath, manifest: Manifest) -> None:
    found = manifest_of(path)
    if found is None or found.digest() != manifest.digest():
        raise NotACheckpointError(f"{path}: deleted by a pruner before it could be read.")
