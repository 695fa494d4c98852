"""The tasks that say yes or no: to a checkpoint, and to the export that was made of it."""

from __future__ import annotations

from typing import Any

from prefect import task

from ckpt_core.errors import CheckpointError
from tasks import artifacts
from tasks.config import ValidationSettings
from tasks.launch import run_job


class RefusedError(CheckpointError, ValueError):
    """A checkpoint or export did not pass; the message gives each reason."""


@task(task_run_name="validate {run}")
def validate(url: str, run: str, heldout: str | None, settings: ValidationSettings) -> dict[str, Any]:
    """Check a checkpoint's bytes, structure, values and, with held-out text, its loss.

    Returns:
        `checks` and `heldout_loss`.

    Raises:
        RefusedError: a check failed.
    """
    request = {
        "url": url,
        "heldout": heldout,
        "max_heldout_loss": settings.max_heldout_loss,
        "allow_nonfinite": settings.allow_nonfinite,
    }
    result = run_job("validate", request)
    artifacts.report_table("validation", run, result["checks"])
    _require(result["checks"], f"checkpoint {url}")
    return result


@task(task_run_name="check export of {run}")
def check_export(url: str, run: str, export: str) -> list[dict[str, Any]]:
    """Load an export in a fresh process and compare it with its checkpoint; return the checks.

    Raises:
        RefusedError: a check failed.
    """
    result = run_job("check_export", {"url": url, "export": export})
    artifacts.report_table("export-check", run, result["checks"])
    _require(result["checks"], f"export {export}")
    return result["checks"]


def _require(checks: list[dict[str, Any]], what: str) -> None:
    failed = [f"{check['name']}: {check['detail']}" for check in checks if not check["passed"]]
    if failed:
        raise RefusedError(f"{what} was refused. " + " ".join(failed))
