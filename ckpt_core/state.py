"""What of a training run goes into a checkpoint: model, optimizer with scheduler, and every rank's trainer state."""

# torch.distributed.checkpoint is only partly annotated.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false

from __future__ import annotations

from typing import Any, cast

import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.stateful import Stateful

MODEL_KEY = "model"
OPTIMIZER_KEY = "optim"
_OFFLOADED = StateDictOptions(cpu_offload=True)


class ModelState(Stateful):
    """A model's state for torch.distributed.checkpoint, under the names of its parameters and buffers.

    Args:
        model: any module; wrapped by FSDP or not, its state keeps the plain names.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model

    def state_dict(self) -> dict[str, Any]:
        """Return the state on the CPU; sharded parameters as DTensors that hold this rank's part."""
        return get_model_state_dict(self.model, options=_OFFLOADED)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put the state into the model.

        Raises:
            RuntimeError: a name is missing or unknown, or a shape differs.
        """
        set_model_state_dict(self.model, state_dict)


class OptimizerState(Stateful):
    """An optimizer's state for torch.distributed.checkpoint, under the names of the parameters it belongs to.

    Args:
        model: the module whose parameters the optimizer updates.
        optimizer: the optimizer. One that has not stepped yet is left so.
        scheduler: anything with `state_dict` and `load_state_dict`, such as a learning-rate scheduler.
    """

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any | None = None) -> None:
        self.model = model
        self.optimizer = optimizer
        self.scheduler = scheduler

    def state_dict(self) -> dict[str, Any]:
        """Return `optim`, on the CPU, and with a scheduler `sched`."""
        unused = not self.optimizer.state
        optim = get_optimizer_state_dict(self.model, self.optimizer, options=_OFFLOADED)
        if unused:
            # torch made the state by a step with zero gradients; neither the live optimizer nor the step counts of
            # what is saved may tell of a step that was not taken.
            self.optimizer.state.clear()
            for state in cast("dict[str, dict[str, Any]]", optim["state"]).values():
                if isinstance(state.get("step"), torch.Tensor):
                    state["step"].zero_()
        state_dict: dict[str, Any] = {"optim": optim}
        if self.scheduler is not None:
            state_dict["sched"] = self.scheduler.state_dict()
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put the state into the optimizer and, where there is one on both sides, the scheduler."""
        set_optimizer_state_dict(self.model, self.optimizer, state_dict["optim"])
        if "sched" in state_dict and self.scheduler is not None:
            self.scheduler.load_state_dict(state_dict["sched"])
