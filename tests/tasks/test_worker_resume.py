"""Training that is stopped at any moment and started again ends where it would have ended anyway."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from rank_server import RankServer
from resume_campaign import run_campaign
from worker_support import (
    TINY_LLAMA,
    committed_steps,
    final_state,
    manifest,
    prepare_tiny,
    step_records,
    tiny_job,
)

from ckpt_core import PyTorchCheckpoint
from tasks.config import ComputeSettings, ModelSettings


@pytest.fixture(scope="module")
def server():
    """Start one process that forks ranks for all tests here."""
    server = RankServer()
    yield server
    server.close()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Prepare the tiny text once."""
    return prepare_tiny(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def uninterrupted(server, prepared, tmp_path_factory):
    """Return a function that runs the common job once for each number of ranks."""
    done = {}

    def run(ranks):
        if ranks not in done:
            job = tiny_job(
                prepared, tmp_path_factory.mktemp("whole") / f"ranks{ranks}", ranks=ranks, checkpoint_every=2
            )
            outcome = server.run(job)
            assert outcome["codes"] == [0] * ranks, outcome["output"]
            done[ranks] = job, outcome
        return done[ranks]

    return run


def same_job(job, store):
    """Return the job with another store."""
    return job.model_copy(update={"store": str(store)})


def campaign(server, uninterrupted, directory, *, ranks, kills):
    """Run a campaign against the common job."""
    reference, outcome = uninterrupted(ranks)
    names = (directory / f"run{number}" for number in itertools.count())
    return run_campaign(
        server,
        lambda: same_job(reference, next(names)),
        reference,
        seconds=outcome["seconds"],
        kills=kills,
        seed=20 + ranks,
    )


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.long), 2])
def test_killed_and_resumed_is_bit_identical(server, uninterrupted, tmp_path, ranks):
    """Killed three times at drawn moments and started again, training ends with the same bits and the same records."""
    assert campaign(server, uninterrupted, tmp_path, ranks=ranks, kills=3).kills == 3


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("ranks", [1, 2])
def test_many_kills(server, uninterrupted, tmp_path, ranks):
    """Twenty-five kills, some of them inside a commit, change no bit of any run."""
    tally = campaign(server, uninterrupted, tmp_path, ranks=ranks, kills=25)
    assert tally.kills == 25
    assert tally.in_commits > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_killed_and_resumed_on_cuda(server, prepared, tmp_path):
    """On CUDA the same holds: NCCL, bf16 arithmetic, and bit-identical weights after kills."""
    ranks = min(2, torch.cuda.device_count())
    compute = ComputeSettings(ranks=ranks, device="cuda")
    reference = tiny_job(prepared, tmp_path / "whole", ranks=ranks, checkpoint_every=2)
    reference = reference.model_copy(update={"compute": compute})
    outcome = server.run(reference)
    assert outcome["codes"] == [0] * ranks, outcome["output"]
    hardware = manifest(reference, 12).lineage["hardware"]
    assert (hardware["backend"], hardware["device_type"]) == ("nccl", "cuda")
    names = (tmp_path / f"run{number}" for number in itertools.count())
    run_campaign(
        server, lambda: same_job(reference, next(names)), reference, seconds=outcome["seconds"], kills=3, seed=5
    )


def test_term_commits_and_says_unfinished(server, prepared, tmp_path):
    """After TERM all ranks commit the same step and exit with 143; started again, the weights are the same bits."""
    settings = {"ranks": 2, "end_step": 30, "checkpoint_every": 1000, "evaluate_every": 20}
    whole, stopped = (tiny_job(prepared, tmp_path / name, **settings) for name in ("whole", "stopped"))
    assert server.run(whole)["codes"] == [0, 0]
    outcome = server.run(stopped, term_at="step 1/30")
    assert outcome["codes"] == [143, 143], outcome["output"]
    (step,) = committed_steps(stopped)
    assert 1 <= step < 30
    assert server.run(stopped)["codes"] == [0, 0]
    assert committed_steps(stopped) == [step, 30]
    assert final_state(stopped) == final_state(whole)
    assert step_records(stopped) == step_records(whole)


def test_saving_at_once_is_the_same(server, uninterrupted, tmp_path):
    """A job that saves at once, and writes for TensorBoard, ends with the same bits, records, steps and parents."""
    reference, _ = uninterrupted(2)
    job = same_job(reference, tmp_path / "store")
    changes = {"async_save": False, "tensorboard": True}
    job = job.model_copy(update={"compute": job.compute.model_copy(update=changes)})
    assert server.run(job)["codes"] == [0, 0]
    assert final_state(job) == final_state(reference)
    assert step_records(job) == step_records(reference)
    assert committed_steps(job) == committed_steps(reference) == [2, 4, 6, 8, 10, 12]
    assert len(list((Path(job.store) / job.run / "tensorboard").iterdir())) == 1
    for step in committed_steps(job):
        parents = [manifest(j, step).lineage["parent"] for j in (job, reference)]
        assert [parent and parent["step"] for parent in parents] == [step - 2 or None] * 2


def test_complete_job_is_left_alone(server, uninterrupted):
    """A job whose last step is committed ends at once with success and changes nothing."""
    job, _ = uninterrupted(1)
    before = sorted((p, p.stat().st_mtime_ns) for p in Path(job.store).rglob("*"))
    outcome = server.run(job)
    assert outcome["codes"] == [0]
    assert "complete: file://" in outcome["output"]
    assert sorted((p, p.stat().st_mtime_ns) for p in Path(job.store).rglob("*")) == before


def test_other_world_size_continues_from_the_same_state(server, uninterrupted, tmp_path):
    """Two ranks' checkpoint is continued by one rank: same step, schedule and history, and the loss goes on."""
    reference, _ = uninterrupted(2)
    job = same_job(reference, tmp_path / "store").model_copy(update={"compute": uninterrupted(1)[0].compute})
    shutil.copytree(reference.store, job.store)
    for step in (8, 10, 12):
        shutil.rmtree(Path(job.store) / job.run / f"step_{step:010d}")
    outcome = server.run(job)
    assert outcome["codes"] == [0], outcome["output"]
    two, one = step_records(reference), step_records(job)
    assert one[:6] == two[:6]
    assert [r["learning_rate"] for r in one] == [r["learning_rate"] for r in two]
    assert [r["loss"] for r in one[6:]] == pytest.approx([r["loss"] for r in two[6:]], abs=0.05)
    saved = PyTorchCheckpoint.from_url(Path(job.store) / job.run / "step_0000000012")
    steps = {state["step"].item() for state in saved["optimizer_state_dict"]["state"].values()}
    assert steps == {12.0}


def test_heldout_loss_is_the_same_in_any_number_of_ranks(uninterrupted):
    """The untrained model's held-out loss differs by less than 1e-4 between one rank and two."""
    initial = [manifest(uninterrupted(ranks)[0], 12).metrics["initial_heldout_loss"] for ranks in (1, 2)]
    assert initial[0] == pytest.approx(initial[1], abs=1e-4)


def test_two_ranks_take_the_steps_of_one(server, prepared, tmp_path):
    """Without dropout, two ranks see the losses and gradient norms that one rank sees: the same gradient."""
    model = ModelSettings(architecture=TINY_LLAMA | {"attention_dropout": 0.0})
    records = []
    for ranks in (1, 2):
        job = tiny_job(prepared, tmp_path / f"ranks{ranks}", ranks=ranks, end_step=6, micro_batch_size=3)
        job = job.model_copy(update={"model": model})
        assert server.run(job)["codes"] == [0] * ranks
        records.append(step_records(job))
    for name, tolerance in (("loss", 1e-5), ("grad_norm", 1e-3)):
        one, two = ([record[name] for record in run] for run in records)
        assert one == pytest.approx(two, rel=tolerance)


def test_second_phase_starts_from_the_weights_alone(server, uninterrupted, tmp_path):
    """A job that begins at a checkpoint takes its weights; optimizer, schedule and history begin anew."""
    first, _ = uninterrupted(1)
    shutil.copytree(first.store, tmp_path / "store")
    second = first.model_copy(
        update={
            "store": str(tmp_path / "store"),
            "start_step": 12,
            "end_step": 16,
            "step": first.step.model_copy(update={"name": "finetune", "learning_rate": 1e-4, "steps": 4}),
        }
    )
    outcome = server.run(second)
    assert outcome["codes"] == [0], outcome["output"]
    before, after = manifest(first, 12), manifest(second, 16)
    assert after.metrics["initial_heldout_loss"] == before.metrics["heldout_loss"]
    assert after.metrics["loss_curve"][0][0] == 13
    assert after.metrics["tokens"] == 4 * 8 * 32
    records = step_records(second)
    assert records[:12] == step_records(first)
    assert [r["learning_rate"] for r in records[12:14]] == [5e-5, 1e-4]
    saved = PyTorchCheckpoint.from_url(Path(second.store) / second.run / "step_0000000016")
    assert {s["step"].item() for s in saved["optimizer_state_dict"]["state"].values()} == {4.0}
    assert after.lineage["parent"]["step"] == 14
    third = second.model_copy(update={"store": str(tmp_path / "again")})
    shutil.copytree(first.store, third.store)
    server.run(third, term_at="step 13/16")
    assert server.run(third)["codes"] == [0]
    assert final_state(third) == final_state(second)


def test_a_parent_gives_its_weights_to_later_steps(server, uninterrupted, tmp_path):
    """An older step is trained on after the newest; stopped and started again it ends with the same bits."""
    first, _ = uninterrupted(1)
    whole, stopped = (
        first.model_copy(update={"store": str(tmp_path / name), "start_step": 12, "end_step": 18, "parent": 4})
        for name in ("whole", "stopped")
    )
    for job in (whole, stopped):
        shutil.copytree(first.store, job.store)
    assert server.run(whole)["codes"] == [0]
    assert committed_steps(whole) == [2, 4, 6, 8, 10, 12, 14, 16, 18]
    assert manifest(whole, 14).lineage["parent"]["step"] == 4
    assert manifest(whole, 16).lineage["parent"]["step"] == 14
    assert manifest(whole, 18).metrics["initial_heldout_loss"] == manifest(first, 4).metrics["heldout_loss"]
    assert step_records(whole)[:12] == step_records(first)
    server.run(stopped, term_at="step 13/18")
    assert committed_steps(stopped)[-1] < 18
    assert server.run(stopped)["codes"] == [0]
    assert final_state(stopped) == final_state(whole)
    assert step_records(stopped) == step_records(whole)


def test_manifest_tells_how_it_was_trained(uninterrupted):
    """A manifest holds settings, losses, lineage and hardware, in a few KB."""
    job, _ = uninterrupted(2)
    last = manifest(job, 12)
    assert last.hyperparameters["learning_rate"] == 1e-2
    assert last.hyperparameters["seed"] == 7
    assert last.metrics["heldout_loss"] < last.metrics["initial_heldout_loss"] - 1
    assert [step for step, _ in last.metrics["heldout_curve"]] == [0, 4, 8, 12]
    assert last.metrics["tokens"] == 12 * 8 * 32
    assert last.lineage["data"] == job.lineage["data"]
    assert last.lineage["parent"]["step"] == 10
    assert last.lineage["hardware"] | {"device": ""} == last.lineage["hardware"] | {
        "device": "",
        "backend": "gloo",
        "world_size": 2,
        "device_type": "cpu",
    }
    text = json.dumps(
        {"metrics": last.metrics, "lineage": last.lineage, "settings": last.hyperparameters}, default=dict
    )
    assert len(text) < 8_000


def test_bad_jobs(server, prepared, tmp_path):
    """What does not fit is one line that says what to change, with exit status 1 and nothing committed."""
    cases = {
        "batch_size 8 cannot be shared by 3 ranks": (tiny_job(prepared, tmp_path / "a", ranks=3), 3),
        "has no checkpoint, but the job starts from step 4": (tiny_job(prepared, tmp_path / "b", start_step=4), 1),
        "the gradient's norm nan; lower `learning_rate`": (
            tiny_job(prepared, tmp_path / "c", learning_rate=1e30, max_grad_norm=1e30),
            1,
        ),
    }
    for message, (job, ranks) in cases.items():
        outcome = server.run(job, ranks=ranks)
        assert 1 in outcome["codes"]
        assert message in outcome["output"]
        assert "Traceback" not in outcome["output"]
        assert committed_steps(job) == []


def test_step_log_has_one_line_a_step_and_one_a_save(uninterrupted):
    """Each optimizer step leaves its loss, rate, gradient norm, tokens and seconds, each save how long it blocked."""
    job, _ = uninterrupted(2)
    entries = [json.loads(line) for line in (Path(job.store) / job.run / "metrics.jsonl").read_text().splitlines()]
    lines = [entry for entry in entries if "loss" in entry]
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert all(np.isfinite([line["loss"], line["grad_norm"], line["seconds"]]).all() for line in lines)
    assert [line["step"] for line in lines if "heldout_loss" in line] == [4, 8, 12]
    saves = [entry for entry in entries if "loss" not in entry]
    assert [save["step"] for save in saves] == committed_steps(job)
    assert all(set(save) == {"step", "waited_s", "blocked_s"} and save["blocked_s"] > 0 for save in saves)
