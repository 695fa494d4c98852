"""The retrain under way: what it set out to do and from where, so that a second run continues it or follows it.

    <store>/<run>/retrain.json   the newest retrain of a run: its plan's digest, where it starts, and, when decided,
                                 outcome
    <store>/<run>/retrain.lock   held while one runs, by its flow and by each process of its training

The checkpoints themselves never change; what became of them is told here.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ckpt_core import durable, locks, open_checkpoint, open_store
from ckpt_core.errors import ArgumentError, DamagedError
from ckpt_core.store import CHAMPION, local_path, step_name
from tasks.held import held_open

RECORD_NAME = "retrain.json"
_LOOK_AGAIN_S = 0.2


@dataclass(frozen=True)
class Record:
    """One retrain of a run."""

    plan: str
    start_step: int
    """The newest step when it began, which its own are numbered after; 0 for none."""

    parent: int | None = None
    """The step whose weights it starts from: the champion's, or the newest where there is none."""

    decision: dict[str, Any] | None = None
    """What was decided of its release, before that was made; a rerun that finds it made tells this."""

    outcome: dict[str, Any] | None = None


@contextmanager
def only_retrain(store: str, run: str, *, wait_s: float = 0.0) -> Generator[None]:
    """Hold a run's lock while a retrain works on it, and until the last process of its training has ended.

    Args:
        store: the store's URL.
        run: the run's name.
        wait_s: for how long to wait for another one, in seconds: ranks of one that was killed may still be committing
            the checkpoint that this one goes on from.

    Raises:
        ArgumentError: another one works on it still.
    """
    directory = run_directory(store, run)
    directory.mkdir(parents=True, exist_ok=True)
    handle = os.open(directory / "retrain.lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _take(handle, store, run, wait_s)
        with held_open(handle):
            yield
    finally:
        os.close(handle)


def _take(handle: int, store: str, run: str, wait_s: float) -> None:
    deadline = time.monotonic() + wait_s
    while not locks.take(handle, locks.EXCLUSIVE_NOW, run_directory(store, run)):
        if time.monotonic() > deadline:
            raise ArgumentError(
                f"run {run!r} of {store}: another retrain is working on it; wait for it to end, or give another "
                "run. What is left of one that was killed ends by itself."
            )
        time.sleep(_LOOK_AGAIN_S)


def begin(store: str, run: str, plan: Mapping[str, Any]) -> Record:
    """Return the retrain to do: the one under way, if its plan is this one and it is not decided, else a new one.

    The caller holds the run's lock, by `only_retrain`.

    Args:
        store: the store's URL.
        run: the run's name.
        plan: all settings that decide what is trained, in JSON types.

    Raises:
        DamagedError: the record, or the champion's checkpoint, is damaged.
        NotACheckpointError: the champion's checkpoint is not there.
    """
    digest = "sha256:" + hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()
    path = run_directory(store, run) / RECORD_NAME
    found = _read(path)
    if found is not None and found.plan == digest and found.outcome is None:
        return found
    newest = open_store(store).latest(run)
    if newest is None:
        record = Record(digest, 0)
    else:
        champion = _champion(store, run)
        record = Record(digest, newest.step, newest.step if champion is None else champion)
    _write(path, record)
    return record


def decide(store: str, run: str, record: Record, decision: Mapping[str, Any] | None) -> Record:
    """Write down what was decided, unless nothing was; return the record as it is then."""
    if decision is None:
        return record
    decided = replace(record, decision=dict(decision))
    _write(run_directory(store, run) / RECORD_NAME, decided)
    return decided


def conclude(store: str, run: str, record: Record, outcome: Mapping[str, Any]) -> None:
    """Write down what became of a retrain; the next one is then another."""
    _write(run_directory(store, run) / RECORD_NAME, replace(record, outcome=dict(outcome)))


def _champion(store: str, run: str) -> int | None:
    """Return the champion's step, if a run has one; it is looked at, so that a loss of it is told before training."""
    step = open_store(store).pins(run).get(CHAMPION)
    return None if step is None else open_checkpoint(run_directory(store, run) / step_name(step)).step


def run_directory(store: str, run: str) -> Path:
    """Return the directory of a run."""
    return local_path(store) / run


def _read(path: Path) -> Record | None:
    try:
        return Record(**json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise DamagedError(
            f"{path}: not the record of a retrain ({error}); delete it to start a new retrain from the newest "
            "checkpoint."
        ) from None


def _write(path: Path, record: Record) -> None:
    durable.replace(path, (json.dumps(asdict(record), indent=1) + "\n").encode())
