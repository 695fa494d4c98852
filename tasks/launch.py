"""Starting child processes from a task: their lines go to the run's log, their result comes back."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from prefect.logging import get_run_logger

from tasks import zygote
from tasks.child import run_json
from tasks.process import ChildFailedError


def log_line() -> Callable[[str], None]:
    """Return a function that puts a line of output into the log of the task run."""
    return get_run_logger().info


def run_job(
    name: str, request: Mapping[str, Any], *, env: Mapping[str, str] | None = None, token: str | None = None
) -> dict[str, Any]:
    """Run a job of `tasks.jobs` in a child process and return its result.

    Args:
        name: the job's.
        request: its request, of JSON types.
        env: what to add to the child's environment. Without it, and without a token, the child is forked from a
            process that has imported torch and transformers.
        token: the Hub's, for the child's environment alone; by default what `HF_TOKEN` is here. Whatever the child
            says, the token is in none of it.

    Raises:
        ChildFailedError: it failed; the message is meant for people.
    """
    known = (token or os.environ.get("HF_TOKEN") or "").strip()  # as the client sends it
    log, arguments = log_line(), [name, json.dumps(request)]
    environment = {**zygote.quiet(), **(env or {}), **({"HF_TOKEN": known} if known else {})}
    start = partial(zygote.fork_module, env=zygote.quiet()) if env is None and token is None else None
    try:
        return run_json(
            "tasks.jobs", arguments, on_line=lambda line: log(_hide(known, line)), env=environment, start=start
        )
    except ChildFailedError as error:
        message = _hide(known, str(error))
    raise ChildFailedError(message)


def _hide(token: str, text: str) -> str:
    return text.replace(token, "<token>") if token else text
