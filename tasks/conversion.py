"""The task that makes a Hugging Face directory of a checkpoint."""

from __future__ import annotations

from typing import Any

from prefect import task

from tasks import artifacts
from tasks.config import ExportSettings
from tasks.launch import run_job


@task(task_run_name="convert {run}")
def convert_checkpoint(
    url: str,
    run: str,
    target: str,
    settings: ExportSettings,
    *,
    allow_nonfinite: bool = False,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Convert a checkpoint to sharded safetensors at `target`; one made before with equal settings is kept.

    Returns:
        `path`, `files` (bytes and sha256 of each), `rules`, `architecture`, `reused`.
    """
    request = {
        "url": url,
        "target": target,
        "dtype": settings.dtype,
        "max_shard_bytes": int(settings.max_shard_megabytes * 1_000_000),
        "allow_nonfinite": allow_nonfinite,
        "trust_remote_code": trust_remote_code,
    }
    export = run_job("convert", request)
    artifacts.export_card(run, export)
    return export
