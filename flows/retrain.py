"""`retrain`: train, validate, convert, check, compare, publish. Also `python -m flows.retrain`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from prefect import flow
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from pydantic import Field

from ckpt_core import PyTorchCheckpoint, open_checkpoint, open_store
from ckpt_core.errors import CkptError
from ckpt_core.retention import Retention
from ckpt_core.store import local_path, step_name
from flows.convert import default_target
from flows.summary import Summary
from flows.verdict import Origin, publish_or_keep
from tasks import artifacts, provenance, record, releases, sentinel
from tasks.config import (
    ComputeSettings,
    DataSettings,
    ExportSettings,
    HubSettings,
    Job,
    ModelSettings,
    Name,
    TrainingStep,
    ValidationSettings,
    check_batches,
    default_steps,
)
from tasks.conversion import convert_checkpoint
from tasks.publication import check_hub, compare, destination
from tasks.results import ReferenceSerializer
from tasks.training import prepare_data, train
from tasks.validation import EXPORT_CHECK, VALIDATION, check_export, validate


@flow(name="retrain", flow_run_name="retrain {run}", persist_result=False, result_serializer=ReferenceSerializer())
def retrain(
    store: str = "runs",
    run: Name = "default",
    model: ModelSettings = ModelSettings(),
    data: DataSettings = DataSettings(),
    steps: list[TrainingStep] = default_steps(),  # noqa: B008 - the form shows plain defaults only
    compute: ComputeSettings = ComputeSettings(),
    validation: ValidationSettings = ValidationSettings(),
    export: ExportSettings = ExportSettings(),
    hub: HubSettings = HubSettings(),
    seed: Annotated[int, Field(ge=0)] = 0,
    keep_checkpoints: Annotated[int, Field(ge=1)] = 4,
    keep_releases: Annotated[int, Field(ge=1)] = 2,
) -> dict[str, Any]:
    """Train a model from its champion's weights on, and publish it if it is sound and better than what is published.

    Run again after any stop, it continues where it was; after an end, it starts the next retrain.

    Args:
        store: the directory that holds runs, and the local Hub's repositories.
        run: name of the lineage of checkpoints to continue, or to begin, and of its directory in the store.
        model: what to train: an architecture from scratch, or pretrained weights.
        data: the text to train on, and what of it is held out.
        steps: training jobs, each from the weights of the one before.
        compute: where training runs, in how many processes, and how it is saved.
        validation: what the checkpoint must pass.
        export: cast and file sizes of the release.
        hub: where the release goes, when a model is better than the one before, and what becomes of one that is not.
        seed: decides the initial weights and the order of the data; equal settings and seed give an equal model.
        keep_checkpoints: how many of the run's newest checkpoints stay when the retrain has ended.
        keep_releases: of how many of the newest releases the checkpoints stay too, to roll back to; the champion's
            always does.
    """
    store = local_path(store).as_uri()
    check_hub(hub, tokens=True)
    check_batches(steps, compute)
    plan = {
        "model": model.model_dump(),
        "data": data.model_dump(),
        "steps": [step.model_dump() for step in steps],
        "seed": seed,
    }
    with sentinel.posted(), record.only_retrain(store, run, wait_s=1.5 * compute.grace_seconds):
        begun = record.begin(store, run, plan)
        prepared = _prepare(store, run, model, data, begun)
        checkpoints = [_trained(job) for job in _jobs(store, run, model, steps, compute, seed, begun, prepared)]
        checkpoint = checkpoints[-1]
        validated = validate(str(checkpoint.url), run, prepared["heldout_tokens"], validation)
        artifacts.report_table(VALIDATION, run, validated["checks"])
        exported = _export(checkpoint, run, export, validation, model)
        checked = check_export(str(checkpoint.url), run, exported["path"])
        artifacts.report_table(EXPORT_CHECK, run, checked)
        with destination(store, hub) as at:
            untrained = {"model": model.model_dump(), "tokenizer": prepared["tokenizer"], "seed": seed}
            compared = compare(
                at, hub, exported["path"], prepared["heldout_tokens"], untrained, model.trust_remote_code
            )
            begun = record.decide(store, run, begun, compared["decision"])
            compared["decision"] = begun.decision
            origin = Origin(store, open_checkpoint(str(checkpoint.url)))
            verdict = publish_or_keep(at, hub, exported["path"], origin, compared, prepared["heldout"]["source"])
        artifacts.release_card(run, at, asdict(verdict), compared)
        checks = [*validated["checks"], *checked]
        losses = {"validated": validated["heldout_loss"], "unigram": prepared["unigram_loss"]}
        summary = Summary.of(checkpoints, checks, exported, compared, verdict, losses, at)
        artifacts.lineage_card(run, summary.to_dict(), str(summary.keep(store)))
        record.conclude(store, run, begun, summary.outcome())
        _tidy(store, run, keep_checkpoints, keep_releases)
    return summary.to_dict()


def _tidy(store: str, run: str, keep_checkpoints: int, keep_releases: int) -> None:
    """Delete what is to stay no longer; that fails no retrain."""
    logger = get_run_logger()
    try:
        releases.let_go(store, run, keep_releases)
        errors = open_store(store).prune(run, Retention(keep_last=keep_checkpoints)).errors
    except (CkptError, OSError) as error:
        errors = (str(error),)
    for error in errors:
        logger.warning("old checkpoints of run %s: %s", run, error)


def _prepare(store: str, run: str, model: ModelSettings, data: DataSettings, begun: record.Record) -> dict[str, Any]:
    """Prepare text for a retrain, with the tokenizer of the weights that it starts from, or else of its own steps."""
    directory = record.run_directory(store, run)
    if begun.parent is None:
        origin = open_store(store).latest(run)
    else:
        origin = open_checkpoint(directory / step_name(begun.parent))
    assets = origin.component("assets") if origin else None
    return prepare_data(model, data, str(directory / "data"), str(assets) if assets else None)


def _trained(job: Job) -> PyTorchCheckpoint:
    """Train, or find what was trained before, and show it."""
    checkpoint = train(job)
    artifacts.checkpoint_card(str(checkpoint.url))
    return checkpoint


def _export(
    checkpoint: PyTorchCheckpoint,
    run: str,
    export: ExportSettings,
    validation: ValidationSettings,
    model: ModelSettings,
) -> dict[str, Any]:
    target = default_target(open_checkpoint(str(checkpoint.url)), export)
    return convert_checkpoint(
        str(checkpoint.url),
        run,
        target,
        export,
        allow_nonfinite=validation.allow_nonfinite,
        trust_remote_code=model.trust_remote_code,
    )


def _jobs(
    store: str,
    run: str,
    model: ModelSettings,
    steps: list[TrainingStep],
    compute: ComputeSettings,
    seed: int,
    begun: record.Record,
    prepared: dict[str, Any],
) -> Iterator[Job]:
    """Yield the training jobs of a retrain; text of a step's own is prepared when its turn comes."""
    start, parent = begun.start_step, begun.parent
    for step in steps:
        text = prepared
        if step.data is not None:
            directory = record.run_directory(store, run) / "data"
            text = prepare_data(model, step.data, str(directory), prepared["tokenizer"])
        yield Job(
            store=store,
            run=run,
            start_step=start,
            end_step=start + step.steps,
            parent=parent,
            seed=seed,
            model=model,
            step=step,
            compute=compute,
            tokenizer=prepared["tokenizer"],
            train_tokens=text["train_tokens"],
            heldout_tokens=prepared["heldout_tokens"],
            lineage={
                "plan": begun.plan,
                "training_step": step.name,
                "data": text["fingerprint"],
                "data_source": text["train"]["source"],
                "code_revision": provenance.code_revision(),
                "libraries": provenance.libraries(),
                "flow_run": str(flow_run.id),
            },
        )
        start = parent = start + step.steps


def main() -> int:
    """Run the default retrain; print what came of it, or the error."""
    try:
        result = retrain()
    except KeyboardInterrupt:
        print("\nretrain stopped; run it again to continue", file=sys.stderr)  # noqa: T201
        return 130
    except Exception as error:  # noqa: BLE001 - the flow has logged it; a person needs its text alone
        print(f"\nretrain failed: {error}", file=sys.stderr)  # noqa: T201
        return 1
    print(Summary(**result).text(Path.cwd()))  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
