"""The checkpoints of a job: each committed before the next one is begun, and announced when it is committed."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from ckpt_core import AsyncSaver
from ckpt_core.async_save import SaveTimes

if TYPE_CHECKING:
    from collections.abc import Callable

    from ckpt_core import PyTorchCheckpoint
    from ckpt_core.store import Store
    from tasks.config import Job

_SHARE_OF_GRACE = 0.8
"""Of the time between TERM and KILL, what saving may take."""


class Checkpoints:
    """Commits a job's steps to its store, in the background or at once as the settings say.

    A step's parent in its lineage is the committed one before it, whose write is waited for before the next one begins.
    Making one, `save`, `finish` and leaving the context are collective.

    Args:
        job: whose checkpoints they are, and how to save them.
        store: where to.
        newest: step and URL of the checkpoint that training starts from or continues, if there is one.
        announce: told step and URL of each step once it is committed.
    """

    def __init__(
        self, job: Job, store: Store, newest: tuple[int, str] | None, announce: Callable[[int, str], None]
    ) -> None:
        self._run, self._store, self._announce = job.run, store, announce
        self.newest = newest
        """Step and URL of the newest checkpoint that this rank knows to be committed."""
        self._grace_s = _SHARE_OF_GRACE * job.compute.grace_seconds
        self._deadline: float | None = None
        self._saver = AsyncSaver(store, run=job.run, timeout=self._grace_s) if job.compute.async_save else None

    def __enter__(self) -> Checkpoints:
        if self._saver:
            self._saver.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._saver:
            self._saver.__exit__(*error)

    def look(self) -> None:
        """Announce what was committed meanwhile."""
        self._note(self._saver.committed if self._saver else None)

    def hurry(self) -> None:
        """From now on, give up in time before the end of the grace that TERM leaves."""
        self._deadline = time.monotonic() + self._grace_s

    def save(self, checkpoint: PyTorchCheckpoint, *, step: int, lineage: dict[str, Any], **content: Any) -> SaveTimes:
        """Commit a step, or begin to, after the one before it is committed; return how long training stood still.

        Args:
            checkpoint: what to save.
            step: its number.
            lineage: what it was made from, but for its parent.
            content: the other arguments of `PyTorchCheckpoint.save`.

        Raises:
            CommitError: the step before it could not be committed, or this one, at once.
        """
        began = time.monotonic()
        self.finish()
        waited = time.monotonic()
        parent = None if self.newest is None else {"step": self.newest[0], "url": self.newest[1]}
        content |= {"step": step, "lineage": {**lineage, "parent": parent}}
        if self._saver:
            self._saver.save(checkpoint, **content)
        else:
            self._note(checkpoint.save(self._store.url, run=self._run, **content))
        return SaveTimes(step, waited - began, time.monotonic() - waited)

    def finish(self) -> None:
        """Wait until what was begun is committed.

        Raises:
            CommitError: it could not be committed, or not in time.
        """
        if self._saver:
            left = None if self._deadline is None else max(0.0, self._deadline - time.monotonic())
            self._note(self._saver.wait(left))

    def _note(self, committed: PyTorchCheckpoint | None) -> None:
        if committed is None or committed.step is None or (self.newest and committed.step == self.newest[0]):
            return
        self.newest = committed.step, str(committed.url)
        self._announce(*self.newest)
