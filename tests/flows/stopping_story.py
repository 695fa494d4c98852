"""Retrains to be stopped: a tiny model whose training is slow while a test wants to meet it at work."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from endings import Ending, watch_end
from live_stack import LiveStack, wait_until
from small_retrain import tiny_retrain, tiny_step, write_text

from ckpt_core import open_checkpoint, open_store
from ckpt_core.store import step_name
from tasks.config import ComputeSettings

STEPS = 120
SLOW_S = 1.0
"""What a step of slow training takes."""
GRACE_S = 20.0
HALF_WRITTEN = (".staging-", ".trash-", ".converting-")


@dataclass(frozen=True)
class Story:
    """Runs of one store. A run's retrains all have the same settings, so that each goes on where one was stopped."""

    stack: LiveStack
    deployment: str
    store: Path

    def submit(self, run: str) -> str:
        """Start a retrain of a run; return the flow run."""
        return self.stack.submit(self.deployment, run=run)

    def step(self, run: str) -> int:
        """Return the newest step that the record of a run's training tells of; 0 before there is one."""
        lines = self._record(run).read_text().splitlines() if self._record(run).exists() else []
        return max((json.loads(line)["step"] for line in lines if '"loss"' in line), default=0)

    def _record(self, run: str) -> Path:
        return self.store / run / "metrics.jsonl"

    def committed(self, run: str) -> dict[int, str]:
        """Return the steps that are committed, with the digests of their manifests."""
        return {step.step: step.manifest.digest() for step in open_store(str(self.store)).list(run)}

    def parent(self, run: str, step: int) -> int | None:
        """Return the step that a committed one was made from, if there was one."""
        parent = open_checkpoint(str(self.store / run / step_name(step))).manifest.lineage["parent"]
        return parent["step"] if parent else None

    def meet_training(self, run: str) -> None:
        """Return when ranks have trained, from now on, beyond what is committed."""
        newest, now = max(self.committed(run), default=0), time.time()

        def has_trained() -> bool:
            return (
                self._record(run).exists() and self._record(run).stat().st_mtime > now and self.step(run) > newest + 1
            )

        wait_until(has_trained, seconds=180, told=self.log)

    def is_free(self, run: str) -> bool:
        """Whether nobody holds a run's lock."""
        handle = os.open(self.store / run / "retrain.lock", os.O_RDWR)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        finally:
            os.close(handle)
        return True

    def staged(self, run: str) -> list[Path]:
        """Return what was being written to a run when somebody was killed, and is there still."""
        return [
            path for path in (self.store / run).rglob(".*") if path.name.startswith((".staging", ".trash", ".conv"))
        ]

    def log(self) -> str:
        """Return the end of what the workers said."""
        return (self.stack.root / "worker.log").read_text()[-6000:]


@dataclass(frozen=True)
class Attempt:
    """One attempt at a run, which something ended."""

    flow_run: str
    ending: Ending
    step: int
    """The newest step that was told of when it ended."""
    before: dict[int, str]
    """What was committed when it began."""
    after: dict[int, str]
    """What was committed when it had ended."""
    parent: int | None
    """The step that its first checkpoint was made from, if it made one."""
    is_free: bool
    """Whether the run's lock was free then."""


@dataclass(frozen=True)
class Stop:
    """The moment at which an attempt is ended; make it right before."""

    story: Story
    run: str
    flow_run: str
    step: int
    at: float

    @classmethod
    def now(cls, story: Story, run: str, flow_run: str) -> Stop:
        """Return this moment."""
        return cls(story, run, flow_run, story.step(run), time.monotonic())

    def watched(self, before: Mapping[int, str], *, seconds: float = 120) -> Attempt:
        """Wait for the end of it all; `before` is what was committed when the attempt began."""
        story, run = self.story, self.run
        ending = watch_end(story.stack, self.flow_run, since=self.at, seconds=seconds)
        after = story.committed(run)
        new = min(set(after) - set(before), default=None)
        parent = story.parent(run, new) if new else None
        return Attempt(self.flow_run, ending, self.step, dict(before), after, parent, story.is_free(run))


@contextmanager
def told(root: Path, *, steps: int = STEPS, **changes: Any) -> Generator[Story]:
    """Yield a story, with a server and a worker.

    Args:
        root: the directory of it all.
        steps: of one retrain.
        changes: to the parameters of `retrain`.
    """
    with LiveStack(root) as stack:
        parameters = tiny_retrain(
            root / "store",
            write_text(root / "text"),
            steps=[tiny_step(steps=steps, checkpoint_every=10, evaluate_every=steps)],
            compute=ComputeSettings(ranks=2, device="cpu", trainer="slow_trainer", grace_seconds=GRACE_S),
            **changes,
        )
        stack.start_worker()
        yield Story(stack, stack.deploy("live", parameters), root / "store")
