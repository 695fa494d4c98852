"""A job goes on with the ranks that are left, from its newest checkpoint, where a restart can help."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from worker_support import tiny_job

from tasks.config import Job
from tasks.elastic import run_ranks
from tasks.nodes import NodesFailedError
from tasks.process import ChildFailedError
from tasks.torchrun import RankFailure, RanksFailedError


class Ranks:
    """Stand in for the ranks: each start ends as the test says, the last ones well."""

    def __init__(self, *ends: Exception) -> None:
        self.ends = list(ends)
        self.jobs: list[Job] = []

    def run(self, job: Job, on_line: object) -> None:
        """Run one start."""
        self.jobs.append(job)
        if self.ends:
            raise self.ends.pop(0)

    def shapes(self) -> list[tuple[int, int]]:
        """Return nodes and ranks on each of all starts."""
        return [(job.compute.nodes, job.compute.ranks) for job in self.jobs]


def died(*ranks: int, node: str = "", lost: int = 0) -> RanksFailedError:
    """Return the error of a job of which these ranks were killed, on one node."""
    failures = tuple(RankFailure(rank, -signal.SIGKILL, "", node) for rank in ranks)
    return NodesFailedError("some were killed\nand more", failures, lost)


def job(store: Path, batch_size: int = 8, **compute: object) -> Job:
    """Return a job whose batch and ranks the test chooses."""
    prepared = dict.fromkeys(("tokenizer", "train_tokens", "heldout_tokens", "fingerprint"), "-")
    made = tiny_job(prepared, store, batch_size=batch_size)
    return made.model_copy(update={"compute": made.compute.model_copy(update=compute)})


@pytest.mark.parametrize(
    ("ranks", "killed", "batch_size", "min_ranks", "then"),
    [
        (8, 1, 64, 1, 4),
        (8, 1, 56, 1, 7),
        (8, 3, 60, 1, 5),
        (4, 3, 8, 1, 1),
        (8, 1, 64, None, 8),
    ],
)
def test_the_most_ranks_that_share_the_batch_go_on(tmp_path: Path, ranks, killed, batch_size, min_ranks, then):
    """The batch stays what it is; without a least number, as many as before start again."""
    run = Ranks(died(*range(killed)))
    run_ranks(job(tmp_path, batch_size, ranks=ranks, max_restarts=1, min_ranks=min_ranks), print, run=run.run)
    assert run.shapes() == [(1, ranks), (1, then)]
    assert run.jobs[1].step == run.jobs[0].step


@pytest.mark.parametrize(
    ("lost", "killed", "then"), [(1, 0, (3, 8)), (0, 1, (4, 6)), (2, 1, (2, 6)), (4, 0, (1, 8)), (0, 3, (4, 4))]
)
def test_nodes_that_are_lost_leave_all_ranks_on_the_others(tmp_path: Path, lost, killed, then):
    """Where ranks died each node starts that many fewer; at least the node of the flow goes on."""
    run = Ranks(died(*range(killed), node="b", lost=lost))
    four = job(tmp_path, 48, nodes=4, ranks=8, rendezvous="a:1", max_restarts=1, min_ranks=1)
    run_ranks(four, print, run=run.run)
    assert run.shapes() == [(4, 8), then]


def test_too_few_ranks_left_are_an_error(tmp_path: Path):
    """Below the least number the job fails as it would have."""
    run = Ranks(died(0))
    with pytest.raises(RanksFailedError, match="some were killed"):
        run_ranks(job(tmp_path, 64, ranks=8, max_restarts=5, min_ranks=5), print, run=run.run)
    assert run.shapes() == [(1, 8)]


@pytest.mark.parametrize(
    "error",
    [
        RanksFailedError("raised", [RankFailure(1, 1, "ValueError: no such batch")]),
        RanksFailedError("stopped", [RankFailure(1, 128 + signal.SIGTERM, "")]),
        RanksFailedError("stopped", [RankFailure(1, -signal.SIGTERM, "")]),
        ChildFailedError("torchrun ended"),
    ],
)
def test_an_error_in_the_program_is_never_tried_again(tmp_path: Path, error: Exception):
    """It would come again; and what was told to stop stays stopped."""
    run = Ranks(error)
    with pytest.raises(type(error), match=str(error)):
        run_ranks(job(tmp_path, ranks=2, max_restarts=5), print, run=run.run)
    assert len(run.jobs) == 1


def test_restarts_are_bounded_and_told(tmp_path: Path):
    """Each is a line, and an entry in the lineage of what is committed after it; then the error is the last one's."""
    run, lines = Ranks(died(0), died(1), died(2)), []
    with pytest.raises(RanksFailedError, match="some were killed"):
        run_ranks(job(tmp_path, 8, ranks=4, max_restarts=2, min_ranks=1), lines.append, run=run.run)
    assert run.shapes() == [(1, 4), (1, 2), (1, 1)]
    assert lines == [
        "going on from the start with 2 ranks, 1 more restarts left: some were killed",
        "going on from the start with 1 ranks, 0 more restarts left: some were killed",
    ]
    restarts = run.jobs[2].lineage["restarts"]
    assert restarts[0] == {"after_step": 0, "nodes": 1, "ranks": 2, "reason": "some were killed"}
    assert [restart["ranks"] for restart in restarts] == [2, 1]
    assert "restarts" not in run.jobs[0].lineage
