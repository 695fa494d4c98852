"""The tasks that make checkpoints: preparing text, and training under torchrun."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import task
from prefect.logging import get_run_logger

from ckpt_core import PyTorchCheckpoint, open_checkpoint, open_store
from ckpt_core.errors import NotACheckpointError, StepExistsError
from ckpt_core.store import Checkpoint, local_path, step_name
from tasks import events, live_view
from tasks.caching import ByContent
from tasks.config import DataSettings, Job, ModelSettings
from tasks.elastic import run_ranks
from tasks.gpu_slots import gpu_slots
from tasks.launch import log_line, run_job
from tasks.record import RECORD_NAME
from tasks.results import ReferenceSerializer


@task(task_run_name="prepare {data.source}", persist_result=False)
def prepare_data(model: ModelSettings, data: DataSettings, directory: str, tokenizer: str | None) -> dict[str, Any]:
    """Read, split, tokenize and pack text, or find what was prepared before; see `tasks.worker.prepare`."""
    request = {
        "model": model.model_dump(),
        "data": data.model_dump(),
        "output": directory,
        "tokenizer": tokenizer,
    }
    return run_job("prepare", request)


def _what_decides(job: Job) -> dict[str, Any]:
    """Return what a job's checkpoint is determined by, but for where and by how many ranks it is trained."""
    parent = job.start_step if job.parent is None else job.parent
    origin = local_path(job.store) / job.run / step_name(parent)
    return {
        **job.model_dump(include={"store", "run", "start_step", "end_step", "seed", "model", "step"}),
        "plan": job.lineage.get("plan"),
        "data": job.lineage.get("data"),
        "trainer": job.compute.trainer,
        "parent": open_checkpoint(origin).manifest.digest() if origin.exists() else None,
    }


def _is_there(checkpoint: PyTorchCheckpoint) -> bool:
    return open_checkpoint(str(checkpoint.url)).manifest.digest() == checkpoint.to_dict()["digest"]


@task(
    task_run_name="train {job.step.name} to step {job.end_step}",
    cache_policy=ByContent(name="checkpoint", content=_what_decides, holds=_is_there),
    result_serializer=ReferenceSerializer(),
)
def train(job: Job) -> PyTorchCheckpoint:
    """Run one training job under torchrun, from its newest checkpoint on; return a reference to its last one.

    The caller shows that one, so that each flow run does which trained it or found it.

    Raises:
        ChildFailedError: a rank failed; the message has its last lines.
        NotACheckpointError: the job ended well but committed no checkpoint at its last step.
        StepExistsError: somebody else committed a step that this retrain was to make.
    """
    newest = open_store(job.store).latest(job.run)
    if newest is not None and newest.step > job.start_step:
        _check_own(newest, job)
    if newest is None or newest.step < job.end_step:
        resume_step = newest.step if newest else job.start_step
        with gpu_slots(job.compute), live_view.shown(job, resume_step):
            run_ranks(job, log_line())
    else:
        get_run_logger().info("step %d is committed already", job.end_step)
    path = local_path(job.store) / job.run / step_name(job.end_step)
    if not path.exists():
        raise NotACheckpointError(
            f"{path}: not there, although {job.compute.trainer} ended well; expected a checkpoint at step "
            f"{job.end_step}, the end_step of its job file. Correct the trainer, then run again."
        )
    return _told(path)


def _check_own(newest: Checkpoint, job: Job) -> None:
    """Refuse a step that is where this retrain's will be, unless this retrain committed it before it was stopped."""
    if newest.manifest.lineage.get("plan") != job.lineage["plan"]:
        raise StepExistsError(
            f"{newest.path}: committed, but not by this retrain, which trains from step {job.start_step} to "
            f"{job.end_step}, and a committed step never changes. Give the retrain another run; or, to train on from "
            f"that step, delete {local_path(job.store) / job.run / RECORD_NAME}. (A trainer of your own records the "
            "job's `lineage` in what it commits.)"
        )


def _told(path: Path) -> PyTorchCheckpoint:
    checkpoint = PyTorchCheckpoint.from_url(path)
    events.committed(str(checkpoint.url), complete=True)
    return checkpoint
