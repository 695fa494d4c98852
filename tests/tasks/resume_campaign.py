"""Kill training at drawn moments, start it again until it is done, and compare it with a run that nobody killed."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rank_server import RankServer
from worker_support import committed_steps, final_state, step_records

from tasks.config import Job


@dataclass
class Tally:
    """What a campaign did."""

    kills: int = 0
    in_commits: int = 0
    """Kills that left a step which was being written."""
    runs: int = 0
    """Runs that reached their end, each after any number of kills."""


def run_campaign(
    server: RankServer, new_job: Callable[[], Job], reference: Job, *, seconds: float, kills: int, seed: int
) -> Tally:
    """Kill `kills` times, over as many runs as that takes; assert that each run ends as the reference did.

    Args:
        server: starts the ranks.
        new_job: returns the reference's job with a store of its own.
        reference: has been run to its end.
        seconds: what an uninterrupted run takes; the moments are drawn evenly from that time.
        kills: how many.
        seed: of the draw.
    """
    expected, records = final_state(reference), step_records(reference)
    moments, tally = random.Random(seed), Tally()
    while tally.kills < kills:
        job = new_job()
        while not _is_complete(job):
            kill_after = moments.uniform(0.0, seconds) if tally.kills < kills else None
            before = committed_steps(job)
            outcome = server.run(job, kill_after=kill_after)
            assert outcome["killed"] or set(outcome["codes"]) == {0}, outcome["output"]
            assert committed_steps(job)[: len(before)] == before
            tally.kills += outcome["killed"]
            tally.in_commits += outcome["killed"] and bool(_staged(job))
        tally.runs += 1
        assert final_state(job) == expected
        assert step_records(job) == records
        assert not _staged(job) or committed_steps(job)[-1] == job.end_step
    return tally


def _is_complete(job: Job) -> bool:
    return job.end_step in committed_steps(job)


def _staged(job: Job) -> list[Any]:
    return list((Path(job.store) / job.run).glob(".staging-*"))
