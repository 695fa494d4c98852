"""What is seen of a training while it runs: how far it is, what its record says, and that showing it delays nothing."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
import torch

from ckpt_core import PyTorchCheckpoint
from ckpt_core.store import step_name
from tasks import events, live_view
from tasks.config import ComputeSettings, Job, ModelSettings, TrainingStep
from tasks.progress import JobProgress
from tasks.worker.step_log import FILE_NAME, StepReader, save_times


def job(store: Path, *, start_step: int = 100, end_step: int = 200) -> Job:
    """Return a job of the run `tiny`."""
    return Job(
        store=str(store),
        run="tiny",
        start_step=start_step,
        end_step=end_step,
        seed=0,
        model=ModelSettings(),
        step=TrainingStep(name="Warm_up", steps=end_step - start_step),
        compute=ComputeSettings(),
        tokenizer="/tokenizer",
        train_tokens="/train",
        heldout_tokens="/heldout",
    )


def lines(first: int, last: int) -> list[dict[str, Any]]:
    """Return the lines of steps, each of 2,000 tokens in half a second."""
    return [{"step": s, "loss": 8 - s / 100, "tokens": 2000, "seconds": 0.5} for s in range(first, last + 1)]


class Clock:
    """A clock that moves when it is told to."""

    now = 0.0

    def __call__(self) -> float:
        """Return the seconds."""
        return self.now


def append(path: Path, *entries: dict[str, Any], end: str = "\n") -> None:
    """Append lines to a record."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write("\n".join(json.dumps(entry) for entry in entries) + end)


def test_a_line_tells_step_loss_speed_and_time_left(tmp_path: Path):
    """The speed is that of the record, the time left goes by the clock; both come once they are known."""
    clock = Clock()
    seen = JobProgress(job(tmp_path), 100, clock=clock)
    assert (seen.line(), seen.percent) == ("step 100 of 200, the ranks are starting", 0)
    seen.add(lines(101, 110))
    assert seen.line() == "step 110 of 200, loss 6.900, 4.0k tokens/s"
    clock.now = 5
    seen.add(lines(111, 120))
    assert (seen.line(), seen.percent) == ("step 120 of 200, loss 6.800, 4.0k tokens/s, 40 s left", 20)
    seen.add(lines(121, 200))
    assert seen.line("complete") == "step 200 of 200, loss 6.000, 4.0k tokens/s, complete"
    assert seen.percent == 100


@pytest.mark.parametrize(("pace", "told"), [(1, "80 s left"), (30, "40 min left"), (1000, "22 h 13 min left")])
def test_time_left_is_told_in_a_unit_that_suits_it(tmp_path: Path, pace: int, told: str):
    """Seconds, then minutes, then hours."""
    clock = Clock()
    seen = JobProgress(job(tmp_path), 100, clock=clock)
    for step in range(110, 121):
        seen.add([{"step": step, "loss": 1.0}])
        clock.now += pace
    assert seen.line() == f"step 120 of 200, loss 1.000, {told}"


def test_step_and_loss_are_enough(tmp_path: Path):
    """A trainer of the user's own may leave out the rest, and have lines that are none of a step of this job."""
    seen = JobProgress(job(tmp_path), 100)
    foreign = [{"step": 3, "loss": 9.0}, {"step": 150, "blocked_s": 0.1}, {"step": "x", "loss": 1}, {"note": "hello"}]
    seen.add([{"step": 101, "loss": 2}, *foreign])
    assert seen.line() == "step 101 of 200, loss 2.000"


def test_what_an_earlier_attempt_told_beyond_its_checkpoint_is_not_shown(tmp_path: Path):
    """The job goes on from step 110, though the record it finds ends at 130."""
    seen = JobProgress(job(tmp_path), 110)
    seen.begin([{"step": "none"}, *lines(90, 130)])
    assert seen.line() == "step 110 of 200, loss 6.900, 4.0k tokens/s"
    assert seen.train.points[0][0] == 101


def test_a_step_that_is_told_again_drops_what_followed(tmp_path: Path):
    """Ranks that started again from step 104 take the curve back to there."""
    seen = JobProgress(job(tmp_path), 100)
    seen.add([*lines(101, 120), {"step": 121, "loss": 1.0, "heldout_loss": 3.0}])
    seen.add(lines(105, 106))
    assert (seen.step, [step for step, _ in seen.train.points]) == (106, [101, 102, 103, 104, 105, 106])
    assert seen.heldout.points == []


def test_a_reader_takes_only_what_is_new_and_whole(tmp_path: Path):
    """A line that is half written waits for its end; no file is no line; what is no JSON object is left out."""
    path = tmp_path / "run" / FILE_NAME
    reader = StepReader(path)
    assert reader.new() == []
    append(path, {"step": 1})
    append(path, {"step": 2}, end="")
    assert reader.new() == [{"step": 1}]
    with path.open("a") as file:
        file.write('\n["no object"]\nno json\n')
    assert reader.new() == [{"step": 2}]
    assert reader.new() == []


def test_a_reader_tells_what_was_there_before_it(tmp_path: Path):
    """What was added since it was made is new, however late the first look; a replaced record is all new."""
    path = tmp_path / FILE_NAME
    append(path, {"step": 1})
    reader, late = StepReader(path), StepReader(path)
    append(path, {"step": 2})
    assert (reader.before(), reader.new()) == ([{"step": 1}], [{"step": 2}])
    append(tmp_path / "new", {"step": 3})
    (tmp_path / "new").replace(path)
    assert (late.before(), late.new()) == ([], [{"step": 3}])


def test_a_reader_begins_anew_with_a_record_that_was_replaced(tmp_path: Path):
    """Ranks that start again replace the file, and may leave it longer than what was read."""
    path = tmp_path / FILE_NAME
    append(path, {"step": 1}, {"step": 2})
    reader = StepReader(path)
    assert len(reader.new()) == 2
    append(tmp_path / "new", {"step": 1}, {"step": 2}, {"step": 3})
    (tmp_path / "new").replace(path)
    assert [entry["step"] for entry in reader.new()] == [1, 2, 3]


def test_the_times_of_a_save_are_read_from_the_record(tmp_path: Path):
    """They are those of the step, and None where nothing tells them."""
    path = tmp_path / FILE_NAME
    assert save_times(path, 4) is None
    append(path, {"step": 4, "loss": 1.0}, {"step": 4, "waited_s": 0.5, "blocked_s": 0.25}, {"step": 8, "blocked_s": 1})
    assert save_times(path, 4) == {"waited_s": 0.5, "blocked_s": 0.25}
    assert save_times(path, 8) == {"blocked_s": 1}
    assert save_times(path, 12) is None


class Server:
    """Takes the place of a client of the Prefect server: keeps what it is sent, or does what it is told to."""

    def __init__(self, answer: Callable[[], None] = lambda: None) -> None:
        self.answer = answer
        self.created: list[Any] = []
        self.updated: list[tuple[UUID, Any]] = []
        self._keys: dict[UUID, str] = {}

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def create_artifact(self, artifact: Any) -> SimpleNamespace:
        """Keep a new artifact."""
        self.answer()
        self.created.append(artifact)
        made = uuid4()
        self._keys[made] = artifact.key
        return SimpleNamespace(id=made)

    def update_artifact(self, artifact_id: UUID, artifact: Any) -> None:
        """Keep a change."""
        self.answer()
        self.updated.append((artifact_id, artifact))

    def changes(self, kind: str) -> list[Any]:
        """Return the changes of a kind of artifact."""
        return [change for artifact, change in self.updated if self._keys[artifact].startswith(kind)]


@pytest.fixture
def view(monkeypatch: pytest.MonkeyPatch):
    """Return a function that shows a job to a server, in looks a tenth of a second apart, and catch its events."""
    monkeypatch.setattr(live_view, "LOOK_EVERY_S", 0.1)
    monkeypatch.setattr(live_view, "get_run_logger", lambda: logging.getLogger("run"))
    told: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(events, "emit_event", lambda event, payload, **rest: told.append((event, payload)))

    def show(shown: Job, server: Server, *, resume_step: int = 100) -> AbstractContextManager[None]:
        monkeypatch.setattr(live_view, "get_client", lambda **settings: server)
        return live_view.shown(shown, resume_step)

    show.events = told
    return show


def until(reached: Callable[[], bool]) -> None:
    """Wait for what the thread does."""
    end = time.monotonic() + 60
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_one_progress_artifact_is_updated_when_something_is_new(tmp_path: Path, view: Any):
    """It is created once and then changed, named by run and step, and nothing is sent while nothing moves."""
    server, record = Server(), tmp_path / "tiny" / FILE_NAME
    with view(job(tmp_path), server):
        until(lambda: len(server.created) == 1)
        time.sleep(0.5)
        assert server.updated == []
        append(record, *lines(101, 150))
        until(lambda: len(server.created) == 2)
        append(record, *lines(151, 200))
        (tmp_path / "tiny" / step_name(200)).mkdir()
    progress, curve = server.created
    assert (progress.type, progress.key, progress.data) == ("progress", "progress-tiny-warm-up", 0)
    changes = [(change.data, change.description.split(", ")) for change in server.changes("progress")]
    assert changes[0] == (50, ["step 150 of 200", "loss 6.500", "4.0k tokens/s"])
    assert changes[-1] == (100, ["step 200 of 200", "loss 6.000", "4.0k tokens/s", "complete"])
    assert len(changes) <= 3
    assert (curve.type, curve.key) == ("markdown", "training-tiny-warm-up")
    assert "![loss curve](data:image/svg+xml;base64," in curve.data
    [last] = server.changes("training")
    assert last.data != curve.data


def test_a_training_that_fails_is_shown_as_stopped(tmp_path: Path, view: Any):
    """The last line of the progress says so, and the error passes."""
    server = Server()
    append(tmp_path / "tiny" / FILE_NAME, *lines(101, 120))

    def fail() -> None:
        with view(job(tmp_path), server, resume_step=120):
            raise RuntimeError("a rank failed")

    with pytest.raises(RuntimeError, match="a rank failed"):
        fail()
    assert server.changes("progress")[-1].description == "step 120 of 200, loss 6.800, 4.0k tokens/s, stopped"


@pytest.mark.parametrize(
    ("committed", "shown"),
    [(True, (100, "step 200 of 200, complete")), (False, (0, "step 100 of 200, ended without its checkpoint"))],
)
def test_a_trainer_that_tells_nothing_is_shown_by_what_it_committed(
    tmp_path: Path, view: Any, committed: bool, shown: tuple[float, str]
):
    """It is complete once its last step lies in the store, and not because it ended."""
    server = Server()
    with view(job(tmp_path), server):
        until(lambda: len(server.created) == 1)
        if committed:
            (tmp_path / "tiny" / step_name(200)).mkdir(parents=True)
    [last] = server.changes("progress")
    assert (last.data, last.description) == shown


def test_each_checkpoint_in_the_middle_is_shown_once(tmp_path: Path, view: Any):
    """A card and an event for each step that was committed meanwhile, but for earlier ones and the last."""
    module = torch.nn.Linear(2, 2)

    def commit(*steps: int) -> None:
        for step in steps:
            PyTorchCheckpoint(module).save(tmp_path, run="tiny", step=step)

    commit(100, 110)
    server = Server()
    with view(job(tmp_path), server, resume_step=110):
        until(lambda: len(server.created) == 1)
        commit(120, 130)
        until(lambda: len(server.created) == 3)
        commit(140, 200)
    shown = [artifact for artifact in server.created if artifact.key == "checkpoint-tiny"]
    assert [artifact.description.partition(",")[0] for artifact in shown] == ["step 120", "step 130", "step 140"]
    committed = [payload for event, payload in view.events if event == "ckpt.checkpoint.committed"]
    assert [payload["step"] for payload in committed] == [120, 130, 140]
    assert committed[0]["url"] == (tmp_path / "tiny" / step_name(120)).as_uri()
    assert not any(payload["complete"] for payload in committed)


def test_the_end_is_told_as_an_event(tmp_path: Path, view: Any):
    """One event of progress comes at the end of a short training, with the run's URL, step, loss and speed."""
    with view(job(tmp_path), Server()):
        append(tmp_path / "tiny" / FILE_NAME, *lines(101, 200))
    [(event, payload)] = view.events
    assert event == "ckpt.training.progress"
    assert payload["url"] == (tmp_path / "tiny").as_uri()
    assert (payload["step"], payload["end_step"], payload["percent"], payload["loss"]) == (200, 200, 100, 6)
    assert payload["tokens_per_second"] == 4000


def test_a_server_that_is_gone_is_counted_and_told_once(tmp_path: Path, view: Any, caplog: pytest.LogCaptureFixture):
    """Each look that failed counts; one warning says how many and why; what is missing comes when the server does."""
    refused: list[float] = []

    def gone() -> None:
        refused.append(time.monotonic())
        raise httpx.ConnectError("connection refused")

    server = Server(gone)
    PyTorchCheckpoint(torch.nn.Linear(2, 2)).save(tmp_path, run="tiny", step=100)
    with view(job(tmp_path), server):
        PyTorchCheckpoint(torch.nn.Linear(2, 2)).save(tmp_path, run="tiny", step=120)
        until(lambda: len(refused) >= 2)
        server.answer = lambda: None
        until(lambda: len(server.created) == 2)
    assert {artifact.key for artifact in server.created} >= {"progress-tiny-warm-up", "checkpoint-tiny"}
    [warning] = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    told = f"the UI missed {len(refused)} updates of this training; the last: ConnectError: connection refused"
    assert warning == told


def test_a_server_that_hangs_delays_the_end_by_a_bounded_time(
    tmp_path: Path, view: Any, monkeypatch: pytest.MonkeyPatch
):
    """The training ends within the time that is given to what is still to be shown."""
    monkeypatch.setattr(live_view, "END_S", 0.3)
    release = threading.Event()
    began = time.monotonic()
    with view(job(tmp_path), Server(lambda: release.wait(20) and None)):
        pass
    assert time.monotonic() - began < 2
    release.set()


def test_a_look_costs_the_training_nothing_and_itself_little(tmp_path: Path):
    """Reading a hundred new steps of a record of 10,000 takes less than 20 ms: it does not read the rest again."""
    path = tmp_path / FILE_NAME
    append(path, *lines(1, 10_000))
    reader, seen = StepReader(path), JobProgress(job(tmp_path, start_step=0, end_step=20_000), 0)
    seen.add(reader.new())
    took = []
    for first in range(10_001, 11_001, 100):
        append(path, *lines(first, first + 99))
        began = time.perf_counter()
        seen.add(reader.new())
        assert seen.line().startswith(f"step {first + 99} of 20000")
        took.append(time.perf_counter() - began)
    assert sorted(took)[len(took) // 2] < 0.02
