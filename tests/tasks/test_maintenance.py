"""Maintenance of a store: what is verified, what is set right, and what is deleted."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt_core import PyTorchCheckpoint, open_store
from ckpt_core.export import scratch
from ckpt_core.retention import Retention
from ckpt_core.store import CHAMPION
from tasks import record
from tasks.maintenance import Tidied, tidy
from tasks.maintenance_jobs import verify_runs

HOUR = 3600.0


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store with the run `a` and its steps 1, 2 and 3."""
    commit(tmp_path, 1, 2, 3)
    return tmp_path


def commit(store: Path | str, *steps: int, weight: float = 1.0) -> None:
    """Commit small models to the run `a`."""
    for step in steps:
        model = torch.nn.Linear(2, 2)
        torch.nn.init.constant_(model.weight, weight)
        PyTorchCheckpoint(model).save(store, run="a", step=step)


def verified(store: Path | str, newest: int = 1, share: float = 1.0) -> dict[int, dict[str, Any]]:
    """Verify a store, and return what was found by step."""
    request = {"store": str(store), "newest": newest, "share": share, "seed": 0}
    return {found["step"]: found for found in verify_runs(request)["checkpoints"]}


def tidied(store: Path | str, retention: Retention | None = None) -> Tidied:
    """Tidy the run `a`."""
    return tidy.fn(str(store), "a", retention, 24 * HOUR)


def steps(store: Path) -> list[int]:
    """Return the steps of the run `a`."""
    return [checkpoint.step for checkpoint in open_store(store).list("a")]


def data_of(store: Path, step: int) -> Path:
    """Return the file with a step's weights."""
    [path] = (store / "a" / f"step_{step:010d}" / "model").glob("*.distcp")
    return path


def export_of(store: Path, step: int, name: str = "") -> Path:
    """Make a directory that says that it is the export of a step of the run `a`."""
    path = store / "a" / "exports" / (name or f"step_{step:010d}")
    path.mkdir(parents=True)
    (path / "export.json").write_text(json.dumps({"source": {"run": "a", "step": step, "digest": "x"}}))
    path.with_name(f"{path.name}.settings.json").write_text("{}")
    return path


def conversion_of(store: Path, name: str, *, hours: float) -> Path:
    """Make what a conversion leaves that was killed so long ago."""
    path = store / "a" / "exports" / f".converting-{name}"
    (path / "shards").mkdir(parents=True)
    for each in (path / "shards", path):
        os.utime(each, (0, each.stat().st_mtime - hours * HOUR))
    return path


def test_the_newest_and_the_champion_are_read(store: Path):
    """Of the others only the sizes are looked at; all are sound."""
    open_store(store).pin("a", CHAMPION, 1)
    found = verified(store)
    assert {step: each["read"] for step, each in found.items()} == {3: True, 2: False, 1: True}
    assert all(each["problems"] == [] for each in found.values())


def test_damage_is_named(store: Path):
    """A flipped bit in a step that is read, and a lost byte in one that is not, are each told with the file."""
    newest, oldest = data_of(store, 3), data_of(store, 1)
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    oldest.write_bytes(oldest.read_bytes()[:-1])
    found = verified(store)
    assert str(newest) in " ".join(found[3]["problems"])
    assert str(oldest) in " ".join(found[1]["problems"])
    assert found[2]["problems"] == []


@pytest.mark.parametrize("lost", ["manifest.json", ""], ids=["manifest", "directory"])
def test_a_lost_champion_is_damage(store: Path, lost: str):
    """Without its manifest, or all of it, the next retrain could not start from it."""
    open_store(store).pin("a", CHAMPION, 1)
    step = store / "a" / "step_0000000001"
    if lost:
        (step / lost).unlink()
    else:
        step.rename(store / "elsewhere")
    assert "no manifest.json" in " ".join(verified(store)[1]["problems"])


def test_what_was_saved_so_is_no_damage(store: Path):
    """A checkpoint with NaN in it is as its trainer left it."""
    commit(store, 4, weight=math.nan)
    assert verified(store)[4]["problems"] == []


def test_without_a_retention_nothing_is_deleted(store: Path):
    """What a dead writer left goes all the same, and is told."""
    debris = store / "a" / ".staging-step_0000000004-x"
    debris.mkdir()
    done = tidied(store)
    assert not debris.exists()
    assert str(debris) in done.done[0]
    assert (done.deleted, done.errors, steps(store)) == ((), (), [1, 2, 3])


def test_what_the_retention_does_not_keep_goes(store: Path):
    """The newest, the champion and pinned steps stay; of those that go, exports go too, and of no others."""
    commit(store, 4, 5)
    opened = open_store(store)
    opened.pin("a", CHAMPION, 1)
    opened.pin("a", "released-2", 2)
    (store / "a" / ".damaged-step_0000000009-x").mkdir()
    gone = [export_of(store, 3), export_of(store, 4, "step_0000000004-bfloat16")]
    kept = [export_of(store, 1), export_of(store, 9), store / "a" / "exports" / "notes"]
    kept[2].mkdir()
    done = tidied(store, Retention(keep_last=1))
    assert (done.deleted, done.leased, done.errors, steps(store)) == ((3, 4), (), (), [1, 2, 5])
    assert [path.exists() for path in gone] == [False, False]
    assert [path.exists() for path in kept] == [True, True, True]
    assert len(list((store / "a" / "exports").iterdir())) == 5
    assert [str(path) in sentence for path, sentence in zip(gone, done.done, strict=True)] == [True, True]


def test_a_step_that_is_read_stays_for_now(store: Path):
    """A reader's lease outlives maintenance."""
    with open_store(store).list("a")[0].lease():
        done = tidied(store, Retention(keep_last=1))
    assert (done.deleted, done.leased, steps(store)) == ((2,), (1,), [1, 3])


def test_a_run_that_is_trained_is_left_alone(store: Path):
    """While a retrain holds its lock nothing of it is touched."""
    debris = store / "a" / ".staging-step_0000000004-x"
    debris.mkdir()
    with record.only_retrain(str(store), "a"):
        assert tidied(store, Retention(keep_last=1)) == Tidied(run="a", left="a retrain is at work")
    assert (debris.exists(), steps(store)) == (True, [1, 2, 3])
    assert tidied(store, Retention(keep_last=1)).deleted == (1, 2)


def test_abandoned_conversions_go(store: Path):
    """One that was killed lately may go on, and one that is being written is not given up."""
    old = conversion_of(store, "old", hours=25)
    others = [conversion_of(store, "new", hours=23), conversion_of(store, "busy", hours=25)]
    with scratch.shared(others[1]):
        done = tidied(store)
    assert (old.exists(), [path.exists() for path in others]) == (False, [True, True])
    assert str(old) in done.done[0]


def test_what_fails_does_not_stop_the_rest(store: Path):
    """A pin that cannot be read keeps all steps, and is told; the rest is done."""
    debris = store / "a" / ".staging-step_0000000004-x"
    debris.mkdir()
    open_store(store).pin("a", CHAMPION, 1)
    (store / "a" / "pins" / CHAMPION).write_text("no step")
    done = tidied(store, Retention(keep_last=1))
    assert (done.deleted, steps(store), debris.exists()) == ((), [1, 2, 3], False)
    [error] = done.errors
    assert str(store / "a" / "pins" / CHAMPION) in error


def test_a_run_that_is_a_link_is_left_alone(store: Path, tmp_path_factory: pytest.TempPathFactory):
    """It is another store's to keep in order."""
    other = tmp_path_factory.mktemp("other")
    (other / "a").symlink_to(store / "a")
    done = tidied(other, Retention(keep_last=1))
    assert str(done.left).startswith("a symbolic link")
    assert steps(store) == [1, 2, 3]


def test_a_store_of_objects_is_maintained(memory_store: str):
    """It has no retrains to wait for."""
    commit(memory_store, 1, 2, 3)
    assert {step: each["problems"] for step, each in verified(memory_store, newest=3).items()} == {3: [], 2: [], 1: []}
    assert tidied(memory_store, Retention(keep_last=2)).deleted == (1,)


@pytest.fixture
def memory_store(request: pytest.FixtureRequest) -> str:
    """The URL of a store in memory, which no other test uses."""
    return f"memory://{request.node.name}"
