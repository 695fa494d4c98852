"""What a training tells while it runs: lines for people, the record of its steps, and TensorBoard's scalars."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ckpt_core.store import LocalStore, open_store
from tasks.worker.progress import Progress
from tasks.worker.scalars import Scalars
from tasks.worker.step_log import FILE_NAME, StepLog

if TYPE_CHECKING:
    from ckpt_core.async_save import SaveTimes
    from tasks.config import Job
    from tasks.worker.place import Place


class Records:
    """Tells it on rank 0; on the others it does nothing."""

    def __init__(self, progress: Progress | None, log: StepLog | None, scalars: Scalars | None) -> None:
        self._progress, self._log, self._scalars = progress, log, scalars

    @classmethod
    def open(cls, job: Job, place: Place, *, step: int, tokens_per_step: int) -> Records:
        """Open what a job tells from `step` on; only a store that is a directory has files."""
        if place.rank != 0:
            return cls(None, None, None)
        progress, store = Progress(step, job.end_step, tokens_per_step), open_store(job.store)
        if not isinstance(store, LocalStore):
            return cls(progress, None, None)
        directory = store.root / job.run
        log = StepLog(directory / FILE_NAME, resume_step=step)
        return cls(progress, log, Scalars(directory, resume_step=step) if job.compute.tensorboard else None)

    def advanced(self, step: int, loss: float, learning_rate: float) -> None:
        """Tell people of an optimizer step."""
        if self._progress:
            self._progress.step(step, loss, learning_rate)

    def evaluated(self, step: int, loss: float) -> None:
        """Tell people of a held-out loss."""
        if self._progress:
            self._progress.note(step, f"held-out loss {loss:.3f}")

    def committed(self, step: int, url: str) -> None:
        """Tell people of a checkpoint."""
        if self._progress:
            self._progress.note(step, f"checkpoint {url}")

    def keep(self, entry: dict[str, Any]) -> None:
        """Write down an optimizer step and, if it was evaluated, its held-out loss; see `tasks.worker.step_log`."""
        if self._log:
            self._log.add(entry)
        if self._scalars:
            self._scalars.step(entry)

    def keep_save(self, times: SaveTimes) -> None:
        """Write down how long a save kept training from going on."""
        if self._log:
            entry = {"waited_s": round(times.waited_s, 4), "blocked_s": round(times.blocked_s, 4)}
            self._log.add({"step": times.step, **entry})
        if self._scalars:
            self._scalars.save(times.step, times.blocked_s)

    def sync(self) -> None:
        """Make durable what was written down: a checkpoint must not outlive the lines of its steps."""
        if self._log:
            self._log.sync()
        if self._scalars:
            self._scalars.flush()

    def close(self) -> None:
        """Close the files."""
        for file in (self._log, self._scalars):
            if file:
                file.close()
