"""How far a training job is, as its record tells it while the ranks go on."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from tasks.config import Job
from tasks.worker.history import Curve

_RECENT_STEPS = 50
_MINUTE, _HOUR = 60, 3600


class JobProgress:
    """What is known of a job that runs. Lines are those of `tasks.worker.step_log`; `step` and `loss` are enough.

    Args:
        job: that runs.
        resume_step: that it goes on from. What an earlier attempt told beyond it is not looked at.
        clock: seconds.
    """

    def __init__(self, job: Job, resume_step: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.name, self.last_step = job.step.name, job.end_step
        self.step = resume_step
        """The newest that was told."""
        self.loss: float | None = None
        """Of that step's batch, in nats a token."""
        self.train, self.heldout = Curve(), Curve()
        self._first_step, self._clock = job.start_step, clock
        self._recent: deque[tuple[float, float]] = deque(maxlen=_RECENT_STEPS)
        self._since: tuple[float, int] | None = None
        self._now = clock()

    def begin(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Take what the record holds when the job starts."""
        self._add([entry for entry in entries if self._is_mine(entry) and entry["step"] <= self.step])

    def add(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Take new lines. One of a step that was told before drops what was told from there on."""
        if self._add(entries):
            self._now = self._clock()
            self._since = self._since or (self._now, self.step)

    @property
    def percent(self) -> float:
        """How much of the job is done."""
        return round(100 * (self.step - self._first_step) / (self.last_step - self._first_step), 1)

    @property
    def tokens_per_second(self) -> float | None:
        """Of the last steps, without evaluation and saving; None where the record does not tell."""
        seconds = sum(taken for _, taken in self._recent)
        return sum(tokens for tokens, _ in self._recent) / seconds if seconds else None

    @property
    def seconds_left(self) -> float | None:
        """At the pace since the first new line; None before there is one."""
        if self._since is None or self.step <= self._since[1]:
            return None
        return (self._now - self._since[0]) / (self.step - self._since[1]) * (self.last_step - self.step)

    def line(self, outcome: str = "") -> str:
        """Return it for people, as in 'step 120 of 200, loss 4.830, 12.3k tokens/s, 40 s left'.

        Args:
            outcome: what to say in place of the time that is left, once nothing more will come.
        """
        parts = [f"step {self.step} of {self.last_step}"]
        if self.loss is not None:
            parts.append(f"loss {self.loss:.3f}")
        if speed := self.tokens_per_second:
            parts.append(f"{speed / 1000:.1f}k tokens/s")
        if outcome:
            parts.append(outcome)
        elif self.loss is None:
            parts.append("the ranks are starting")
        elif (left := self.seconds_left) is not None:
            parts.append(f"{_duration(left)} left")
        return ", ".join(parts)

    def _add(self, entries: Iterable[Mapping[str, Any]]) -> int:
        """Return how many of the lines told a step of this job."""
        found = [entry for entry in entries if self._is_mine(entry)]
        for entry in found:
            self._add_step(entry)
        return len(found)

    def _is_mine(self, entry: Mapping[str, Any]) -> bool:
        step, loss = entry.get("step"), entry.get("loss")
        return isinstance(step, int) and isinstance(loss, int | float) and self._first_step < step <= self.last_step

    def _add_step(self, entry: Mapping[str, Any]) -> None:
        step = entry["step"]
        if self.train.points or self.train.pending:
            self._forget_from(step)
        self.step, self.loss = step, float(entry["loss"])
        self.train.add(step, self.loss)
        if isinstance(entry.get("heldout_loss"), int | float):
            self.heldout.add(step, entry["heldout_loss"])
        if isinstance(entry.get("tokens"), int | float) and isinstance(entry.get("seconds"), int | float):
            self._recent.append((entry["tokens"], entry["seconds"]))

    def _forget_from(self, step: int) -> None:
        if step > self.step:
            return
        for curve in (self.train, self.heldout):
            curve.points, curve.pending = [point for point in curve.points if point[0] < step], []
        self._recent.clear()
        self._since = None


def _duration(seconds: float) -> str:
    if seconds < 2 * _MINUTE:
        return f"{seconds:.0f} s"
    if seconds < 2 * _HOUR:
        return f"{seconds / _MINUTE:.0f} min"
    return f"{seconds // _HOUR:.0f} h {seconds % _HOUR / _MINUTE:.0f} min"
