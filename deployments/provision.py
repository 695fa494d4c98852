"""What a server must have before the flows are deployed: made if it is not there, updated in place if it differs."""

from __future__ import annotations

from typing import Any

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.events.schemas.automations import AutomationCore
from prefect.exceptions import ObjectAlreadyExists
from prefect.workers.process import ProcessWorker

POOLS = {
    "gpu": "Training; runs take the GPUs that they train on from the concurrency limit `gpu`.",
    "cpu": "Conversion, publication, roll back and maintenance.",
}
BACKGROUND = "background"
"""The queue of the pool `cpu` for what nobody waits for: one at a time, after what people started."""


def provision(client: SyncPrefectClient, gpus: int, automations: list[AutomationCore]) -> None:
    """Make work pools, a work queue, the limit of GPUs and automations; what is there and right is left alone.

    A pool that is there stays as it is, and an automation that a person has turned off stays off.
    """
    for name, description in POOLS.items():
        _make_pool(client, name, description)
    _make_queue(client)
    client.upsert_global_concurrency_limit_by_name("gpu", gpus)
    for automation in automations:
        _make_automation(client, automation)


def _make_pool(client: SyncPrefectClient, name: str, description: str) -> None:
    template = ProcessWorker.get_default_base_job_template()
    pool = WorkPoolCreate(name=name, type="process", description=description, base_job_template=template)
    try:
        client.create_work_pool(pool)
    except ObjectAlreadyExists:
        return


def _make_queue(client: SyncPrefectClient) -> None:
    try:
        client.create_work_queue(BACKGROUND, concurrency_limit=1, priority=2, work_pool_name="cpu")
    except ObjectAlreadyExists:
        return


def _make_automation(client: SyncPrefectClient, wanted: AutomationCore) -> None:
    """Make an automation; one that is there is updated only if it differs, as an update forgets what it waits for."""
    found = client.read_automations_by_name(wanted.name)
    if not found:
        client.create_automation(wanted)
    elif facts(found[0]) != facts(wanted):
        client.update_automation(found[0].id, wanted.model_copy(update={"enabled": found[0].enabled}))


def facts(automation: AutomationCore) -> dict[str, Any]:
    """Return what an automation does, without the names that the server gives to its parts; equal if that is equal."""
    found = automation.model_dump(mode="json", include={"description", "trigger", "actions"})
    for name in ("after", "expect", "for_each"):
        # Prefect keeps these as sets, whose order is another one in each process. An automation that is updated for
        # that alone forgets the runs that it waits for, and one that was killed stays Running for ever.
        found["trigger"][name] = sorted(found["trigger"][name])
    return found
