"""The task that any process may run, called as a task runner's worker calls it."""

from __future__ import annotations

from pathlib import Path

import pytest

from ckpt_core.errors import ArgumentError
from tasks.conversion import write_file


def test_a_worker_without_the_file_system_is_named(tmp_path: Path):
    """The error says what is missing on which machine, and what to do."""
    with pytest.raises(ArgumentError, match=r"/exports: not on .*, which is to write model\.safetensors; mount"):
        write_file.fn(str(tmp_path / "exports" / "step"), "model.safetensors")
