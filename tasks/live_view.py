"""A training job in the Prefect UI while it runs: how far it is, its loss curve, and a card for each checkpoint.

The ranks know nothing of it: a thread of the flow's process reads the record that they write (`tasks.worker.step_log`)
and looks which steps lie in the store. It sends the newest values only. What the server does not take, or not in time,
neither fails nor delays the training: it is counted, and told in the log at the end.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from contextvars import copy_context
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate
from prefect.logging import get_run_logger
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings
from prefect.utilities.context import get_task_and_flow_run_ids

from ckpt_core.errors import CheckpointError
from ckpt_core.store import local_path, parse_step, step_name
from tasks import cards, events
from tasks.config import Job
from tasks.progress import JobProgress
from tasks.worker.step_log import FILE_NAME, StepReader

LOOK_EVERY_S = 2.0
CURVE_EVERY_S = 15.0
EVENT_EVERY_S = 60.0
REQUEST_S = 5.0
END_S, STOP_S = 8.0, 3.0
"""How long the end of a training waits for what is still to be shown, and how long one that was stopped."""
STOPPED, COMPLETE, EMPTY = "stopped", "complete", "ended without its checkpoint"


@contextmanager
def shown(job: Job, resume_step: int) -> Generator[None]:
    """Show a job while the context lasts; called in its task run.

    Args:
        job: that is to run.
        resume_step: the step that it goes on from.
    """
    view, ended = LiveView(job, resume_step), threading.Event()
    thread = threading.Thread(target=copy_context().run, args=(view.run, ended), name="live view", daemon=True)
    thread.start()
    try:
        yield
        view.end()
    finally:
        ended.set()
        thread.join(STOP_S if view.outcome == STOPPED else END_S)
        if view.missed:
            get_run_logger().warning("the UI missed %d updates of this training; the last: %s", *view.told())


class LiveView:
    """What is shown of one job; `run` is the thread's."""

    def __init__(self, job: Job, resume_step: int) -> None:
        self.outcome = STOPPED
        """What is told of the job once the context has ended."""

        self.missed = 0
        """How often something could not be shown."""

        self._job, self._run = job, local_path(job.store) / job.run
        self._reader, self._seen = StepReader(self._run / FILE_NAME), JobProgress(job, resume_step)
        self._shown_steps = self._committed()
        self._draw_at, self._emit_at = time.monotonic(), time.monotonic() + EVENT_EVERY_S
        self._error: Exception | None = None

    def end(self) -> None:
        """Tell that the ranks have ended well: the job is complete if its last step lies in the store."""
        self.outcome = COMPLETE if (self._run / step_name(self._job.end_step)).is_dir() else EMPTY

    def told(self) -> tuple[int, str]:
        """Return how many updates were missed, and why the last one was."""
        return self.missed, f"{type(self._error).__name__}: {self._error}"

    def run(self, ended: threading.Event) -> None:
        """Look every two seconds until the job has ended, and once more."""
        with self._missing():
            self._seen.begin(self._reader.before())
        impatient = temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0})  # the next look is the next attempt
        with impatient, get_client(sync_client=True, httpx_settings={"timeout": REQUEST_S}) as client:
            board = Board(client)
            self._look(board)
            while not ended.wait(LOOK_EVERY_S):
                self._look(board)
            self._look(board, outcome=self.outcome)

    def _look(self, board: Board, outcome: str = "") -> None:
        with self._missing():
            self._seen.add(self._reader.new())
            if outcome == COMPLETE:  # a trainer of the user's own may have told nothing of it
                self._seen.step = self._job.end_step
            self._tell(board, outcome)

    @contextmanager
    def _missing(self) -> Generator[None]:
        """Count what goes wrong."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - whatever is wrong with the view, the training goes on
            self.missed, self._error = self.missed + 1, error

    def _tell(self, board: Board, outcome: str) -> None:
        job, seen, now = self._job, self._seen, time.monotonic()
        board.put("progress", cards.key("progress", job.run, seen.name), seen.percent, seen.line(outcome))
        self._show_checkpoints(board)
        if outcome or (seen.loss is not None and now >= self._draw_at):
            card = cards.training(job.run, seen, outcome)
            board.put("markdown", card.key, card.text, card.description)
            self._draw_at = now + CURVE_EVERY_S
        if outcome or now >= self._emit_at:
            events.progress(job, seen)
            self._emit_at = now + EVENT_EVERY_S

    def _show_checkpoints(self, board: Board) -> None:
        """Show each step that was committed since, but for the last one, which its task shows."""
        for step in sorted(self._committed() - self._shown_steps):
            self._show_checkpoint(board, step)

    def _show_checkpoint(self, board: Board, step: int) -> None:
        url = (self._run / step_name(step)).as_uri()
        with suppress(CheckpointError):  # it was pruned since
            card = cards.checkpoint(url)
            board.add("markdown", card.key, card.text, card.description)
            events.committed(url, complete=False)
        self._shown_steps.add(step)

    def _committed(self) -> set[int]:
        """Return the steps of this job but the last that lie in the store: one has its name once it is committed."""
        entries = self._run.iterdir() if self._run.is_dir() else []
        steps = {parse_step(entry.name) for entry in entries}
        return {step for step in steps if step is not None and self._job.start_step < step < self._job.end_step}


class Board:
    """Sends the artifacts of the task run that is under way."""

    def __init__(self, client: SyncPrefectClient) -> None:
        self._client = client
        self._known: dict[str, tuple[UUID, object]] = {}
        """Of each key that was put: the artifact, and what it shows."""

    def put(self, kind: str, key: str, data: float | str, description: str) -> None:
        """Show the newest value of a key in the place of the one before; what is shown already is not sent."""
        artifact, shown = self._known.get(key, (None, None))
        if shown == (data, description):
            return
        if artifact is None:
            artifact = self.add(kind, key, data, description)
        else:
            self._client.update_artifact(artifact, ArtifactUpdate(data=data, description=description))
        self._known[key] = artifact, (data, description)

    def add(self, kind: str, key: str, data: float | str, description: str) -> UUID:
        """Show one more artifact of a key; return its id."""
        task_run, flow_run = get_task_and_flow_run_ids()
        new = ArtifactCreate(
            type=kind, key=key, data=data, description=description, task_run_id=task_run, flow_run_id=flow_run
        )
        return self._client.create_artifact(new).id
