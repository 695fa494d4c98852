"""The events that a training emits, for automations and for the feed; `url` in each payload says where to look.

`ckpt.checkpoint.committed` comes once for each step that was committed; its resource is the step's URL, with the labels
`ckpt.run`, `ckpt.step` and `ckpt.complete`, which is "true" for the last step of a training job and "false" for one
in the middle. `ckpt.training.progress` comes once a minute and at the end; its resource is the run's URL.
"""

from __future__ import annotations

from uuid import NAMESPACE_URL, uuid5

from prefect.events import emit_event

from ckpt_core import open_checkpoint
from ckpt_core.urls import place_of
from tasks.config import Job
from tasks.progress import JobProgress

COMMITTED, PROGRESS = "ckpt.checkpoint.committed", "ckpt.training.progress"


def committed(url: str, *, complete: bool) -> None:
    """Tell that a step was committed; told once more, as after a stop, it is the same event.

    Args:
        url: the step's.
        complete: whether it is the last one of its training job.
    """
    manifest = open_checkpoint(url).manifest
    digest = manifest.digest()
    payload = {
        "url": url,
        "run": manifest.run,
        "step": manifest.step,
        "complete": complete,
        "training_step": manifest.lineage.get("training_step"),
        "digest": digest,
        "bytes": manifest.nbytes,
        "heldout_loss": manifest.metrics.get("heldout_loss"),
    }
    resource = {
        "prefect.resource.id": url,
        "prefect.resource.name": f"{manifest.run} step {manifest.step}",
        "ckpt.run": manifest.run,
        "ckpt.step": str(manifest.step),
        "ckpt.complete": str(complete).lower(),
    }
    emit_event(COMMITTED, resource=resource, payload=payload, id=uuid5(NAMESPACE_URL, f"{url}#{digest}"))


def progress(job: Job, seen: JobProgress) -> None:
    """Tell how far a training job is."""
    url = (place_of(job.store) / job.run).as_uri()
    payload = {
        "url": url,
        "run": job.run,
        "training_step": seen.name,
        "step": seen.step,
        "end_step": seen.last_step,
        "percent": seen.percent,
        "loss": seen.loss,
        "tokens_per_second": seen.tokens_per_second,
        "seconds_left": seen.seconds_left,
    }
    resource = {"prefect.resource.id": url, "prefect.resource.name": f"run {job.run}", "ckpt.run": job.run}
    emit_event(PROGRESS, resource=resource, payload=payload)
