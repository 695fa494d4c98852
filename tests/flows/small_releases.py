"""What the tests of releases share: exports of tiny models that differ in how good they are, and who loads them."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from small_retrain import PROGRAMS, tiny_model

from ckpt_core import PyTorchCheckpoint
from tasks.jobs import JOBS


@dataclass(frozen=True)
class Made:
    """A committed step, the export of it, and the sha256 of each parameter."""

    step: int
    url: str
    export: str
    digests: dict[str, str]


def make_export(store: Path, tokenizer: str, *, step: int, scale: float) -> Made:
    """Commit the tiny model with its logits scaled, and export it: the surer an untrained model, the worse it is."""
    model = tiny_model(tokenizer)
    with torch.no_grad():
        model.model.norm.weight.fill_(scale)
    url = str(PyTorchCheckpoint(model).save(store, run="tiny", step=step, assets=tokenizer).url)
    request = {
        "url": url,
        "target": str(store / "tiny" / "exports" / f"scale {scale}"),
        "dtype": None,
        "max_shard_bytes": 10**9,
        "allow_nonfinite": False,
        "merge_adapter": False,
        "trust_remote_code": False,
    }
    digests = {
        name: hashlib.sha256(parameter.detach().numpy().tobytes()).hexdigest()
        for name, parameter in model.named_parameters()
    }
    return Made(step, url, JOBS["convert"](request)["export"]["path"], digests)


class Loader:
    """A process that loads models by name from a Hub."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def load(self, repository: str, revision: str | None = None) -> dict[str, str]:
        """Return the sha256 of each parameter of what `from_pretrained` gives."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([repository, revision]) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


@contextmanager
def loader(endpoint: str, home: Path) -> Iterator[Loader]:
    """Start the process that loads, with an empty cache."""
    environment: dict[str, Any] = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home)}
    command = [sys.executable, str(PROGRAMS / "loads.py")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as child:
        yield Loader(child)
        assert child.stdin is not None
        child.stdin.close()
        child.wait(30)
