"""How a flow run of a live stack ended, and how long it took until all that belonged to it had."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import httpx
from live_stack import LiveStack, wait_until


@dataclass(frozen=True)
class Ending:
    """How a flow run ended: what the API told and what was left, in seconds after what ended it."""

    state: str
    message: str
    told_s: float
    """Until its state was final."""
    tasks_s: float
    """Until no task of it was said to be running."""
    gone_s: float
    """Until no process of it was left."""
    free_s: float
    """Until it held no slot of a concurrency limit."""


def watch_end(stack: LiveStack, run: str, *, since: float, seconds: float = 60) -> Ending:
    """Wait for the end of a flow run, the only one that is running, and of all that belongs to it.

    Args:
        stack: where it runs.
        run: its id.
        since: the moment that the times count from, of `time.monotonic`.
        seconds: fail after this time.
    """
    wanted: dict[str, Callable[[], bool]] = {
        "told_s": lambda: stack.has_ended(run),
        "tasks_s": lambda: stack.has_ended(run) and not stack.unfinished_tasks(run),
        "gone_s": lambda: not stack.processes(run),
        "free_s": lambda: stack.slots() == 0,
    }
    seen: dict[str, float] = {}

    def all_seen() -> bool:
        for name in set(wanted) - set(seen):
            with suppress(httpx.TransportError):
                if wanted[name]():
                    seen[name] = round(time.monotonic() - since, 1)
        return len(seen) == len(wanted)

    wait_until(all_seen, seconds=seconds, told=lambda: f"{seen} of {list(wanted)}; {stack.processes(run)}")
    state = stack.state(run)
    return Ending(state["name"], state["message"] or "", **seen)
