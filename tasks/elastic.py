"""Going on with the ranks that are left, from the newest committed checkpoint, when a signal or a loss ended some.

torchrun's own restarts keep the number of ranks, and repeat any error. Here what a restart needs is on disk already: it
is another start of the job, with fewer ranks if the settings allow that, and only where it can help.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from ckpt_core import open_store
from tasks.config import Job
from tasks.nodes import NodesFailedError, run_once
from tasks.torchrun import RanksFailedError

OnLine = Callable[[str], None]


def run_ranks(job: Job, on_line: OnLine, *, run: Callable[[Job, OnLine], None] = run_once) -> None:
    """Run the ranks of a training job to its end, with as many restarts as its settings allow.

    What is committed after a restart tells of it: `lineage["restarts"]` is a list of `after_step` (0: none was
    committed), `nodes`, `ranks` (on each node) and `reason`.

    Args:
        job: what to train.
        on_line: given each line of output, and a line for each restart.
        run: what runs the ranks of one start.

    Raises:
        RanksFailedError: ranks failed in a way that a restart does not help, or once too often.
    """
    left = job.compute.max_restarts
    while True:
        try:
            return run(job, on_line)
        except RanksFailedError as error:
            smaller = _left_after(error, job) if left else None
            if smaller is None:
                raise
            left -= 1
            job = smaller
            on_line(_story(job.lineage["restarts"][-1], left))


def _left_after(error: RanksFailedError, job: Job) -> Job | None:
    """Return the job as it can go on, or None: what failed was no rank that died, or too few are left."""
    lost = error.lost if isinstance(error, NodesFailedError) else 0
    died = Counter(failure.node for failure in error.failures if failure.died)
    if not (lost or died):
        return None
    shape = _shape(job, lost, max(died.values(), default=0))
    if shape is None:
        return None
    nodes, ranks = shape
    newest = open_store(job.store).latest(job.run)
    restart: dict[str, Any] = {
        "after_step": 0 if newest is None else newest.step,
        "nodes": nodes,
        "ranks": ranks,
        "reason": str(error).splitlines()[0],
    }
    return job.model_copy(
        update={
            "compute": job.compute.model_copy(update={"nodes": nodes, "ranks": ranks}),
            "lineage": {**job.lineage, "restarts": [*job.lineage.get("restarts", []), restart]},
        }
    )


def _shape(job: Job, lost_nodes: int, lost_ranks: int) -> tuple[int, int] | None:
    """Return on how many nodes to go on, with how many ranks each: the most that share the batch evenly."""
    compute = job.compute
    if compute.min_ranks is None:
        return compute.nodes, compute.ranks
    nodes = max(1, compute.nodes - lost_nodes)
    for ranks in range(compute.ranks - lost_ranks, 0, -1):
        if nodes * ranks >= compute.min_ranks and job.step.batch_size % (nodes * ranks) == 0:
            return nodes, ranks
    return None


def _story(restart: dict[str, Any], left: int) -> str:
    where = f"step {restart['after_step']}" if restart["after_step"] else "the start"
    places = f"{restart['nodes']} x {restart['ranks']}" if restart["nodes"] > 1 else str(restart["ranks"])
    return f"going on from {where} with {places} ranks, {left} more restarts left: {restart['reason']}"
