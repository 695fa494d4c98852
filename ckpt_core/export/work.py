"""A conversion under way: what any process can do of it, wherever its target lies."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING, Any

from ckpt_core.errors import CommitError, DamagedError
from ckpt_core.export.shard import Shard, parse_shard
from ckpt_core.export.stored import DcpStored
from ckpt_core.export.write import Care, write_shard
from ckpt_core.format.digests import digest_bytes
from ckpt_core.urls import place_of
from ckpt_core.workers import run_all

if TYPE_CHECKING:
    from ckpt_core.durable import Sink
    from ckpt_core.urls import Place

Progress = Callable[[int, int], None]
"""Is told the bytes written so far, and those to write; by one thread at a time."""


class Work(ABC):
    """A conversion to `target`, begun or not."""

    target: Place

    def held(self) -> AbstractContextManager[None]:
        """Keep others from converting to the same place meanwhile, where that can be had.

        Raises:
            CommitError: another process does.
        """
        return nullcontext()

    def shared(self) -> AbstractContextManager[None]:
        """Keep the conversion from being given up while a file is written, where that can be had.

        Raises:
            CommitError: it was given up.
        """
        return nullcontext()

    @abstractmethod
    def begin(
        self, plan: Mapping[str, Any], units: Mapping[str, bytes], files: Mapping[str, bytes], *, overwrite: bool
    ) -> None:
        """Prepare a conversion, or find the same one as it was left; the leftovers of any other are deleted.

        Args:
            plan: what is to be made, of JSON types; see `plan_document`.
            units: the units of work by the files' names, as JSON.
            files: the export's other files, but for its record.
            overwrite: what the target holds may be deleted.
        """

    @property
    @abstractmethod
    def plan(self) -> dict[str, Any]:
        """What is to be made.

        Raises:
            CommitError: nothing was begun, or it was given up.
        """

    @property
    @abstractmethod
    def undone(self) -> list[str]:
        """Names of the files of weights that are still to be written."""

    @abstractmethod
    def write(self, name: str, written: Callable[[int], None]) -> None:
        """Write one file of weights, unless that is done; several processes may, and write the same.

        Raises:
            CheckpointError: the checkpoint is damaged, changed meanwhile, or has NaN or Inf.
            CommitError: the conversion was given up meanwhile.
        """

    @abstractmethod
    def finish(self, record: tuple[str, bytes], *, overwrite: bool) -> None:
        """Write the export's record, by name and content, and make what was written an export.

        Raises:
            ExportExistsError: there is one by now.
        """

    @abstractmethod
    def remove(self) -> None:
        """Delete what this conversion left; an export that it became stays."""

    @abstractmethod
    def abandon(self) -> None:
        """Delete what any conversion to the same target left.

        Raises:
            CommitError: another process is at it.
        """

    @abstractmethod
    def done_record(self, name: str) -> bytes:
        """Return what is to be known of a finished file of weights, as JSON."""

    @abstractmethod
    def sizes(self) -> Mapping[str, int | None]:
        """Return the size of each of the export's files that was written, in bytes."""

    def write_all(self, workers: int, progress: Progress | None) -> None:
        """Write all files of weights that are still to be written, several at once, until one fails."""
        names = self.undone
        told = Tally(progress, sum(shard["bytes"] for name, shard in self.plan["shards"].items() if name in names))
        run_all([partial(self.write, name, told.add) for name in names], workers, name="ckpt-convert")

    def check_done(self) -> None:
        """Check that nothing is left to do.

        Raises:
            CommitError: a file is still to be written, or nothing was begun.
        """
        left = self.undone
        if left:
            raise CommitError(f"{self.target}: {len(left)} files are still to be written, such as {left[0]}.")

    def records(self) -> dict[str, dict[str, Any]]:
        """Return what is to be known of each file of weights.

        Raises:
            DamagedError: one is not finished, or not as it was written.
        """
        sizes = self.sizes()
        found: dict[str, dict[str, Any]] = {}
        for name in self.plan["shards"]:
            record = json.loads(self.done_record(name))
            if sizes.get(name) != record["bytes"]:
                raise DamagedError(f"{self.target}: {name} is not of {record['bytes']} bytes; convert again.")
            found[name] = record
        return found


def plan_document(
    plan: Mapping[str, Any], shards: Sequence[Shard], units: Mapping[str, bytes], files: Mapping[str, bytes]
) -> dict[str, Any]:
    """Return what is to be made: equal documents lead to equal files.

    Args:
        plan: what is to be known of the whole, of JSON types.
        shards: the files of weights.
        units: the same as JSON, by their names.
        files: the export's other files, but for its record.
    """
    told = {shard.name: {"bytes": shard.nbytes, "digest": digest_bytes(units[shard.name])} for shard in shards}
    small = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    return {**plan, "shards": told, "files": small}


def write_unit(sink: Sink, plan: Mapping[str, Any], unit: bytes, written: Callable[[int], None]) -> dict[str, Any]:
    """Write one file of weights, but for sealing it; return what is to be known of it.

    Raises:
        CheckpointError: the checkpoint is damaged, changed meanwhile, or has NaN or Inf.
    """
    shard, place = parse_shard(unit), place_of(plan["directory"])
    with DcpStored(place, shard.tensors) as stored:
        shard.check_unchanged(place)
        record = write_shard(sink, shard, stored, care=Care(**plan["care"]), written=written)
        shard.check_unchanged(place)
    return record


class Tally:
    """Adds up what several threads have done."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done, self._lock = progress, total, 0, Lock()
        self.add(0)

    def add(self, nbytes: int) -> None:
        """Tell of more bytes that were written."""
        with self._lock:
            self._done += nbytes
            if self._progress is not None:
                self._progress(self._done, self._total)
