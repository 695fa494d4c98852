"""A flow's sentinel: it tells the server of an end that nobody else tells of, and of nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect import flow, task
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun, State, TaskRun
from prefect.states import Cancelling, Completed, Crashed, Running

from tasks import reaper, sentinel

pytestmark = pytest.mark.usefixtures("prefect_home")


@flow
def work() -> int:
    """Do nothing; return how many processes are beside this one meanwhile."""
    with sentinel.posted():
        return len(reaper.descendants())


@task
def step() -> None:
    """Do nothing."""


@pytest.fixture
def client(prefect_home: Path) -> Iterator[SyncPrefectClient]:
    """The server."""
    with get_client(sync_client=True) as client:
        yield client


def running(client: SyncPrefectClient) -> tuple[FlowRun, TaskRun]:
    """Return a flow run and a task run of it, both of which the server takes for running."""
    flow_run = client.create_flow_run(work)
    client.set_flow_run_state(flow_run.id, Running(), force=True)
    task_run = client.create_task_run(step, flow_run.id, dynamic_key="0", state=Running())
    return client.read_flow_run(flow_run.id), task_run


def test_a_flow_that_died_is_crashed(client: SyncPrefectClient):
    """Its state and its task's say so, and what to do."""
    flow_run, task_run = running(client)
    sentinel.tell(flow_run.id, flow_run.run_count)
    state = client.read_flow_run(flow_run.id).state
    assert state is not None
    assert state.is_crashed()
    assert "Retry the run" in str(state.message)
    assert client.read_task_run(task_run.id).state_name == "Crashed"


def test_where_the_worker_has_told_it_the_task_is_crashed_too(client: SyncPrefectClient):
    """A worker that sees its flow die tells of the flow only; what it said stays."""
    flow_run, task_run = running(client)
    client.set_flow_run_state(flow_run.id, Crashed(message="Process exited with status code: -9."))
    sentinel.tell(flow_run.id, flow_run.run_count)
    state = client.read_flow_run(flow_run.id).state
    assert state is not None
    assert state.message == "Process exited with status code: -9."
    assert client.read_task_run(task_run.id).state_name == "Crashed"


@pytest.mark.parametrize("told", [Completed(), Cancelling()], ids=["ended", "being cancelled"])
def test_another_end_is_left_as_it_is(client: SyncPrefectClient, told: State):
    """A flow run that ended well, or is being cancelled, keeps its state."""
    flow_run, _ = running(client)
    client.set_flow_run_state(flow_run.id, told, force=True)
    sentinel.tell(flow_run.id, flow_run.run_count)
    assert client.read_flow_run(flow_run.id).state_name == told.name


def test_a_later_attempt_is_left_alone(client: SyncPrefectClient):
    """A run that was retried meanwhile runs on."""
    flow_run, _ = running(client)
    sentinel.tell(flow_run.id, flow_run.run_count - 1)
    assert client.read_flow_run(flow_run.id).state_name == "Running"


def test_it_ends_with_the_flow():
    """While the flow works its sentinel is beside it, and afterwards it is not."""
    before = len(reaper.descendants())
    assert work() == before + 1
    assert len(reaper.descendants()) == before


def test_without_a_run_there_is_none():
    """Nothing is posted where no flow runs."""
    before = reaper.descendants()
    with sentinel.posted():
        assert reaper.descendants() == before
