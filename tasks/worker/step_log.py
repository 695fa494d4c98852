"""The record of a run's training, `<store>/<run>/metrics.jsonl`: one JSON object a line, appended while it trains.

A line for each optimizer step, in order and without gaps:

    step            counted over all retrains of the run
    loss            of its batch, in nats a token
    learning_rate   that it was taken with
    grad_norm       of the gradient, before it was clipped
    tokens          in its batch, over all ranks
    seconds         that it took, without evaluation and saving
    heldout_loss    in nats a token; only where the step was followed by an evaluation

and one for each save, after the line of its step:

    step            that was saved
    waited_s        seconds that training stood still until the save before it was committed
    blocked_s       seconds that it stood still for this one: for a copy of the state, or, without `async_save`, for all

A trainer of your own that appends lines with `step` and `loss` is shown while it runs as ours is; it may leave out the
rest and add fields of its own. A line of a step that was told before takes the place of it and of all that followed.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

FILE_NAME = "metrics.jsonl"


class StepLog:
    """Writes the record. Only one rank does.

    What lies beyond the step that training resumes from is dropped when it is opened, so that an interrupted run leaves
    the same lines of steps as one that was not, apart from times.
    """

    def __init__(self, path: Path, *, resume_step: int) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = b"".join(_lines_up_to(path, resume_step))
        temporary = path.with_name(f".{path.name}.new")
        temporary.write_bytes(kept)
        temporary.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def add(self, entry: dict[str, Any]) -> None:
        """Append a line; a process that is killed later does not take it along."""
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Make it durable: a checkpoint must not outlive the lines of its steps."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class StepReader:
    """Reads the record while somebody else writes it: each look gives what is new, for the price of reading that."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode, self._offset = 0, 0
        status = path.stat() if path.exists() else None
        self._first = (status.st_ino, status.st_size) if status else (0, 0)

    def before(self) -> list[dict[str, Any]]:
        """Return the lines that were there when this was made; the first look."""
        inode, size = self._first
        return self._read(size) if self._path.exists() and self._path.stat().st_ino == inode else []

    def new(self) -> list[dict[str, Any]]:
        """Return the whole lines since the last look; all of them where the file was replaced. None are no objects."""
        return self._read()

    def _read(self, size: int = -1) -> list[dict[str, Any]]:
        try:
            with self._path.open("rb") as file:
                status = os.fstat(file.fileno())
                if status.st_ino != self._inode or status.st_size < self._offset:
                    self._inode, self._offset = status.st_ino, 0
                file.seek(self._offset)
                data = file.read(size)
        except FileNotFoundError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        return _objects(whole.splitlines())


def save_times(path: Path, step: int) -> dict[str, float] | None:
    """Return `waited_s` and `blocked_s` of a step's save, as far as the record tells them; None if it does not."""
    try:
        lines = [line for line in path.read_bytes().splitlines() if b'"blocked_s"' in line]
    except FileNotFoundError:
        return None
    found = [entry for entry in _objects(lines) if entry.get("step") == step]
    return {name: found[-1][name] for name in ("waited_s", "blocked_s") if name in found[-1]} if found else None


def _objects(lines: Iterable[bytes]) -> list[dict[str, Any]]:
    """Return the lines that are JSON objects; a record that a user's own trainer writes may hold others."""
    found = list[dict[str, Any]]()
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict):
            found.append(cast("dict[str, Any]", entry))
    return found


def _lines_up_to(path: Path, step: int) -> list[bytes]:
    """Return the whole lines of steps up to `step`."""
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):  # cut by a kill or a power cut
        lines.pop()
    return [line for line in lines if json.loads(line)["step"] <= step]
