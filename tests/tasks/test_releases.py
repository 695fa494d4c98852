"""What is kept of a release beside its checkpoint, and the pins that follow it."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ckpt_core import PyTorchCheckpoint, open_store
from ckpt_core.errors import DamagedError, HubConflictError, NotACheckpointError
from ckpt_core.retention import Retention
from tasks import releases

ADDRESS = "https://huggingface.co/team/model"
RECORD = releases.ReleaseRecord(4, "sha256:ab", "team/model", "v1", "c0ffee", f"{ADDRESS}/tree/v1", {"promote": True})


@pytest.fixture(params=["directory", "object store"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty store."""
    return tmp_path.as_uri() if request.param == "directory" else f"memory://{tmp_path.name}"


def commit(store: str, *steps: int) -> None:
    """Commit small checkpoints to the run `default`."""
    for step in steps:
        PyTorchCheckpoint(torch.nn.Linear(2, 2)).save(store, run="default", step=step)


def test_a_record_is_read_back(store: str):
    """What was kept of a release is found by its address and tag; elsewhere and under other tags there is none."""
    assert releases.keep(store, "default", ADDRESS, RECORD) == RECORD
    assert releases.find(store, "default", ADDRESS, "v1") == RECORD
    assert releases.find(store, "default", ADDRESS, "v2") is None
    assert releases.find(store, "default", "s3://bucket/model", "v1") is None
    assert releases.find(store, "other", ADDRESS, "v1") is None


def test_a_record_stays_as_it_was(store: str):
    """A rerun that tells of the same release, with another decision, finds the first record and changes nothing."""
    releases.keep(store, "default", ADDRESS, RECORD)
    assert releases.keep(store, "default", ADDRESS, RECORD) == RECORD
    again = replace(RECORD, decision={"promote": True, "reason": "the same content"})
    assert releases.keep(store, "default", ADDRESS, again) == RECORD
    assert releases.find(store, "default", ADDRESS, "v1") == RECORD


def test_two_places_have_versions_of_their_own(store: str):
    """A run that is published in two places has two releases v1."""
    there = replace(RECORD, repo="s3://bucket/model", commit="f00d", step=8)
    releases.keep(store, "default", ADDRESS, RECORD)
    releases.keep(store, "default", "s3://bucket/model", there)
    assert releases.find(store, "default", ADDRESS, "v1") == RECORD
    assert releases.find(store, "default", "s3://bucket/model", "v1") == there


def test_a_tag_that_begins_anew_is_an_error(store: str):
    """A repository that was deleted and made again has another v1: the error names both, and what to delete."""
    releases.keep(store, "default", ADDRESS, RECORD)
    with pytest.raises(HubConflictError, match=r"v1 is step 4, commit c0ffee; but it is step 8, commit f00d.*delete"):
        releases.keep(store, "default", ADDRESS, replace(RECORD, commit="f00d", step=8))
    assert releases.find(store, "default", ADDRESS, "v1") == RECORD


def test_a_record_is_plain_json(tmp_path: Path):
    """It lies in the run's directory, in a file that is named by address and tag, without anything beside it."""
    releases.keep(str(tmp_path), "default", ADDRESS, RECORD)
    [path] = [path for path in (tmp_path / "default" / "releases").rglob("*") if path.is_file()]
    assert path.parent.name == "https%3A%2F%2Fhuggingface.co%2Fteam%2Fmodel"
    assert path.name == "v1.json"
    assert json.loads(path.read_bytes())["decision"] == {"promote": True}


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"step": 4}'])
def test_a_damaged_record_is_named(tmp_path: Path, text: str):
    """It is not guessed at."""
    releases.keep(str(tmp_path), "default", ADDRESS, RECORD)
    [path] = (tmp_path / "default" / "releases").rglob("v1.json")
    path.write_text(text)
    with pytest.raises(DamagedError, match=r"v1\.json: not the record of a release"):
        releases.find(str(tmp_path), "default", ADDRESS, "v1")


def test_a_champion_and_the_newest_releases_survive_pruning(store: str):
    """Released steps stay up to a number, the champion whatever its age, and all else goes."""
    commit(store, 1, 2, 3, 4, 5, 6)
    for step in (2, 3, 4, 2):
        releases.crown(store, "default", step)
    assert open_store(store).pins("default") == {"champion": 2, "released-2": 2, "released-3": 3, "released-4": 4}
    releases.let_go(store, "default", 1)
    open_store(store).prune("default", Retention(keep_last=1))
    assert [checkpoint.step for checkpoint in open_store(store).list("default")] == [2, 4, 6]


def test_a_step_that_is_gone_is_not_crowned(store: str):
    """The champion stays what it was."""
    commit(store, 1)
    releases.crown(store, "default", 1)
    with pytest.raises(NotACheckpointError):
        releases.crown(store, "default", 2)
    assert open_store(store).pins("default") == {"champion": 1, "released-1": 1}


def test_releases_move_one_at_a_time(tmp_path: Path):
    """While one moves what is served and the pin, another one waits."""
    order: list[str] = []
    entered, leave = threading.Event(), threading.Event()

    def first() -> None:
        with releases.moving(str(tmp_path), "default"):
            entered.set()
            leave.wait(30)
            order.append("first")

    def second() -> None:
        with releases.moving(str(tmp_path), "default"):
            order.append("second")

    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    threads[0].start()
    assert entered.wait(30)
    threads[1].start()
    threads[1].join(0.2)
    assert threads[1].is_alive()
    leave.set()
    for thread in threads:
        thread.join(30)
    assert order == ["first", "second"]
