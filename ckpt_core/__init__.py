"""Checkpoints of transformers models: stored, checked, converted and published.

Importing this loads neither torch nor transformers; they are loaded when a checkpoint is saved or read.
"""

from typing import TYPE_CHECKING, Any

from ckpt_core.checkpoint import PyTorchCheckpoint
from ckpt_core.errors import CkptError
from ckpt_core.store import open_checkpoint, open_store

if TYPE_CHECKING:
    from ckpt_core.async_save import AsyncSaver

__all__ = ["AsyncSaver", "CkptError", "PyTorchCheckpoint", "open_checkpoint", "open_store"]


def __getattr__(name: str) -> Any:
    if name == "AsyncSaver":  # loads torch
        from ckpt_core.async_save import AsyncSaver

        return AsyncSaver
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
