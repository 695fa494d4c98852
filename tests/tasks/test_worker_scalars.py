"""TensorBoard's scalars: what it reads, what a resume drops, and what a missing package is told."""

from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ckpt_core.errors import ArgumentError
from tasks.worker import scalars
from tasks.worker.scalars import Scalars, check_tensorboard


def entry(step: int, **more: float) -> dict[str, float]:
    """Return the record of a step."""
    return {
        "step": step, "loss": 8.0 - step, "learning_rate": 0.5, "grad_norm": 2.0, "tokens": 100, "seconds": 0.5
    } | more  # fmt: skip


def test_tensorboard_reads_the_scalars_of_a_training_that_was_resumed(tmp_path: Path):
    """Each number of the record is a scalar; those after the step that training resumed from are told anew."""
    first = Scalars(tmp_path, resume_step=0)
    for step in (1, 2, 3):
        first.step(entry(step))
    first.save(2, 0.25)
    first.close()
    second = Scalars(tmp_path, resume_step=2)
    second.step(entry(3, loss=1.0, heldout_loss=1.5))
    second.flush()
    second.close()
    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    told = {tag: [(event.step, event.value) for event in read.Scalars(tag)] for tag in read.Tags()["scalars"]}
    assert told == {
        "loss/train": [(1, 7.0), (2, 6.0), (3, 1.0)],
        "loss/heldout": [(3, 1.5)],
        "optimizer/learning_rate": [(step, 0.5) for step in (1, 2, 3)],
        "optimizer/grad_norm": [(step, 2.0) for step in (1, 2, 3)],
        "speed/tokens_per_second": [(step, 200.0) for step in (1, 2, 3)],
        "speed/save_blocked_seconds": [(2, 0.25)],
    }


def test_a_missing_package_is_named_before_training(monkeypatch: pytest.MonkeyPatch):
    """The error says what to install, and what to turn off instead."""
    check_tensorboard()
    monkeypatch.setattr(scalars, "find_spec", lambda name: None)
    with pytest.raises(ArgumentError, match=r"pip install 'ckptflow\[tensorboard\]'`, or turn it off"):
        check_tensorboard()
