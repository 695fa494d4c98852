"""Which directory below a path is the DCP directory that was meant, and how its names relate to a model's."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from ckpt_core.errors import MismatchError, NotACheckpointError
from ckpt_core.format.index import METADATA_NAME, Index

if TYPE_CHECKING:
    from ckpt_core.urls import Place

_log = logging.getLogger(__name__)

MODEL_LEVELS = (
    "model",                      # a committed step of ours; NeMo-RL v2
    "weights",                    # NeMo-RL v1
    "policy/weights",             # NeMo-RL v1, a step
    "policy/weights/model",       # NeMo-RL v2, a step
    "weights/model",
    "pytorch_model_fsdp_0",       # Accelerate, FSDP
    "checkpoint",                 # Lightning's ModelParallelStrategy keeps .metadata at the top or here
)  # fmt: skip
"""Where frameworks put the model's DCP directory below the directory that a user knows."""

OTHER_COMPONENTS = (
    "optim.", "optimizer.", "optimizer_", "sched.", "scheduler.", "lr_scheduler.", "dataloader.", "train_state.",
)  # fmt: skip
"""What the names of all that frameworks keep beside a model in one DCP directory begin with; Lightning numbers them."""

_TRAINING_STATE = frozenset({
    "amp", "callback", "data_loader", "dataloader", "epoch", "global_step", "grad_scaler", "iteration", "loop",
    "loss_scaler", "lr_sched", "lr_scheduler", "opt", "optim", "optimizer", "rng", "sampler", "scaler", "sched",
    "scheduler", "step", "train", "trainer", "training",
})  # fmt: skip
"""First parts of the names of what frameworks save with a model, without a number or `state` at their end."""

_ENDING = re.compile(r"(_states?|_state_dict|s)?(_?[0-9]+)?$")


def is_training_state(name: str) -> bool:
    """Whether a name is that of a training's state next to a model in one DCP directory, such as its optimizer's."""
    first = name.partition(".")[0]
    return name.startswith(OTHER_COMPONENTS) or not {first, _ENDING.sub("", first)}.isdisjoint(_TRAINING_STATE)


def find_dcp(path: Place) -> Place:
    """Return the model's DCP directory at `path` or at a level below it where frameworks put it, and log which.

    Raises:
        NotACheckpointError: there is none, or more than one.
    """
    if (path / METADATA_NAME).exists():
        return path
    found = [path / level for level in MODEL_LEVELS if (path / level / METADATA_NAME).exists()]
    if len(found) == 1:
        _log.info("%s: the model's checkpoint is %s", path, found[0])
        return found[0]
    if found:
        raise NotACheckpointError(f"{path}: several checkpoints below it: {', '.join(map(str, found))}; give one.")
    below = sorted(p.parent for p in path.glob("*/**/" + METADATA_NAME)) if path.is_dir() else []
    hint = f"there is one at {below[0]}" if below else "give the directory that holds .metadata and *.distcp files"
    raise NotACheckpointError(f"{path}: no DCP checkpoint in it; {hint}.")


def find_prefix(index: Index, names: Iterable[str], where: str) -> str:
    """Return what the checkpoint's names of a model have before the model's own: `model.`, nothing, or other.

    Raises:
        MismatchError: no prefix makes the names meet.
    """
    names = list(names)
    if not names:
        return ""
    probe = max(names, key=len)
    stored = {*index.tensors, *index.values}
    prefixes = [name.removesuffix(probe) for name in sorted(stored) if name.endswith(probe)]
    complete = [p for p in prefixes if all(p + name in stored for name in names)]
    if not complete:
        prefix = prefixes[0] if prefixes else ""
        missing = [name for name in names if prefix + name not in stored]
        raise MismatchError(
            f"{where}: lacks {len(missing)} of the model's {len(names)} tensors, such as {', '.join(missing[:3])}; it "
            f"holds {', '.join(sorted(stored)[:3])}, ... Is it a checkpoint of this architecture?"
        )
    return min(complete, key=len)
