"""The record of a retrain: a second run continues an undecided one and follows a decided one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ckpt_core import PyTorchCheckpoint, open_store
from ckpt_core.errors import ArgumentError, DamagedError, NotACheckpointError
from ckpt_core.store import CHAMPION
from tasks import record

PLAN = {"steps": [{"steps": 4}], "seed": 0}


def commit(store: Path, step: int) -> None:
    """Commit a small checkpoint."""
    PyTorchCheckpoint(torch.nn.Linear(2, 2)).save(store, run="default", step=step)


@pytest.fixture
def store(tmp_path: Path):
    """A store whose run `default` this test works on alone."""
    with record.only_retrain(str(tmp_path), "default"):
        yield tmp_path


def test_a_first_retrain_starts_from_nothing(store: Path):
    """Without a checkpoint the first step is 0."""
    assert record.begin(str(store), "default", PLAN).start_step == 0


def test_an_undecided_retrain_is_continued(store: Path):
    """Checkpoints that it committed before it was stopped do not move its start."""
    begun = record.begin(str(store), "default", PLAN)
    commit(store, 4)
    assert record.begin(str(store), "default", dict(reversed(PLAN.items()))) == begun


def test_after_a_decided_retrain_comes_the_next(store: Path):
    """The same plan then starts from the newest checkpoint."""
    begun = record.begin(str(store), "default", PLAN)
    commit(store, 4)
    record.conclude(str(store), "default", begun, {"decision": "published", "version": "v1"})
    following = record.begin(str(store), "default", PLAN)
    assert following == record.Record(begun.plan, start_step=4, parent=4)


def test_a_retrain_starts_from_the_champion(store: Path):
    """Its weights are the pinned step's, its steps come after the newest; a pin that moves later changes nothing."""
    for step in (4, 8):
        commit(store, step)
    open_store(store).pin("default", CHAMPION, 4)
    begun = record.begin(str(store), "default", PLAN)
    assert (begun.start_step, begun.parent) == (8, 4)
    open_store(store).pin("default", CHAMPION, 8)
    assert record.begin(str(store), "default", PLAN) == begun


def test_a_champion_that_is_gone_is_told_before_training(store: Path):
    """The error names its directory, and no retrain is begun."""
    for step in (4, 8):
        commit(store, step)
    open_store(store).pin("default", CHAMPION, 4)
    shutil.rmtree(store / "default" / "step_0000000004")
    with pytest.raises(NotACheckpointError, match=r"step_0000000004: no manifest\.json"):
        record.begin(str(store), "default", PLAN)
    assert not (store / "default" / "retrain.json").exists()


def test_another_plan_is_another_retrain(store: Path):
    """Changed settings start a new retrain from the newest checkpoint, decided or not."""
    begun = record.begin(str(store), "default", PLAN)
    commit(store, 3)
    changed = record.begin(str(store), "default", {**PLAN, "seed": 1})
    assert changed.start_step == 3
    assert changed.plan != begun.plan


def test_a_conclusion_is_kept(store: Path):
    """What became of a retrain is in its file, as JSON."""
    begun = record.begin(store.as_uri(), "default", PLAN)
    record.conclude(store.as_uri(), "default", begun, {"decision": "kept", "version": "v1"})
    kept = json.loads((store / "default" / "retrain.json").read_text())
    outcome = {"decision": "kept", "version": "v1"}
    assert kept == {"plan": begun.plan, "start_step": 0, "parent": None, "decision": None, "outcome": outcome}


def test_a_decision_is_known_to_a_rerun(store: Path):
    """What was decided before a retrain was stopped is found when it goes on, and stays if nothing is decided then."""
    begun = record.begin(str(store), "default", PLAN)
    decided = record.decide(str(store), "default", begun, {"promote": True, "reason": "better"})
    again = record.begin(str(store), "default", PLAN)
    assert again == decided == record.Record(begun.plan, 0, decision={"promote": True, "reason": "better"})
    assert record.decide(str(store), "default", again, None) == again


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"plan": "x", "start_step": 0, "more": 1}'])
def test_a_damaged_record_is_an_error_that_says_what_to_do(tmp_path: Path, text: str):
    """It is neither guessed at nor replaced."""
    path = tmp_path / "default" / "retrain.json"
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(DamagedError, match=r"retrain\.json: not the record of a retrain .*; delete it"):
        record.begin(str(tmp_path), "default", PLAN)
    assert path.read_text() == text


def test_a_second_process_is_kept_out(tmp_path: Path):
    """While one process holds a run, another one gets an error; another run is free."""
    script = (
        "import sys\nfrom tasks import record\n"
        "try:\n    with record.only_retrain(sys.argv[1], sys.argv[2]): print('mine')\n"
        "except record.ArgumentError as error: print(error)\n"
    )

    def attempt(run: str) -> str:
        command = [sys.executable, "-c", script, str(tmp_path), run]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout

    with record.only_retrain(str(tmp_path), "default"):
        assert "another retrain is working on it; wait for it to end, or give another run." in attempt("default")
        assert attempt("other") == "mine\n"
    assert attempt("default") == "mine\n"


def test_what_a_retrain_leaves_running_holds_its_run(tmp_path: Path):
    """A process tree that a retrain started keeps its lock when the retrain itself is gone; a next one waits for it."""
    script = (
        "import os, sys\nfrom tasks import process, record\n"
        "with record.only_retrain(sys.argv[1], 'default'):\n"
        "    process.run(['sh', '-c', 'trap \"\" TERM; echo; sleep 1'], on_line=lambda _: os._exit(0))\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, timeout=60)
    with pytest.raises(ArgumentError, match="What is left"), record.only_retrain(str(tmp_path), "default"):
        pass
    with record.only_retrain(str(tmp_path), "default", wait_s=30):
        pass


def test_a_failed_retrain_lets_go(tmp_path: Path):
    """An error inside frees the run for the next attempt."""
    with pytest.raises(ArgumentError, match="inside"), record.only_retrain(str(tmp_path), "default"):
        raise ArgumentError("inside")
    with record.only_retrain(str(tmp_path), "default"):
        pass
