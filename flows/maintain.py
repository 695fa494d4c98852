"""`maintain`: verify, repair, prune, report. Also `python -m flows.maintain [STORE [KEEP_LAST]]`."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from prefect import flow
from prefect.events import emit_event
from pydantic import Field

from ckpt_core import open_store
from ckpt_core.errors import ArgumentError, DamagedError, NotACheckpointError
from ckpt_core.retention import Retention
from ckpt_core.store import LocalStore
from tasks import artifacts, sentinel
from tasks.maintenance import Tidied, tidy, verify_runs
from tasks.maintenance_report import Maintained
from tasks.results import ReferenceSerializer


@flow(
    name="maintain",
    flow_run_name="maintain {store}",
    persist_result=False,
    result_serializer=ReferenceSerializer(),
)
def maintain(
    store: str = "runs",
    newest: Annotated[int, Field(ge=1)] = 1,
    sample_percent: Annotated[float, Field(gt=0, le=100)] = 5.0,
    keep_last: Annotated[int, Field(ge=1)] | None = None,
    keep_best: Annotated[int, Field(ge=0)] = 0,
    metric: str | None = None,
    mode: Literal["min", "max"] | None = None,
    keep_every: Annotated[int, Field(ge=1)] | None = None,
    abandoned_hours: Annotated[float, Field(gt=0)] = 24.0,
) -> dict[str, Any]:
    """Verify a sample of each run's newest checkpoints, set right what killed runs left, and delete what may go.

    A damaged checkpoint fails the flow run at its end and is named; its run is then left as it is, as is a run that a
    retrain is working on.

    Args:
        store: the directory or URL that holds runs.
        newest: how many of the newest checkpoints of each run are verified; its champion's always is.
        sample_percent: how much of each is read; other parts every day. With 100, digests of whole files are checked.
        keep_last: how many of the newest checkpoints of each run stay; empty deletes nothing. The newest sound one, the
            champion and pinned ones always stay; exports of deleted ones are deleted too.
        keep_best: how many of the best by `metric` stay besides.
        metric: what makes a checkpoint the best, say heldout_loss.
        mode: whether the smallest or the largest `metric` is the best; empty means as the metric's name says.
        keep_every: every checkpoint whose step is a multiple of this stays besides.
        abandoned_hours: a conversion that was stopped, and that nobody went on with for so long, is deleted.
    """
    retention = _retention(keep_last, keep_best=keep_best, metric=metric, mode=mode, keep_every=keep_every)
    opened = open_store(store)
    if isinstance(opened, LocalStore) and not opened.root.is_dir():
        raise NotACheckpointError(f"{opened.root}: no such directory, so no store; see where the runs lie.")
    with sentinel.posted():
        checkpoints = verify_runs(opened.url, newest, sample_percent / 100, _today())
        damaged = {found["run"] for found in checkpoints if found["problems"]}
        idle_s = abandoned_hours * 3600
        tidied = [
            Tidied(run=run, left="damaged") if run in damaged else tidy(opened.url, run, retention, idle_s)
            for run in opened.runs()
        ]
    maintained = Maintained(opened.url, checkpoints, tidied)
    artifacts.maintenance(maintained.card(), maintained.rows())
    emit_event("ckpt.store.maintained", resource={"prefect.resource.id": opened.url}, payload=maintained.facts())
    _require(maintained)
    return maintained.facts()


def _retention(keep_last: int | None, **others: Any) -> Retention | None:
    """Return what stays; None deletes nothing.

    Raises:
        ArgumentError: what stays besides is named, and not how many of the newest do.
    """
    if keep_last is not None:
        return Retention(keep_last=keep_last, **others)
    if any(others.values()):
        given = " and ".join(name for name, value in others.items() if value)
        raise ArgumentError(f"keep_last is empty, so nothing is deleted: {given} need it too.")
    return None


def _today() -> int:
    """Return the number of the day, which chooses what of each checkpoint is read."""
    return datetime.now(UTC).date().toordinal()


def _require(maintained: Maintained) -> None:
    """Fail, now that everything is done, if anything is wrong."""
    if maintained.damaged:
        raise DamagedError(
            f"{maintained.store}: damaged, and left as it is: {' '.join(maintained.damaged)} Restore a copy, or set it "
            "aside with `ckpt repair`."
        )
    if maintained.errors:
        raise OSError(f"{maintained.store}: {' '.join(maintained.errors)}")


def main(arguments: list[str]) -> int:
    """Maintain a store; print what was found, or the error."""
    if len(arguments) > 2:  # noqa: PLR2004 - the store and how many checkpoints stay
        sys.exit("usage: python -m flows.maintain [STORE [KEEP_LAST]]")
    options: dict[str, Any] = dict(zip(("store", "keep_last"), arguments, strict=False))
    try:
        found: Any = maintain(**options)  # from a thread without a loop, never a coroutine or a state
    except (DamagedError, OSError, ValueError) as error:
        print(f"\nmaintain failed: {error}", file=sys.stderr)  # noqa: T201
        return 1
    deleted = sum(map(len, found["deleted"].values()))
    print(f"{found['store']}: {found['verified']} checkpoints sound, {deleted} deleted")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
