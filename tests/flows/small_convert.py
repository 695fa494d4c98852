"""The converting part of a flow alone, with what a test wants to know of it; loads no torch into a runner's worker."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.settings import PREFECT_TASKS_RUNNER_PROCESS_POOL_MAX_WORKERS, temporary_settings

from tasks.config import ExportSettings
from tasks.conversion import convert_checkpoint

SMALL_FILES = 0.02
"""Largest size of a file, in megabytes, that makes half a dozen files of the tiny model."""


def one_process() -> AbstractContextManager[Any]:
    """Have files written by one process, which imports once."""
    return temporary_settings({PREFECT_TASKS_RUNNER_PROCESS_POOL_MAX_WORKERS: 1})


@flow
def converting(checkpoint: str, target: str, export: ExportSettings) -> dict[str, Any]:
    """Convert a checkpoint, sound or not."""
    return convert_checkpoint(checkpoint, "tiny", target, export)


def weights(directory: Path) -> list[Path]:
    """Return the files of weights in a directory."""
    return sorted(directory.glob("*.safetensors"))


def identities(files: list[Path]) -> dict[str, tuple[int, int]]:
    """Return the inode of each file, and when it was last written, by its name."""
    return {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in files}


def task_names(flow_run_id: Any) -> dict[str, str]:
    """Return the state's name of each task run of a flow run, by the task run's name."""
    with get_client(sync_client=True) as client:
        runs = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id])))
    return {run.name: run.state_name or "" for run in runs}
