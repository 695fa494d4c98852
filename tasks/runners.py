"""Where the files of an export are written: in processes of this machine, or by the workers of a Dask cluster."""

from __future__ import annotations

import multiprocessing
import os
import threading
from typing import Any

from prefect.settings import get_current_settings
from prefect.task_runners import ProcessPoolTaskRunner, TaskRunner

from ckpt_core.errors import ArgumentError
from ckpt_core.workers import count_workers


def task_runner(dask_address: str | None) -> TaskRunner[Any]:
    """Return the task runner that maps files: a Dask cluster's, if its address is given, else processes.

    There are as many processes as Prefect's setting `PREFECT_TASKS_RUNNER_PROCESS_POOL_MAX_WORKERS` says, or this
    process's cores, at most eight.

    Raises:
        ArgumentError: there is an address, but `prefect-dask` is not installed.
    """
    if dask_address is None:
        processes = get_current_settings().tasks.runner.process_pool_max_workers or count_workers()
        return ProcessPoolTaskRunner(max_workers=processes, initializer=end_with_parent)
    try:
        from prefect_dask.task_runners import DaskTaskRunner
    except ImportError as error:
        raise ArgumentError(
            f"export.dask_address is {dask_address}, but prefect-dask is missing: pip install 'ckptflow[dask]'."
        ) from error
    return DaskTaskRunner(address=dask_address)


def end_with_parent() -> None:
    """In a process of the pool: end when its parent does, however it does; else it would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, name="end-with-parent", daemon=True).start()
