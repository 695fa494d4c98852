"""A cancellation that no worker carries out: the flow ends by itself, and the server says what is true."""

from __future__ import annotations

import time
from uuid import UUID

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.exceptions import Abort
from prefect.runtime import flow_run
from prefect.states import Cancelling

from tasks import cancellation, sentinel

pytestmark = pytest.mark.usefixtures("prefect_home")


@flow
def work(told: list[str]) -> None:
    """Tell this run's id, have it cancelled, and work on."""
    with get_client(sync_client=True) as client, sentinel.posted():
        told.append(str(flow_run.id))
        client.set_flow_run_state(UUID(str(flow_run.id)), Cancelling(), force=True)
        time.sleep(60)
        told.append("done")


def test_a_flow_heeds_a_cancellation_that_nobody_carries_out(monkeypatch: pytest.MonkeyPatch):
    """What it does ends, and its state is Cancelled."""
    monkeypatch.setattr(cancellation, "LOOK_S", 0.1)
    monkeypatch.setattr(cancellation, "LEFT_S", 0.2)
    told: list[str] = []
    with pytest.raises(Abort, match="was cancelled"):
        work.with_options(validate_parameters=False)(told)
    [run] = told
    with get_client(sync_client=True) as client:
        assert client.read_flow_run(UUID(run)).state_name == "Cancelled"
