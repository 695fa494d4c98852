"""Starting child processes from a task: their lines go to the run's log, their result comes back."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from typing import Any

from prefect.logging import get_run_logger

from tasks.child import run_json

_QUIET = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"}


def log_line() -> Callable[[str], None]:
    """Return a function that puts a line of output into the log of the task run."""
    return get_run_logger().info


def run_job(name: str, request: Mapping[str, Any], *, env: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Run a job of `tasks.jobs` in a child process and return its result.

    Raises:
        ChildFailedError: it failed; the message is meant for people.
    """
    arguments = [name, json.dumps(request)]
    return run_json("tasks.jobs", arguments, on_line=log_line(), env={**_QUIET, **_progress(), **(env or {})})


def _progress() -> dict[str, str]:
    """Silence tqdm's bars, which a log cannot redraw, unless the user has set it otherwise."""
    return {"TQDM_DISABLE": os.environ.get("TQDM_DISABLE", "1")}
