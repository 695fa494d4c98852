"""Checkpoints of transformers models: stored, checked, converted and published.

Importing this loads neither torch nor transformers; they are loaded when a checkpoint is saved or read.
"""

from ckpt_core.checkpoint import PyTorchCheckpoint
from ckpt_core.errors import CkptError
from ckpt_core.store import open_checkpoint, open_store

__all__ = ["CkptError", "PyTorchCheckpoint", "open_checkpoint", "open_store"]
