"""The tasks that say yes or no: to a checkpoint, and to the export that was made of it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from prefect import task

from ckpt_core.errors import CheckpointError
from tasks import artifacts
from tasks.caching import ByContent, checkpoint_identity, export_identity
from tasks.config import ValidationSettings
from tasks.launch import run_job
from tasks.results import ReferenceSerializer

VALIDATION, EXPORT_CHECK = "validation", "export-check"
"""What the tables of checks are called, for `artifacts.report_table`."""


class RefusedError(CheckpointError, ValueError):
    """A checkpoint or export did not pass; the message gives each reason."""


def _what_decides(url: str, run: str, heldout: str | None, settings: ValidationSettings) -> dict[str, Any]:  # noqa: ARG001 - the task's parameters
    tokens = None if heldout is None else _fingerprint(Path(heldout))
    return {"checkpoint": checkpoint_identity(url), "heldout": tokens, "settings": settings.model_dump()}


def _fingerprint(tokens: Path) -> str:
    """Return what names prepared tokens: `info.json` has the digest of their bytes, and no path."""
    return hashlib.sha256((tokens / "info.json").read_bytes()).hexdigest()


def _what_is_compared(url: str, run: str, export: str) -> dict[str, Any]:  # noqa: ARG001 - the task's parameters
    return {"checkpoint": checkpoint_identity(url), "export": export_identity(export)}


@task(
    task_run_name="validate {run}",
    cache_policy=ByContent(name="validation", content=_what_decides),
    result_serializer=ReferenceSerializer(),
)
def validate(url: str, run: str, heldout: str | None, settings: ValidationSettings) -> dict[str, Any]:
    """Check a checkpoint's bytes, structure, values and, with held-out text, its loss; one that passed, once.

    The caller shows the checks, so that each flow run does; those of a checkpoint that did not pass are shown here.

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
    _require(result["checks"], VALIDATION, run, f"checkpoint {url}")
    return result


@task(
    task_run_name="check export of {run}",
    cache_policy=ByContent(name="export-check", content=_what_is_compared),
    result_serializer=ReferenceSerializer(),
)
def check_export(url: str, run: str, export: str) -> list[dict[str, Any]]:
    """Load an export in a fresh process and compare it with its checkpoint; one that passed, once.

    The caller shows the checks that are returned, as with `validate`.

    Raises:
        RefusedError: a check failed.
    """
    result = run_job("check_export", {"url": url, "export": export})
    _require(result["checks"], EXPORT_CHECK, run, f"export {export}", "Delete it to have it made again.")
    return result["checks"]


def _require(checks: list[dict[str, Any]], kind: str, run: str, what: str, remedy: str = "") -> None:
    failed = [f"{check['name']}: {check['detail'].rstrip('.')}." for check in checks if not check["passed"]]
    if failed:
        artifacts.report_table(kind, run, checks)
        raise RefusedError(" ".join(filter(None, [f"{what} was refused.", *failed, remedy])))
