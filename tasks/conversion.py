"""The tasks that make a Hugging Face directory of a checkpoint: planned in a child process, written file by file."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path
from typing import Any

from prefect import task, unmapped
from prefect.futures import as_completed
from prefect.task_runners import TaskRunner

from ckpt_core import open_checkpoint
from ckpt_core.errors import ArgumentError, CkptError, CommitError
from ckpt_core.urls import place_of
from tasks import artifacts
from tasks.caching import ByContent, export_identity
from tasks.config import ExportSettings
from tasks.launch import run_job
from tasks.process import ChildFailedError
from tasks.results import ReferenceSerializer
from tasks.runners import task_runner


def convert_checkpoint(
    url: str,
    run: str,
    target: str,
    settings: ExportSettings,
    *,
    allow_nonfinite: bool = False,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Convert a checkpoint to sharded safetensors at `target`, a path or URL; one made before, alike, stays.

    Several files are mapped on a task runner, `tasks.runners.task_runner`; a single one is written by the child
    process that plans it. A conversion that was stopped goes on with the files that it had not finished.

    Returns:
        `path`, `files` (bytes and sha256 of each), `rules` and `architecture`.

    Raises:
        DamagedError, ExportError: a file could not be made; nothing is left of the conversion.
        ArgumentError: the settings do not fit the machines.
        ChildFailedError: the plan failed, or a process died.
    """
    request = {
        "run": run,
        "url": url,
        "target": target,
        "dtype": settings.dtype,
        "max_shard_bytes": int(settings.max_shard_megabytes * 1_000_000),
        "allow_nonfinite": allow_nonfinite,
        "merge_adapter": settings.merge_adapter,
        "trust_remote_code": trust_remote_code,
    }
    runner = task_runner(settings.dask_address)
    with open_checkpoint(url).lease():
        begun = begin(request)
        if begun["export"] is None:
            _write_all(runner, begun["target"], begun["undone"])
            begun = finish(request)
    export = begun["export"]
    artifacts.export_card(run, export)
    return export


def _what_decides(request: dict[str, Any]) -> dict[str, Any]:
    settings = {name: value for name, value in request.items() if name not in {"run", "url"}}
    target = str(place_of(request["target"]))
    return {**settings, "target": target, "checkpoint": open_checkpoint(request["url"]).manifest.digest()}


def _holds(begun: dict[str, Any]) -> bool:
    """Whether the export that a conversion ended with is still there; one that was only begun is gone on with."""
    export = begun["export"]
    return export is not None and export_identity(export["path"])["made"] == export["files"]


_conversions = ByContent(name="conversion", content=_what_decides, holds=_holds)
"""Shared by `begin` and `finish`, so that a later `begin` finds the export that `finish` made."""


@task(task_run_name="convert {request[run]}", cache_policy=_conversions, result_serializer=ReferenceSerializer())
def begin(request: dict[str, Any]) -> dict[str, Any]:
    """Plan a conversion, and do it unless there are several files to write; see `tasks.jobs.convert`."""
    return run_job("convert", request)


@task(task_run_name="write {name}", persist_result=False)
def write_file(target: str, name: str) -> None:
    """Write one file of a conversion that was begun, in any process that reaches its target.

    Raises:
        ArgumentError: this process is on another file system.
    """
    from ckpt_core.export import convert_shard

    place = place_of(target)
    if isinstance(place, Path) and not place.parent.is_dir():
        raise ArgumentError(
            f"{place.parent}: not on {socket.gethostname()}, which is to write {name}; mount it there at "
            "the same path, or leave export.dask_address empty."
        )
    convert_shard(place, name)


@task(
    task_run_name="finish export of {request[run]}", cache_policy=_conversions, result_serializer=ReferenceSerializer()
)
def finish(request: dict[str, Any]) -> dict[str, Any]:
    """Give an export whose files are all written its name; return what `begin` does for one that is made."""
    export = run_job("finish_conversion", request)
    return {"target": request["target"], "undone": [], "export": export, "reused": False}


def _write_all(runner: TaskRunner[Any], target: str, names: Sequence[str]) -> None:
    """Map the files on a task runner, until one fails; the runner then drops those that it has not begun."""
    try:
        with runner:
            parameters = {"target": unmapped(target), "name": names}
            mapped = runner.map(write_file, parameters)  # pyright: ignore[reportArgumentType] - "Task" is invariant
            for written in as_completed(mapped):
                written.result()
    except (ArgumentError, CommitError):  # a worker's mistake, or what lies there is another conversion's by now
        raise
    except CkptError:
        _abandon(target)
        raise
    except BrokenProcessPool as error:
        raise ChildFailedError(
            f"{target}: a process that wrote files of it died, perhaps because memory ran out; run again, with fewer "
            "processes (PREFECT_TASKS_RUNNER_PROCESS_POOL_MAX_WORKERS) if so: finished files are not written again."
        ) from error


def _abandon(target: str) -> None:
    """Delete what was written of a conversion, unless a cluster's worker is still at a file: the next one does then."""
    from ckpt_core.export import abandon_conversion

    with suppress(CommitError):
        abandon_conversion(place_of(target))
