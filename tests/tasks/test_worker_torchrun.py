"""The worker as it is really started: by torchrun, each rank a fresh process."""

from __future__ import annotations

import subprocess
import sys

import pytest
from worker_support import REPOSITORY, committed_steps, manifest, prepare_tiny, step_records, tiny_job, torchrun

from ckpt_core import open_store
from tasks.worker.evaluate import heldout_loss


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Prepare the tiny text once."""
    return prepare_tiny(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.long), 2])
def test_torchrun(prepared, tmp_path, monkeypatch, ranks):
    """Under torchrun a job trains, commits its checkpoints, shows its progress and warns of nothing."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # torchrun warns when it has to choose
    job = tiny_job(prepared, tmp_path / "store", ranks=ranks, end_step=8)
    done = torchrun(job)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert committed_steps(job) == [4, 8]
    lines = done.stdout.splitlines()
    assert lines[0].startswith("step 0/8  held-out loss 5.7")
    assert lines[1].startswith("step 1/8  loss 5.7")
    assert lines[-1] == f"step 8/8  checkpoint {open_store(job.store).latest(job.run).url}"
    assert step_records(job)[-1]["loss"] < step_records(job)[0]["loss"] - 1
    assert manifest(job, 8).lineage["hardware"]["world_size"] == ranks


def test_without_torchrun(prepared, tmp_path):
    """Started as a plain module the worker is a group of one, and its weights evaluate to what it noted."""
    from transformers import AutoModelForCausalLM
    from worker_support import TINY, write_job

    from ckpt_core import PyTorchCheckpoint
    from tasks.worker.model import build_model
    from tasks.worker.tokenizer import load_tokenizer

    job = tiny_job(prepared, tmp_path / "store", end_step=4)
    command = [sys.executable, "-W", "error::UserWarning", "-m", "tasks.worker", str(write_job(job))]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    newest = open_store(job.store).latest(job.run)
    model = build_model(TINY, load_tokenizer(job.tokenizer), seed=0)
    PyTorchCheckpoint.from_url(newest.url).restore(model)
    noted = newest.manifest.metrics["heldout_loss"]
    assert heldout_loss(model, prepared["heldout_tokens"], "cpu", 4) == pytest.approx(noted, abs=1e-4)
    model.save_pretrained(tmp_path / "export")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert heldout_loss(exported, prepared["heldout_tokens"], "cpu", 4) == pytest.approx(noted, abs=1e-4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read: No such file"),
        ("{}", "not a training job"),
        ('{"store": "/s", "speed": 3}', "speed: Extra inputs are not permitted"),
    ],
)
def test_bad_job_file(tmp_path, capfd, monkeypatch, text, message):
    """A job file that is missing, incomplete or has an unknown key is an error that names it."""
    import signal

    from tasks.worker.__main__ import main

    monkeypatch.setattr(signal, "signal", lambda number, handler: None)  # this process keeps its own
    path = tmp_path / "job.json"
    if text is not None:
        path.write_text(text)
    assert main([str(path)]) == 1
    error = capfd.readouterr().err
    assert error.startswith(f"ArgumentError: {path}: ")
    assert message in error


def test_misuse(capfd):
    """Without a job file the worker shows how it is started and exits with 2."""
    from tasks.worker.__main__ import main

    assert main([]) == 2
    assert "JOB.json" in capfd.readouterr().err
