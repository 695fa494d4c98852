"""What ranks do in the tests of object stores."""

import os
from typing import Any

import sharded_training

from ckpt_core import PyTorchCheckpoint


def save(url: str, environment: dict[str, str], steps: int) -> tuple[list[Any], str]:
    """Train and save a sharded model to a URL; return its whole state, and the checkpoint's JSON."""
    os.environ.update(environment)
    training = sharded_training.Training(seed=0)
    training.train(steps)
    checkpoint = PyTorchCheckpoint(training.model, optimizer=training.optimizer)
    saved = checkpoint.save(url, step=steps, scheduler=training.scheduler, trainer={"step": steps})
    return training.whole(), saved.to_json()
