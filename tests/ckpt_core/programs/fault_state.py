"""What the fault campaign saves as a step, and how a saved step is compared with it."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ckpt_core import PyTorchCheckpoint, durable
from ckpt_core.format.manifest import record_file
from ckpt_core.store import Checkpoint, LocalStore, step_name

RUN = "default"


def make(step: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return the model and optimizer of a step: a pure function of its number."""
    torch.manual_seed(step)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(5, 4)).sum().backward()
    optimizer.step()
    return model, optimizer


def save(store: Path, step: int) -> None:
    """Commit a step with everything that one can have. Collective."""
    model, optimizer = make(step)
    checkpoint = PyTorchCheckpoint(model, {"rate": 0.1}, optimizer)
    checkpoint.save(store, step=step, trainer={"step": step}, assets=store.parent / "assets", metrics={"loss": 1.0})


_known: set[str] = set()
"""Digests of the steps that this process found to be what was saved: equal ones have equal bytes."""


def newest(store: Path) -> int:
    """Return the newest committed step, after all of it was restored and found to be what was saved."""
    return _restored(_newest(store))


def newest_digested(store: Path) -> int:
    """Return the newest committed step, after all its files were found to be what its manifest says."""
    return _digested(_newest(store)).step


def every(store: Path) -> list[int]:
    """Return all steps, after each was restored and found to be what was saved. None may be there and be damaged."""
    steps = [_restored(checkpoint) for checkpoint in LocalStore(store).list(RUN)]
    names = sorted(path.name for path in (store / RUN).iterdir() if not path.name.startswith("."))
    assert names == [step_name(step) for step in steps], f"{names}, of which only {steps} are whole"
    return steps


def _newest(store: Path) -> Checkpoint:
    checkpoint = LocalStore(store).latest(RUN)
    assert checkpoint is not None, "the first step is lost"
    return checkpoint


def _digested(checkpoint: Checkpoint) -> Checkpoint:
    for name, record in checkpoint.manifest.files.items():
        assert record_file(checkpoint.path / name) == record, f"{name} is not what the manifest says"
    return checkpoint


def _restored(checkpoint: Checkpoint) -> int:
    digest, step = _digested(checkpoint).manifest.digest(), checkpoint.step
    if digest in _known:
        return step
    model, optimizer = make(0)
    expected_model, expected_optimizer = make(step)
    counters = PyTorchCheckpoint.from_url(checkpoint.path).restore(model, optimizer)
    assert counters == {"step": step}
    _assert_same(model.state_dict(), expected_model.state_dict())
    _assert_same(optimizer.state_dict(), expected_optimizer.state_dict())
    _known.add(digest)
    return step


def debris(store: Path) -> list[str]:
    """Return what lies in the run's directory and is no step."""
    return [path.name for path in durable.walk(store / RUN) if path.name.startswith((".staging-", ".trash-"))]


def _assert_same(found: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            _assert_same(found[key], value)
    elif isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    else:
        assert found == expected
