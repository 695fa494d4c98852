"""The checkpoints that the training steps of a retrain ended with, as facts for tools."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ConfigDict
from typing_extensions import TypedDict

from ckpt_core import open_checkpoint
from ckpt_core.errors import CheckpointError
from ckpt_core.format.manifest import Manifest

DESCRIBED = ConfigDict(use_attribute_docstrings=True)
"""Has a JSON schema say what the docstrings of fields do."""


class Parent(TypedDict):
    """The checkpoint whose weights a training step started from."""

    step: int
    url: str
    digest: str | None
    """None where it was deleted since."""


class TrainedCheckpoint(TypedDict):
    """The checkpoint that a training step ended with. Losses are in nats a token; None where none was recorded."""

    step: int
    url: str
    digest: str
    """Of its manifest, and so of all that it holds, as `algorithm:hex`."""
    bytes: int
    training_step: str | None
    """Its name in the settings."""
    data_source: str | None
    """What the training text is called in the settings."""
    data: str | None
    """The digest of the training tokens."""
    code_revision: str | None
    train_loss: float | None
    heldout_loss: float | None
    parent: Parent | None
    """None where the training step started from pretrained weights, or from none."""


for _facts in (Parent, TrainedCheckpoint):
    _facts.__pydantic_config__ = DESCRIBED  # pyright: ignore[reportAttributeAccessIssue] - how pydantic wants it


def trained_checkpoint(url: str) -> TrainedCheckpoint:
    """Return what is told of the checkpoint at a URL."""
    manifest = open_checkpoint(url).manifest
    metrics, lineage = manifest.metrics, manifest.lineage
    return {
        "step": manifest.step,
        "url": url,
        "digest": manifest.digest(),
        "bytes": manifest.nbytes,
        "training_step": lineage.get("training_step"),
        "data_source": lineage.get("data_source"),
        "data": lineage.get("data"),
        "code_revision": lineage.get("code_revision"),
        "train_loss": metrics.get("train_loss"),
        "heldout_loss": metrics.get("heldout_loss"),
        "parent": _origin(manifest),
    }


def _origin(manifest: Manifest) -> Parent | None:
    """Return what a training step started from: the first of a checkpoint's ancestors that it did not make itself."""
    recorded, start = manifest.lineage.get("parent"), manifest.hyperparameters.get("start_step")
    while recorded:
        parent = _read(recorded)
        if parent is None or start is None or parent.step <= start:
            digest = parent.digest() if parent else None
            return {"step": recorded["step"], "url": recorded["url"], "digest": digest}
        recorded = parent.lineage.get("parent")
    return None


def _read(recorded: Mapping[str, Any]) -> Manifest | None:
    try:
        return open_checkpoint(recorded["url"]).manifest
    except CheckpointError:
        return None
