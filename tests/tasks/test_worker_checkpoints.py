"""A job's checkpoints: announced when they are committed, each with the one before it as parent."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from worker_support import tiny_job

from ckpt_core import PyTorchCheckpoint
from ckpt_core.errors import CommitError
from ckpt_core.store import LocalStore
from tasks.config import ComputeSettings
from tasks.worker.checkpoints import Checkpoints

PREPARED = dict.fromkeys(("tokenizer", "train_tokens", "heldout_tokens", "fingerprint"), "none")


class HeldStore(LocalStore):
    """A store in which no save begins before `go` is set."""

    def __init__(self, root):
        super().__init__(root)
        self.go = threading.Event()

    def stage(self, run, step):
        """Wait, then begin."""
        self.go.wait(30)
        return super().stage(run, step)


def job(store, **compute):
    """Return a job with these settings."""
    return tiny_job(PREPARED, store).model_copy(update={"compute": ComputeSettings(device="cpu", **compute)})


def save(checkpoints, step):
    """Save a model of a step."""
    module = torch.nn.Linear(2, 2)
    checkpoints.save(PyTorchCheckpoint(module), step=step, lineage={"code": "a"}, metrics={"loss": 1.0})


@pytest.mark.parametrize("async_save", [True, False])
def test_each_is_announced_once_and_the_parent_of_the_next(tmp_path, async_save):
    """Each committed step is announced once, in order, and named as parent by the one after it."""
    announced = []
    before = (1, "file:///before")
    store = LocalStore(tmp_path / "store")
    with Checkpoints(
        job(tmp_path / "store", async_save=async_save), store, before, lambda *said: announced.append(said)
    ) as checkpoints:
        for step in (2, 3, 4):
            save(checkpoints, step)
            checkpoints.look()
        checkpoints.finish()
        checkpoints.look()
        assert checkpoints.newest == announced[-1]
    steps = store.list("tiny")
    assert announced == [(checkpoint.step, checkpoint.url) for checkpoint in steps]
    parents = [checkpoint.manifest.lineage for checkpoint in steps]
    expected = [before, *announced[:2]]
    assert parents == [{"code": "a", "parent": {"step": step, "url": url}} for step, url in expected]


def test_nothing_is_announced_before_it_is_committed(tmp_path):
    """While a step is being written the one before it is the newest."""
    announced = []
    store = HeldStore(tmp_path / "store")
    with Checkpoints(job(tmp_path / "store"), store, None, lambda *said: announced.append(said)) as checkpoints:
        save(checkpoints, 2)
        checkpoints.look()
        assert (announced, checkpoints.newest) == ([], None)
        store.go.set()
        checkpoints.finish()
        assert [step for step, _ in announced] == [2]


def test_after_term_saving_ends_in_time(tmp_path):
    """In a hurry, what is not committed after four fifths of the grace is given up, and the error names the step."""
    announced = []
    store = HeldStore(tmp_path / "store")
    checkpoints = Checkpoints(job(tmp_path / "store", grace_seconds=1.0), store, None, announced.append)
    save(checkpoints, 3)
    began = time.monotonic()
    checkpoints.hurry()
    with pytest.raises(CommitError, match=r"step 3 of run 'tiny': not committed: given up"):
        checkpoints.finish()
    assert 0.7 < time.monotonic() - began < 5
    assert announced == []
    assert store.list("tiny") == []
    store.go.set()
