"""Who may use the GPUs: slots of a Prefect global concurrency limit, held while ranks train."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID

from prefect import get_client
from prefect.client.schemas.objects import ConcurrencyLeaseHolder
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectNotFound
from prefect.logging import get_run_logger
from prefect.runtime import task_run

from ckpt_core.errors import ArgumentError
from tasks.config import ComputeSettings

GPUS = Path("/proc/driver/nvidia/gpus")


@contextmanager
def gpu_slots(compute: ComputeSettings) -> Generator[None]:
    """Hold a slot for each rank on a GPU, once they are free; none on a CPU, or where no limit is named.

    A holder that is killed keeps its slots until their lease ends, after 300 s at most. One that cannot renew its
    lease, because the server is away, trains on.

    Raises:
        ArgumentError: there is no such limit, or it has fewer slots than that.
    """
    name, slots = compute.gpu_slots, compute.nodes * compute.ranks
    if name is None or not _on_gpus(compute):
        yield
        return
    _check_limit(name, slots)
    get_run_logger().info("waiting for %d slots of the concurrency limit %s", slots, name)
    holder = ConcurrencyLeaseHolder(type="task_run", id=UUID(str(task_run.id)))
    with concurrency(name, occupy=slots, strict=True, holder=holder, raise_on_lease_renewal_failure=False):
        get_run_logger().info("holding %d slots of the concurrency limit %s", slots, name)
        yield


def _on_gpus(compute: ComputeSettings) -> bool:
    """Return whether ranks take GPUs: this process must not import torch to know."""
    return compute.device == "cuda" or (compute.device == "auto" and GPUS.exists())


def _check_limit(name: str, slots: int) -> None:
    """Tell now what would wait for ever."""
    try:
        with get_client(sync_client=True) as client:
            limit = client.read_global_concurrency_limit_by_name(name)
    except ObjectNotFound:
        raise ArgumentError(
            f"compute.gpu_slots is {name!r}, but there is no such global concurrency limit; make it, with a slot for "
            f"each GPU, by `prefect gcl create {name} --limit {slots}`, or leave gpu_slots empty"
        ) from None
    if limit.limit < slots:
        raise ArgumentError(
            f"training takes {slots} slots of the global concurrency limit {name!r}, which has {limit.limit}: it would "
            f"wait for ever; lower compute.ranks, or raise the limit by `prefect gcl update {name} --limit {slots}`"
        )
