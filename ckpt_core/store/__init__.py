"""Where checkpoints live: staged where nobody looks, committed all at once, listed, leased, pinned and pruned."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ckpt_core.durable import rename_new
from ckpt_core.store.checkpoint import Checkpoint, open_local, open_remote
from ckpt_core.store.local import LocalStore
from ckpt_core.store.names import CHAMPION, MAX_STEP, parse_step, step_name
from ckpt_core.store.protocol import Pruned, Staging, Store
from ckpt_core.store.remote import RemoteStore
from ckpt_core.urls import local_path, place_of, writable_place

if TYPE_CHECKING:
    from ckpt_core.urls import AnyPath

__all__ = [
    "CHAMPION", "MAX_STEP", "Checkpoint", "LocalStore", "Pruned", "RemoteStore", "Staging", "Store", "local_path",
    "open_checkpoint", "open_store", "parse_step", "rename_new", "step_name",
]  # fmt: skip


def open_store(url: AnyPath) -> Store:
    """Return the store at `url`: a path, a `file://` URL, or one that fsspec knows (`s3://`, `gs://`, `memory://`).

    Raises:
        ArgumentError: it is none of these.
    """
    place = writable_place(url, "store")
    return LocalStore(place) if isinstance(place, Path) else RemoteStore(place)


def open_checkpoint(url: AnyPath) -> Checkpoint:
    """Return the committed step at `url`, as `open_store` takes it. Checks the manifest and every file's size.

    Raises:
        NotACheckpointError: there is no committed step.
        DamagedError: its manifest is damaged, or a file is missing or has another size.
    """
    place = place_of(url, "checkpoint")
    return open_local(place) if isinstance(place, Path) else open_remote(place)
