"""Where checkpoints live: staged where nobody looks, committed all at once, listed, leased, pinned and pruned."""

from __future__ import annotations

from pathlib import Path

from ckpt_core.durable import rename_new
from ckpt_core.store.checkpoint import Checkpoint, open_local
from ckpt_core.store.local import LocalStore
from ckpt_core.store.names import CHAMPION, MAX_STEP, parse_step, step_name
from ckpt_core.store.protocol import Pruned, Staging, Store
from ckpt_core.urls import local_path

__all__ = [
    "CHAMPION", "MAX_STEP", "Checkpoint", "LocalStore", "Pruned", "Staging", "Store", "local_path", "open_checkpoint",
    "open_store", "parse_step", "rename_new", "step_name",
]  # fmt: skip


def open_store(url: str | Path) -> Store:
    """Return the store at `url`: a path or a `file://` URL."""
    return LocalStore(url)


def open_checkpoint(url: str | Path) -> Checkpoint:
    """Return the committed step at `url`: a path or a `file://` URL. Checks the manifest and every file's size.

    Raises:
        NotACheckpointError: there is no committed step.
        DamagedError: its manifest is damaged, or a file is missing or has another size.
    """
    return open_local(local_path(url))
