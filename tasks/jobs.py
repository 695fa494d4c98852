"""The heavy work of a flow, in child processes of its own: `python -m tasks.jobs NAME REQUEST`.

A request is a JSON object, and so is the result; torch is imported here and never in the flow's process.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from ckpt_core.errors import ArgumentError
from tasks import release_jobs
from tasks.child import child_main
from tasks.config import DataSettings, ModelSettings
from tasks.conversion_jobs import check_export, convert, finish_conversion
from tasks.maintenance_jobs import verify_runs

Request = dict[str, Any]


def prepare(request: Request) -> dict[str, Any]:
    """Prepare text for training; see `tasks.worker.prepare`.

    Args:
        request: `model` and `data` (the fields of their settings), `output`, and `tokenizer`, a directory or null.
    """
    from tasks.worker.prepare import prepare

    model, data = ModelSettings.model_validate(request["model"]), DataSettings.model_validate(request["data"])
    return prepare(model, data, request["output"], request["tokenizer"])


def validate(request: Request) -> dict[str, Any]:
    """Check a checkpoint's bytes, structure and values, and its loss on held-out text, if there is some.

    Args:
        request: `url`; `heldout` (prepared tokens) or null; `max_heldout_loss` or null; `allow_nonfinite`.

    Returns:
        `checks` (see `ckpt_core.verify.Check`) and `heldout_loss`, nats a token, or null.
    """
    from ckpt_core.verify import verify

    report = verify(request["url"], allow_nonfinite=request["allow_nonfinite"])
    checks, loss = [asdict(check) for check in report.checks], None
    if request["heldout"] is not None and report.passed:
        loss = _loss(_restored(request["url"]), request["heldout"])
        checks.append(_limit(loss, request["max_heldout_loss"]))
    return {"checks": checks, "heldout_loss": loss}


JOBS: dict[str, Callable[[Request], dict[str, Any]]] = {
    job.__name__: job
    for job in (prepare, validate, convert, finish_conversion, check_export, verify_runs, *release_jobs.JOBS)
}


def _limit(loss: float, limit: float | None) -> dict[str, Any]:
    if loss != loss:  # noqa: PLR0124 - how a NaN shows
        return {"name": "held-out loss", "passed": False, "detail": "NaN; the training diverged."}
    if limit is not None and loss > limit:
        detail = f"{loss:.4f} nats a token, the limit is {limit}; train longer, or raise validation.max_heldout_loss."
        return {"name": "held-out loss", "passed": False, "detail": detail}
    said = "no limit set" if limit is None else f"the limit is {limit}"
    return {"name": "held-out loss", "passed": True, "detail": f"{loss:.4f} nats a token, {said}"}


def _loss(model: Any, heldout: str) -> float:
    from tasks.worker.evaluate import heldout_loss

    device = _device()
    return heldout_loss(model.to(device), heldout, device)


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _restored(url: str) -> Any:
    """Return the model of a checkpoint, built from its own config and filled from its shards."""
    from tasks.gate import restore_model

    return restore_model(url)


def _main() -> dict[str, Any]:
    name, request = sys.argv[1:3]
    if name not in JOBS:
        raise ArgumentError(f"job {name!r}: expected one of {', '.join(JOBS)}.")
    return JOBS[name](json.loads(request))


if __name__ == "__main__":
    child_main(_main)
