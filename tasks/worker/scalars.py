"""The scalars of a training for TensorBoard, `<store>/<run>/tensorboard`; `tensorboard --logdir STORE` shows them."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ckpt_core.errors import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

DIRECTORY = "tensorboard"
_TAGS = {
    "loss": "loss/train",
    "heldout_loss": "loss/heldout",
    "learning_rate": "optimizer/learning_rate",
    "grad_norm": "optimizer/grad_norm",
}
"""What each number of a step's record is called."""


class Scalars:
    """Writes the scalars of the steps after the one that training resumes from; those after it are told anew."""

    def __init__(self, run: Path, *, resume_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(run / DIRECTORY), purge_step=resume_step + 1)  # has no annotations

    def step(self, entry: Mapping[str, Any]) -> None:
        """Write an optimizer step; see `tasks.worker.step_log`."""
        for name, tag in _TAGS.items():
            if name in entry:
                self._writer.add_scalar(tag, entry[name], entry["step"])
        self._writer.add_scalar("speed/tokens_per_second", entry["tokens"] / max(entry["seconds"], 1e-9), entry["step"])

    def save(self, step: int, blocked_s: float) -> None:
        """Write how long a save blocked training, in seconds."""
        self._writer.add_scalar("speed/save_blocked_seconds", blocked_s, step)

    def flush(self) -> None:
        """Write what is still in memory."""
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


def check_tensorboard() -> None:
    """Refuse to begin what could not be written.

    Raises:
        ArgumentError: the package is not installed.
    """
    if find_spec("tensorboard") is None:
        raise ArgumentError(
            "compute.tensorboard is on, but the package tensorboard is not installed; run "
            "`pip install 'ckptflow[tensorboard]'`, or turn it off"
        )
