"""A cancellation that no worker carries out: the flow does so itself.

A worker hears of cancellations no more once the server was away for half a minute, and one that is gone hears of
nothing. Their flows would go on, and the server would call them Cancelled all the same, after five minutes.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Generator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from threading import Event, Thread, current_thread, main_thread
from uuid import UUID

from httpx import HTTPError
from prefect.client.orchestration import get_client
from prefect.exceptions import Abort, TerminationSignal
from prefect.states import Cancelled

LOOK_S = 30.0
"""How often the server is asked."""
LEFT_S = 45.0
"""For how long it is left to the worker, which kills after 30 s."""


@contextmanager
def heeded(flow_run_id: UUID) -> Generator[None]:
    """End what is done within when the flow run has been Cancelling for so long that nobody else will end it.

    Raises:
        Abort: that was done; the flow run is Cancelled.
    """
    if current_thread() is not main_thread():  # a signal would not reach it
        yield
        return
    over, found = Event(), Event()
    Thread(target=_look, args=(flow_run_id, over, found), name="cancellation", daemon=True).start()
    try:
        yield
    except TerminationSignal:
        if not found.is_set():
            raise
        with get_client(sync_client=True) as client:
            client.set_flow_run_state(flow_run_id, Cancelled(message="Ended by itself: no worker did."), force=True)
        raise Abort("The flow run was cancelled.") from None
    finally:
        over.set()


def _look(flow_run_id: UUID, over: Event, found: Event) -> None:
    while not over.wait(LOOK_S):
        with suppress(HTTPError), get_client(sync_client=True) as client:  # an error: the server is away
            state = client.read_flow_run(flow_run_id).state
            if state and state.is_cancelling() and datetime.now(UTC) - state.timestamp > timedelta(seconds=LEFT_S):
                found.set()
                os.kill(os.getpid(), signal.SIGTERM)  # as the worker would
                return
