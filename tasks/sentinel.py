"""A flow's sentinel: a process beside it that tells the server when the flow's process died without a word.

A worker that is stopped kills its flows at once, and after a worker that is gone nobody tells of an end: the run would
stay Running, and keep its deployment's slot. The sentinel is a shell that waits at a pipe. When the pipe ends before a
line came through it becomes `python -m tasks.sentinel FLOW_RUN RUN_COUNT`. It is in a session of its own, and ignores
the signals that stop flows and machines: what ends it is SIGKILL, or that its work is done.

What dies together with it, with a whole machine, is left to the server, which misses the flow's heartbeats.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from uuid import UUID

from httpx import TransportError
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    TaskRunFilter,
    TaskRunFilterState,
    TaskRunFilterStateType,
)
from prefect.client.schemas.objects import StateType
from prefect.runtime import flow_run
from prefect.settings import get_current_settings
from prefect.states import Crashed

from tasks.cancellation import heeded

MESSAGE = (
    "The flow's process ended without a word: it was killed, or its worker was stopped. Retry the run, and it goes on "
    "from the last committed step."
)
_WAIT = 'trap "" HUP INT TERM; read -r _ && exit; exec "$@"'
_UNFINISHED = [StateType.PENDING, StateType.RUNNING]


@contextmanager
def posted() -> Generator[None]:
    """Have a sentinel beside the flow run that this process is in, and heed what its worker does not hear.

    Neither is needed where the server ends with this process.
    """
    settings = get_current_settings()
    if flow_run.id is None or settings.api.url is None:
        yield
        return
    command = [sys.executable, "-m", "tasks.sentinel", str(flow_run.id), str(flow_run.run_count)]
    sentinel = subprocess.Popen(
        ["sh", "-c", _WAIT, "sh", *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,  # the worker reads this process's output to its end
        stderr=subprocess.DEVNULL,
        env={**os.environ, **settings.to_environment_variables(exclude_unset=True)},
        start_new_session=True,
    )
    try:
        with heeded(UUID(flow_run.id)):
            yield
    finally:
        sentinel.communicate(b"\n")


def tell(flow_run_id: UUID, run_count: int) -> None:
    """Have a flow run, and its tasks, be Crashed, unless that attempt of it is known to have ended in another way.

    A run that is being cancelled is left to its worker, and to the server.
    """
    with get_client(sync_client=True) as client:
        found = client.read_flow_run(flow_run_id)
        if found.run_count != run_count or found.state_type not in {StateType.RUNNING, StateType.CRASHED}:
            return
        if found.state_type == StateType.RUNNING:
            client.set_flow_run_state(flow_run_id, Crashed(message=MESSAGE))
        _end_tasks(client, flow_run_id)


def _end_tasks(client: SyncPrefectClient, flow_run_id: UUID) -> None:
    unfinished = client.read_task_runs(
        flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id])),
        task_run_filter=TaskRunFilter(state=TaskRunFilterState(type=TaskRunFilterStateType(any_=_UNFINISHED))),
    )
    for task_run in unfinished:
        client.set_task_run_state(task_run.id, Crashed(message=MESSAGE), force=True)


def main(arguments: list[str]) -> None:
    """Tell; try for five minutes where the server is away."""
    from tenacity import retry, retry_if_exception_type, stop_after_delay, wait_fixed

    until_told = retry(retry=retry_if_exception_type(TransportError), wait=wait_fixed(2), stop=stop_after_delay(300))
    until_told(tell)(UUID(arguments[0]), int(arguments[1]))


if __name__ == "__main__":
    main(sys.argv[1:])
