"""The tasks that keep a store in order: read what is there, set right what killed runs left, delete what may go."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from ckpt_core import open_store
from ckpt_core.errors import ArgumentError, CkptError
from ckpt_core.retention import Retention
from ckpt_core.store import Pruned
from ckpt_core.urls import place_of
from tasks import leftovers, record
from tasks.launch import run_job


@dataclass(frozen=True, kw_only=True)
class Tidied:
    """What was done with one run."""

    run: str
    left: str | None = None
    """Why nothing was done; None if it was."""

    deleted: tuple[int, ...] = ()
    """Steps that were to stay no longer, oldest first."""

    leased: tuple[int, ...] = ()
    """Steps that were to go and that somebody reads: they stay until the next time."""

    done: tuple[str, ...] = ()
    """What was set right besides, in sentences."""

    errors: tuple[str, ...] = ()
    """What could not be done, in sentences."""


@task(task_run_name="verify {store}", cache_policy=NO_CACHE)
def verify_runs(store: str, newest: int, share: float, seed: int) -> list[dict[str, Any]]:
    """Read a share of each run's newest checkpoints and its champion, in a child process: some checks need torch.

    Returns:
        See `tasks.maintenance_jobs.verify_runs`.
    """
    request = {"store": store, "newest": newest, "share": share, "seed": seed}
    return run_job("verify_runs", request)["checkpoints"]


@task(task_run_name="tidy {run}", cache_policy=NO_CACHE)
def tidy(store: str, run: str, retention: Retention | None, abandoned_s: float) -> Tidied:
    """Repair a run, give up its abandoned conversions and, with a retention, delete what it does not keep.

    Nothing is done while a retrain works on the run. What fails is told, and does not stop the rest.

    Args:
        store: its path or URL.
        run: the run.
        retention: which steps stay besides the newest whole one, the champion and pinned ones; None deletes nothing.
            The exports of steps that are gone go too.
        abandoned_s: for how long nothing was written of a conversion that is given up.
    """
    if (place := place_of(store) / run).is_symlink():
        return Tidied(run=run, left=f"a symbolic link to {place.resolve()}")
    with _alone(store, run) as alone:
        return _tidy(store, run, retention, abandoned_s) if alone else Tidied(run=run, left="a retrain is at work")


def _tidy(store: str, run: str, retention: Retention | None, abandoned_s: float) -> Tidied:
    opened, pruned = open_store(store), Pruned()
    done: list[str] = []
    errors: list[str] = []
    with _told(errors):
        done += opened.repair(run)
    with _told(errors):
        done += leftovers.clear_conversions(store, run, abandoned_s)
    if retention is not None:
        with _told(errors):
            pruned = opened.prune(run, retention)
            done += leftovers.clear_exports(store, run)
    with _told(errors):
        opened.pins(run)
    return Tidied(
        run=run,
        deleted=pruned.deleted,
        leased=pruned.leased,
        done=tuple(done),
        errors=tuple(dict.fromkeys([*pruned.errors, *errors])),
    )


@contextmanager
def _told(errors: list[str]) -> Generator[None]:
    """Have what fails told, and no more."""
    try:
        yield
    except (CkptError, OSError) as error:
        errors.append(str(error))


@contextmanager
def _alone(store: str, run: str) -> Generator[bool]:
    """Keep retrains from a run meanwhile; yield False where one is at work. They work on stores in a directory only."""
    with ExitStack() as stack:
        if isinstance(place_of(store), Path):
            try:
                stack.enter_context(record.only_retrain(store, run))
            except ArgumentError:
                yield False
                return
        yield True
