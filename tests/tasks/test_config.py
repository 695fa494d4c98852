"""Settings: documented, frozen, and refused when unknown or out of range."""

from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic import BaseModel, ValidationError

from ckpt_core.errors import ArgumentError
from tasks import config
from tasks.config import (
    ComputeSettings,
    DataSettings,
    HubSettings,
    Job,
    ModelSettings,
    TrainingStep,
    check_batches,
    default_steps,
)

SETTINGS = [
    value
    for value in vars(config).values()
    if isinstance(value, type) and issubclass(value, config.Settings) and value is not config.Settings
]


def job(**changes) -> Job:
    """A job, with some of its fields changed."""
    fields = {
        "store": "file:///tmp/store",
        "run": "default",
        "start_step": 0,
        "end_step": 4,
        "seed": 0,
        "model": ModelSettings(),
        "step": TrainingStep(),
        "compute": ComputeSettings(),
        "tokenizer": "/tmp/tokenizer",
        "train_tokens": "/tmp/train",
        "heldout_tokens": "/tmp/heldout",
    }
    return Job(**fields | changes)


def test_all_settings_are_looked_at():
    """The tests below see every group of settings."""
    assert {settings.__name__ for settings in SETTINGS} >= {
        "DataSettings", "ModelSettings", "TrainingStep", "ComputeSettings", "ValidationSettings", "ExportSettings",
        "HubSettings", "Job",
    }  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS)
def test_an_unknown_key_is_an_error_that_names_it(settings: type[BaseModel]):
    """A misspelt setting is never silently left out."""
    with pytest.raises(ValidationError, match=r"learning_rat\n.*Extra inputs are not permitted"):
        settings.model_validate({"learning_rat": 1})


@pytest.mark.parametrize("settings", SETTINGS)
def test_every_field_is_described(settings: type[BaseModel]):
    """The form in the Prefect UI has a text beside each field, but for the three groups inside a job."""
    undescribed = {name for name, field in settings.model_fields.items() if not field.description}
    assert undescribed == ({"seed", "model", "step", "compute"} - {"seed"} if settings is Job else set())


@pytest.mark.parametrize("settings", [s for s in SETTINGS if s is not Job])
def test_every_default_is_plain(settings: type[BaseModel]):
    """A form shows plain defaults only: none comes from a factory."""
    assert [name for name, field in settings.model_fields.items() if field.default_factory is not None] == []
    settings()


@pytest.mark.parametrize(
    ("settings", "field", "value"),
    [
        (DataSettings, "max_megabytes", 0),
        (DataSettings, "heldout_every", 1),
        (DataSettings, "sequence_length", 1),
        (TrainingStep, "name", "../elsewhere"),
        (TrainingStep, "steps", 0),
        (TrainingStep, "learning_rate", 0),
        (TrainingStep, "micro_batch_size", 0),
        (ComputeSettings, "ranks", 0),
        (ComputeSettings, "nodes", 0),
        (ComputeSettings, "rendezvous", "no-port"),
        (ComputeSettings, "max_restarts", -1),
        (ComputeSettings, "device", "tpu"),
        (ComputeSettings, "grace_seconds", 0),
        (ComputeSettings, "trainer", "my trainer.py"),
        (HubSettings, "repo_id", "no-owner"),
        (HubSettings, "repo_id", "a/b/c"),
    ],
)
def test_a_value_out_of_range_is_refused(settings: type[BaseModel], field: str, value: object):
    """The error names the field."""
    with pytest.raises(ValidationError, match=field):
        settings.model_validate({field: value})


@pytest.mark.parametrize(
    ("compute", "message"),
    [
        ({"nodes": 2}, r"nodes is 2, but rendezvous is empty; give host:port"),
        ({"min_ranks": 1}, r"min_ranks is 1, .* max_restarts 0; expected .* max_restarts of 1 or more"),
        (
            {"min_ranks": 3, "max_restarts": 1},
            r"min_ranks is 3, with nodes 1, ranks 2 .* expected at most nodes \* ranks",
        ),
    ],
)
def test_settings_that_do_not_fit_each_other_are_refused(compute: dict[str, object], message: str):
    """The error names both fields and what is expected of them."""
    with pytest.raises(ValidationError, match=message):
        ComputeSettings.model_validate(compute)


@pytest.mark.parametrize("run", ["", ".hidden", "a/b", "..", "x" * 65, "name\n"])
def test_a_run_is_a_directory_name(run: str):
    """A run's name can lead nowhere else than below its store."""
    with pytest.raises(ValidationError, match="run"):
        job(run=run)


def test_a_parent_lies_before_the_job():
    """Weights cannot come from a step that the job itself is to make."""
    with pytest.raises(ValidationError, match="parent is step 5, but the job begins at step 4"):
        job(start_step=4, end_step=8, parent=5)


def test_settings_are_frozen():
    """What a flow was started with cannot change under way."""
    with pytest.raises(ValidationError, match="frozen"):
        TrainingStep().steps = 5  # pyright: ignore[reportAttributeAccessIssue]


def test_a_job_survives_its_file():
    """What a trainer reads from the job file is what the flow wrote."""
    written = job(lineage={"plan": "sha256:0"}, step=TrainingStep(data=DataSettings(source="other")))
    assert Job.model_validate_json(written.model_dump_json()) == written


def test_the_default_job_is_two_steps_the_second_at_a_lower_rate():
    """It pretrains, then finetunes gently, in batches that two ranks can share."""
    pretrain, finetune = default_steps()
    assert finetune.learning_rate < pretrain.learning_rate
    assert pretrain.batch_size % ComputeSettings().ranks == finetune.batch_size % ComputeSettings().ranks == 0


def test_a_batch_that_the_ranks_cannot_share_is_refused_by_its_field():
    """The error names the training step and its field, and a number that would do."""
    steps = [TrainingStep(), TrainingStep(batch_size=10)]
    check_batches(steps, ComputeSettings(ranks=2))
    told = r"steps\.1\.batch_size: 10 sequences cannot be shared by 4 ranks; expected a multiple of 4, say 8"
    with pytest.raises(ArgumentError, match=told):
        check_batches(steps, ComputeSettings(ranks=4))


def test_settings_load_neither_torch_nor_prefect():
    """Flows, tasks and ranks can all read them."""
    script = "import tasks.config, sys; print([name for name in ('torch', 'prefect') if name in sys.modules])"
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert child.stdout == "[]\n"
