"""A day of retrains in some minutes: one after the other, and something goes wrong at drawn moments."""

from __future__ import annotations

import json
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from live_stack import LiveStack, signal_all, wait_until
from stopping_story import Story

from ckpt_core import open_store

RUN = "daily"
LONGEST_S = 300.0
AWAY_S = 2.0


def _cancel(stack: LiveStack, flow_run: str) -> None:
    stack.cancel(flow_run)


def _kill_flow(stack: LiveStack, flow_run: str) -> None:
    signal_all(stack.flow_process(flow_run), signal.SIGKILL)


def _kill_rank(stack: LiveStack, flow_run: str) -> None:
    wait_until(lambda: stack.ranks(flow_run) or stack.has_ended(flow_run), seconds=LONGEST_S)
    signal_all(stack.ranks(flow_run)[:1], signal.SIGKILL)


def _kill_worker(stack: LiveStack, flow_run: str) -> None:
    stack.worker.kill()
    stack.start_worker()


def _stop_worker(stack: LiveStack, flow_run: str) -> None:
    stack.worker.terminate()
    stack.start_worker()


def _restart_server(stack: LiveStack, flow_run: str) -> None:
    stack.server_away(AWAY_S)


@dataclass(frozen=True)
class Fault:
    """What goes wrong, and the states that a flow run may then end in: it may have been done before."""

    strike: Callable[[LiveStack, str], None]
    ends: frozenset[str]


FAULTS = {
    "cancelled": Fault(_cancel, frozenset({"Cancelled", "Completed"})),
    "flow killed": Fault(_kill_flow, frozenset({"Crashed", "Completed"})),
    "rank killed": Fault(_kill_rank, frozenset({"Failed", "Completed"})),
    "worker killed": Fault(_kill_worker, frozenset({"Crashed", "Completed"})),
    "worker stopped": Fault(_stop_worker, frozenset({"Crashed", "Completed"})),
    "server started again": Fault(_restart_server, frozenset({"Completed"})),
}


@dataclass(frozen=True)
class Retrain:
    """One of the day's."""

    fault: str | None
    state: str
    seconds: float
    """From its start to its end, as the server tells it."""
    told_s: float | None
    """From the fault until the state was final."""
    worker: tuple[int, float]
    """The worker's process, and its resident memory, in MB, when it had ended."""


@dataclass
class Day:
    """What happened."""

    retrains: list[Retrain] = field(default_factory=list)

    def growth_mb(self, settled: int) -> float:
        """Return by how much any worker's memory has grown since its retrain number `settled`."""
        by_worker: dict[int, list[float]] = {}
        for pid, resident in (retrain.worker for retrain in self.retrains):
            by_worker.setdefault(pid, []).append(resident)
        return max(
            (sizes[-1] - sizes[settled - 1] for sizes in by_worker.values() if len(sizes) > settled), default=0.0
        )

    def table(self) -> str:
        """Return the figures as a table, a line for each kind of fault."""
        lines = ["| what went wrong | retrains | ended | seconds until that was told |", "|---|---|---|---|"]
        for fault in [None, *FAULTS]:
            those = [retrain for retrain in self.retrains if retrain.fault == fault]
            ends = ", ".join(f"{count} {state}" for state, count in Counter(r.state for r in those).items())
            told = [retrain.told_s for retrain in those if retrain.told_s is not None]
            seconds = f"{min(told):.0f} to {max(told):.0f}" if told else ""
            lines.append(f"| {fault or 'nothing'} | {len(those)} | {ends} | {seconds} |")
        return "\n".join(lines)


def live_through(story: Story, *, retrains: int, faults: int, seed: int) -> Day:
    """Have retrains follow each other, each waiting for the one before it, and let things go wrong.

    Args:
        story: where.
        retrains: how many. Nothing goes wrong with the first, whose length the moments are drawn from, nor the last.
        faults: with how many of them something goes wrong; of each kind as often, give or take one.
        seed: of what goes wrong, with which, and when.
    """
    draws, day, stack = random.Random(seed), Day(), story.stack
    struck = drawn(draws, retrains, faults)
    upcoming = story.submit(RUN)
    for number in range(retrains):
        flow_run = upcoming
        wait_until(lambda run=flow_run: stack.has_begun(run), seconds=LONGEST_S, told=story.log)
        if number + 1 < retrains:
            upcoming = story.submit(RUN)
        fault, since = struck.get(number), None
        if fault is not None:
            time.sleep(draws.uniform(0.0, day.retrains[0].seconds))
            since = time.monotonic()
            if not stack.has_ended(flow_run):
                FAULTS[fault].strike(stack, flow_run)
        wait_until(lambda run=flow_run: stack.has_ended(run), seconds=LONGEST_S, told=story.log)
        told_s = None if since is None else time.monotonic() - since
        ended = stack.get(f"/flow_runs/{flow_run}")
        worker = stack.worker.pid, _resident_mb(stack.worker.pid)
        day.retrains.append(Retrain(fault, ended["state"]["name"], ended["total_run_time"], told_s, worker))
    return day


def drawn(draws: random.Random, retrains: int, faults: int) -> dict[int, str]:
    """Return what goes wrong, by the number of the retrain that it happens to."""
    kinds = [*FAULTS] * (faults // len(FAULTS)) + draws.sample([*FAULTS], faults % len(FAULTS))
    return dict(zip(draws.sample(range(1, retrains - 1), faults), draws.sample(kinds, faults), strict=True))


def losses(story: Story) -> list[tuple[float, float | None]]:
    """Return the loss of each release, in order, and of what was served before it."""
    records = sorted((story.store / RUN / "releases").rglob("v*.json"), key=lambda path: int(path.stem[1:]))
    found = [json.loads(path.read_bytes())["decision"] for path in records]
    return [(decision["challenger"], decision["champion"]) for decision in found]


def kept(story: Story, newest: int) -> tuple[set[int], set[int]]:
    """Return the steps that are there, and those that are to be: the newest, the champion and the pinned ones."""
    store = open_store(str(story.store))
    there = sorted(checkpoint.step for checkpoint in store.list(RUN))
    return set(there), {*there[-newest:], *store.pins(RUN).values()}


def left_behind(story: Story) -> list[Any]:
    """Return what a day must not leave: processes, slots, leases, locks, and what was being written."""
    stack = story.stack
    at_work = [line for pid, line in stack.processes().items() if pid in stack.machine() and pid != stack.worker.pid]
    held = ["retrain.lock"] if not story.is_free(RUN) else []
    return [*at_work, *held, *["a slot"] * stack.slots(), *stack.leases(), *story.staged(RUN)]


def _resident_mb(pid: int) -> float:
    [line] = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) / 1024
