"""A conversion under way: a directory beside its target, which is kept when the process is killed.

.converting-<target>/
plan.json        what is to be made, of what: equal plans go on where the last one was killed
shards/          one JSON file a shard: a unit of work for any process
done/            what is to be known of each finished shard
export/          becomes the target, by one rename
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from ckpt_core import durable
from ckpt_core.errors import CommitError, DamagedError
from ckpt_core.export.shard import Shard, parse_shard, shard_bytes
from ckpt_core.export.stored import DcpStored
from ckpt_core.export.target import give_name
from ckpt_core.export.write import Care, write_shard
from ckpt_core.format.digests import digest_bytes
from ckpt_core.locks import EXCLUSIVE_NOW, SHARED, locked
from ckpt_core.urls import place_of

Progress = Callable[[int, int], None]
"""Is told the bytes written so far, and those to write; by one thread at a time."""

_PLAN = "plan.json"


@dataclass(frozen=True)
class Work:
    """A conversion that was begun."""

    root: Path
    """Its directory."""

    @property
    def plan(self) -> dict[str, Any]:
        """What is to be made."""
        return json.loads(self._read(self.root / _PLAN))

    @property
    def shards(self) -> list[str]:
        """Names of the files of weights."""
        return list(self.plan["shards"])

    @property
    def undone(self) -> list[str]:
        """Names of the files of weights that are still to be written."""
        return [name for name in self.shards if not (self.root / "done" / name).exists()]

    def write(self, name: str, written: Callable[[int], None]) -> None:
        """Write one file of weights, unless that is done; several processes may, and write the same.

        Raises:
            CheckpointError: the checkpoint is damaged, changed meanwhile, or has NaN or Inf.
            CommitError: the conversion was given up meanwhile.
        """
        if (self.root / "done" / name).exists():
            return
        plan, shard = self.plan, parse_shard(self._read(self.root / "shards" / name))
        care, place = Care(**plan["care"]), place_of(plan["directory"])
        part = self.root / f"{name}.{uuid.uuid4().hex}.part"
        with DcpStored(place, shard.tensors) as stored:
            shard.check_unchanged(place)
            record = write_shard(part, shard, stored, care=care, written=written)
            shard.check_unchanged(place)
        part.replace(self.root / "export" / name)
        durable.sync_directory(self.root / "export")
        with suppress(FileExistsError):
            durable.write_new(self.root / "done" / name, json.dumps(record).encode())

    def write_all(self, workers: int, progress: Progress | None) -> None:
        """Write all files of weights that are still to be written, several at once, until one fails."""
        names = self.undone
        told = Tally(progress, sum(shard["bytes"] for name, shard in self.plan["shards"].items() if name in names))
        with ThreadPoolExecutor(workers, thread_name_prefix="ckpt-convert") as pool:
            futures = [pool.submit(self.write, name, told.add) for name in names]
            try:
                for future in futures:
                    future.result()
            finally:
                pool.shutdown(cancel_futures=True)

    def check_done(self) -> None:
        """Check that nothing is left to do.

        Raises:
            CommitError: a file is still to be written, or nothing was begun.
        """
        left = self.undone
        if left:
            raise CommitError(f"{self.root}: {len(left)} files are still to be written, such as {left[0]}.")

    def records(self) -> dict[str, dict[str, Any]]:
        """Return what is to be known of each file of weights.

        Raises:
            DamagedError: one is not finished, or not as it was written.
        """
        found: dict[str, dict[str, Any]] = {}
        for name in self.shards:
            record = json.loads(self._read(self.root / "done" / name))
            if durable.file_size(self.root / "export" / name) != record["bytes"]:
                raise DamagedError(f"{self.root / 'export' / name}: not of {record['bytes']} bytes; convert again.")
            found[name] = record
        return found

    def finish(self, target: Path, record: tuple[str, bytes], *, overwrite: bool) -> None:
        """Write the export's record, by name and content, and give the directory its name.

        Raises:
            ExportExistsError: the name is taken.
        """
        made = self.root / "export"
        durable.replace(self.root / record[0], record[1])
        (self.root / record[0]).replace(made / record[0])
        give_name(made, target, self.root, overwrite=overwrite)

    def _read(self, path: Path) -> bytes:
        try:
            return path.read_bytes()
        except FileNotFoundError:
            raise CommitError(f"{path}: gone; another conversion to the same place took over. Begin again.") from None


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


def work_on(target: Path) -> Work:
    """Return the conversion to `target`, begun or not."""
    return Work(target.with_name(f".converting-{target.name}"))


@contextmanager
def held(work: Work) -> Generator[None]:
    """Keep others from converting to the same place meanwhile.

    Raises:
        CommitError: another process does.
    """
    durable.make_directory(work.root)
    with locked(work.root, EXCLUSIVE_NOW) as lock:
        if lock is None:
            raise CommitError(f"{work.root}: another process is converting to the same place; wait for its end.")
        yield


@contextmanager
def shared(work: Work) -> Generator[None]:
    """Keep the conversion from being given up while a shard is written.

    Raises:
        CommitError: it was given up.
    """
    with locked(work.root, SHARED) as lock:
        if lock is None:
            raise CommitError(f"{work.root}: gone; the conversion was finished or given up. Begin again.")
        yield


def begin(work: Work, plan: Mapping[str, Any], shards: Sequence[Shard], files: Mapping[str, bytes]) -> None:
    """Prepare a conversion, or find the same one as it was left; the leftovers of any other are deleted.

    Args:
        work: where.
        plan: what is to be made, of JSON types.
        shards: the units of work.
        files: the export's other files, but for its record.
    """
    units = {shard.name: shard_bytes(shard) for shard in shards}
    told = {shard.name: {"bytes": shard.nbytes, "digest": digest_bytes(units[shard.name])} for shard in shards}
    small = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    data = (json.dumps({**plan, "shards": told, "files": small}, indent=1) + "\n").encode()
    if (work.root / "export").is_dir() and _content(work.root / _PLAN) == data:
        for part in work.root.glob("*.part"):
            part.unlink(missing_ok=True)
        return
    clear(work)
    for name in ("shards", "done", "export"):
        (work.root / name).mkdir()
    for name, content in units.items():
        durable.write_new(work.root / "shards" / name, content)
    for name, content in files.items():
        durable.write_new(work.root / "export" / name, content)
    durable.sync_tree(work.root)
    durable.replace(work.root / _PLAN, data)


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def clear(work: Work) -> None:
    """Delete all that the conversion's directory holds."""
    for entry in sorted(work.root.iterdir(), key=lambda path: path.name != _PLAN):
        if entry.is_dir() and not entry.is_symlink():
            durable.remove_tree(entry)
        else:
            entry.unlink(missing_ok=True)


def remove(work: Work) -> None:
    """Delete the conversion's directory."""
    clear(work)
    with suppress(OSError):  # somebody else begins anew
        work.root.rmdir()
