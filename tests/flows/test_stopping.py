"""A retrain is stopped in every way there is, with a real server and real workers, and goes on each time.

One story of two runs: `calm` trains undisturbed; `rough` has the same settings, and is stopped again and again.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from live_stack import signal_all, wait_until
from small_retrain import file_digests
from stopping_story import GRACE_S, SLOW_S, STEPS, Attempt, Stop, Story, told

from ckpt_core.store import step_name

pytestmark = [pytest.mark.timeout(900), pytest.mark.long]
AWAY_S = 3.0
SOON_S = 90.0  # on a busy machine

ENDS = {
    "cancelled": "Cancelled",
    "killed": "Crashed",
    "without_a_rank": "Failed",
    "worker_stopped": "Crashed",
    "preempted": "Crashed",
    "without_a_worker": "Crashed",
    "completed": "Completed",
}
"""The fixtures below, each of which follows the one before it, and the states that they end in."""


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    """A server and a worker."""
    with told(tmp_path_factory.mktemp("stopping"), keep_checkpoints=100) as story:  # none goes: they are looked at
        yield story


@pytest.fixture(scope="module")
def cancelled(story: Story) -> Attempt:
    """The calm run is cancelled, by the command, when its training is done."""
    run = story.submit("calm")
    wait_until(lambda: STEPS in story.committed("calm"), seconds=240, told=story.log)
    stop = Stop.now(story, "calm", run)
    story.stack.prefect("flow-run", "cancel", run)
    return stop.watched({})


@dataclass(frozen=True)
class Outage:
    """The server was away while ranks trained."""

    flow_run: str
    steps: tuple[int, int]
    """The newest one before, and after."""


@pytest.fixture(scope="module")
def outage(story: Story, cancelled: Attempt) -> Outage:
    """The server is stopped, and started again, while the rough run trains."""
    story.stack.slow.write_text(str(SLOW_S))
    run = story.submit("rough")
    story.meet_training("rough")
    before = story.step("rough")
    story.stack.server_away(AWAY_S)
    return Outage(run, (before, story.step("rough")))


@pytest.fixture(scope="module")
def killed(story: Story, outage: Outage) -> Attempt:
    """Then the flow's process is killed; the new server still knows the slot that it has taken."""
    story.stack.renew_slot(outage.flow_run)
    stop = Stop.now(story, "rough", outage.flow_run)
    signal_all(story.stack.flow_process(outage.flow_run), signal.SIGKILL)
    return stop.watched({})


@pytest.fixture(scope="module")
def without_a_rank(story: Story, killed: Attempt) -> Attempt:
    """The next attempt loses one of its ranks."""
    run = story.submit("rough")
    story.meet_training("rough")
    stop = Stop.now(story, "rough", run)
    signal_all(story.stack.ranks(run)[1:], signal.SIGKILL)
    return stop.watched(killed.after)


@pytest.fixture(scope="module")
def worker_stopped(story: Story, without_a_rank: Attempt) -> Attempt:
    """The next attempt is a retry, and its worker is sent SIGTERM."""
    run = story.stack.retry(without_a_rank.flow_run)
    story.meet_training("rough")
    stop = Stop.now(story, "rough", run)
    story.stack.worker.terminate()
    return stop.watched(without_a_rank.after)


@pytest.fixture(scope="module")
def preempted(story: Story, worker_stopped: Attempt) -> Attempt:
    """The next attempt's machine goes away: SIGTERM to all, and after 30 s SIGKILL to what is left."""
    story.stack.start_worker()
    run = story.stack.retry(worker_stopped.flow_run)
    story.meet_training("rough")
    stop = Stop.now(story, "rough", run)
    signal_all(story.stack.machine(), signal.SIGTERM)
    while story.stack.machine() and time.monotonic() < stop.at + 1.5 * GRACE_S:
        time.sleep(0.1)
    signal_all(story.stack.machine(), signal.SIGKILL)
    return stop.watched(worker_stopped.after)


@pytest.fixture(scope="module")
def without_a_worker(story: Story, preempted: Attempt) -> Attempt:
    """The next attempt's worker is killed: the flow cannot print any more, and ends."""
    story.stack.start_worker()
    run = story.stack.retry(preempted.flow_run)
    story.meet_training("rough")
    stop = Stop.now(story, "rough", run)
    story.stack.worker.kill()
    return stop.watched(preempted.after)


@pytest.fixture(scope="module")
def completed(story: Story, without_a_worker: Attempt) -> Attempt:
    """The last attempt has no disturbance."""
    story.stack.start_worker()
    story.stack.slow.unlink()
    stop = Stop.now(story, "rough", story.stack.retry(without_a_worker.flow_run))
    wait_until(lambda: story.stack.has_ended(stop.flow_run), seconds=300, told=story.log)
    return stop.watched(without_a_worker.after)


@pytest.fixture
def attempt(request: pytest.FixtureRequest) -> Attempt:
    """The attempt of that name."""
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize(("attempt", "state"), ENDS.items(), indirect=["attempt"])
def test_what_the_server_says_is_true(attempt: Attempt, state: str):
    """However an attempt ends, the state of the flow run tells."""
    assert attempt.ending.state == state


@pytest.mark.parametrize("attempt", list(ENDS)[:-1], indirect=True)
def test_after_a_stop_nothing_is_left_soon(attempt: Attempt):
    """No task is said to be running, no slot is taken, no process of it is there, and nobody holds the run's lock."""
    ending = attempt.ending
    assert max(ending.told_s, ending.tasks_s, ending.free_s, ending.gone_s) < SOON_S
    assert attempt.is_free


@pytest.mark.parametrize("attempt", ["killed", "worker_stopped", "preempted", "without_a_worker"], indirect=True)
def test_a_stop_costs_no_step(attempt: Attempt):
    """Whoever else dies, the ranks commit the step that they are at before they leave."""
    assert max(attempt.after) >= attempt.step


@pytest.mark.parametrize("attempt", ["worker_stopped", "preempted", "without_a_worker", "completed"], indirect=True)
def test_a_rerun_goes_on_from_what_is_committed(attempt: Attempt):
    """Its first checkpoint is made from the newest one that was there; those that were there are untouched."""
    assert attempt.parent == max(attempt.before)
    assert all(attempt.before.get(step, digest) == digest for step, digest in attempt.after.items())


def test_a_lost_rank_leaves_what_was_committed(without_a_rank: Attempt):
    """The attempt fails and says which rank; what was committed is as it was."""
    assert "rank 1 of 2 was ended by SIGKILL" in without_a_rank.ending.message
    assert without_a_rank.before.items() <= without_a_rank.after.items()  # a step may have been committed right then


def test_training_goes_on_without_a_server(outage: Outage):
    """While the server is away the ranks take their steps."""
    before, after = outage.steps
    assert after - before > AWAY_S / SLOW_S / 2


def test_the_weights_are_those_of_an_undisturbed_run(story: Story, completed: Attempt):
    """After six stops the last step's files of model, optimizer and trainer are those of the calm run, bit for bit."""
    for component in ("model", "optimizer", "trainer"):
        calm, rough = (file_digests(story.store / run / step_name(STEPS) / component) for run in ("calm", "rough"))
        for digests in (calm, rough):
            digests.pop(".metadata", None)  # a pickle, which depends on which strings are one object; its twin is JSON
        assert calm == rough != {}


def test_nothing_half_written_is_left(story: Story, completed: Attempt):
    """The last attempt has removed what was being written when others were killed."""
    assert story.staged("rough") == []
