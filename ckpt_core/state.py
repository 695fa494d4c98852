"""What of a training run goes into a checkpoint: model, optimizer with scheduler, and every rank's trainer state."""

# torch.distributed.checkpoint is only partly annotated.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false

from __future__ import annotations

import io
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import numpy as np
import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
)
from torch.distributed.checkpoint.stateful import Stateful

from ckpt_core.errors import ArgumentError, MismatchError

MODEL_KEY = "model"
OPTIMIZER_KEY = "optim"
UNUSED_KEY = "unused"
"""Beside the state of an optimizer that was saved before its first step: what is there is torch's filling."""


class ModelState(Stateful):
    """A model's state for torch.distributed.checkpoint, under the names of its parameters and buffers.

    Args:
        model: any module; wrapped by FSDP or not, its state keeps the plain names.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model

    def state_dict(self, *, offload: bool = True) -> dict[str, Any]:
        """Return the state; sharded parameters as DTensors that hold this rank's part.

        Args:
            offload: bring it to the CPU.
        """
        return get_model_state_dict(self.model, options=StateDictOptions(cpu_offload=offload))

    def content(self, *, offload: bool = True) -> dict[str, Any]:
        """Return what is saved: the state dict, readable without running code.

        Args:
            offload: bring it to the CPU.

        Raises:
            ArgumentError (a ValueError): something in it could not be read back.
        """
        with _named_values(self.model.state_dict, MODEL_KEY):
            return storable(self.state_dict(offload=offload), MODEL_KEY)

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

    def state_dict(self, *, offload: bool = True) -> dict[str, Any]:
        """Return `optim`, and with a scheduler `sched`.

        Args:
            offload: bring it to the CPU.
        """
        unused = not self.optimizer.state
        with _set_aside_gradients(self.optimizer) if unused else nullcontext():
            optim = self._by_name(StateDictOptions(cpu_offload=offload))
        if unused:
            # torch made the state by a step with zero gradients; neither the live optimizer nor the step counts of
            # what is saved may tell of a step that was not taken.
            self.optimizer.state.clear()
            for state in optim["state"].values():
                if isinstance(state.get("step"), torch.Tensor):
                    state["step"].zero_()
        state_dict: dict[str, Any] = {"optim": optim}
        if self.scheduler is not None:
            state_dict["sched"] = self.scheduler.state_dict()
        return state_dict

    def content(self, *, offload: bool = True) -> dict[str, Any]:
        """Return what is saved: the state dict, readable without running code, marked where no step was taken.

        Args:
            offload: bring it to the CPU.

        Raises:
            ArgumentError (a ValueError): something in it could not be read back.
        """
        marks = {} if self.optimizer.state else {UNUSED_KEY: True}
        with _named_values(self.optimizer.state_dict, "optim"):
            return storable({**self.state_dict(offload=offload), **marks}, OPTIMIZER_KEY)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put the state into the optimizer and, where there is one on both sides, the scheduler.

        A parameter of which the state dict has no state, as it never had a gradient, has none afterwards.

        Raises:
            MismatchError (a ValueError): the parameter groups hold other parameters than the optimizer's.
        """
        optim = state_dict["optim"]
        groups = [_group_of(names, optim["param_groups"]) for names in self.names()]
        known = {name for group in groups for name in group["params"]}
        state = {name: value for name, value in optim["state"].items() if name in known}
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        if "sched" in state_dict and self.scheduler is not None:
            self.scheduler.load_state_dict(state_dict["sched"])

    def names(self) -> list[list[str]]:
        """Return the names of the parameters in each of the optimizer's groups."""
        unused = not self.optimizer.state
        if unused:  # then a state, though an empty one, keeps torch from making all by a step
            self.optimizer.state[next(p for group in self.optimizer.param_groups for p in group["params"])] = {}
        try:
            optim = self._by_name()
        finally:
            if unused:
                self.optimizer.state.clear()
        return [list(group["params"]) for group in optim["param_groups"]]

    def _by_name(self, options: StateDictOptions | None = None) -> dict[str, Any]:
        try:
            return cast("dict[str, Any]", get_optimizer_state_dict(self.model, self.optimizer, options=options))
        except KeyError:
            raise MismatchError(
                "optimizer: updates parameters that are not the module's; make it of module.parameters(), after the "
                "module was moved, wrapped or sharded."
            ) from None


def _group_of(names: list[str], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the saved parameter group of these parameters, in the order of `names`."""
    for group in groups:
        if set(group["params"]) == set(names):
            return {**group, "params": names}
    saved = [name for group in groups for name in group["params"]]
    unknown = sorted(set(map(str, saved)) ^ set(names))
    raise MismatchError(
        f"optimizer: no saved parameter group is that of {', '.join(names[:3])}, ...; "
        + (f"only one side has {', '.join(unknown[:3])}. " if unknown else "the groups are divided otherwise. ")
        + "Make the optimizer as it was when it was saved."
    )


@contextmanager
def _set_aside_gradients(optimizer: torch.optim.Optimizer) -> Generator[None]:
    """Hide gradients, with which torch would not make the state of an optimizer that has not stepped."""
    held = [(p, p.grad) for group in optimizer.param_groups for p in group["params"]]
    for parameter, _ in held:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in held:
            parameter.grad = gradient


@contextmanager
def _named_values(state_dict: Callable[[], dict[str, Any]], where: str) -> Generator[None]:
    """Name the value that torch could not move to the CPU: its own error tells the type alone."""
    try:
        yield
    except ArgumentError:
        raise
    except ValueError:
        storable(state_dict(), where)
        raise


def storable(value: Any, where: str) -> Any:
    """Return a state dict as it can be read back without running code: numpy's numbers become Python's.

    Raises:
        ArgumentError (a ValueError): something in it could not be read back.
    """
    if value is None or isinstance(value, (torch.Tensor, bool, int, float, complex, str, bytes)):
        return value.item() if isinstance(value, np.generic) else value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {name: storable(entry, f"{where}.{name}") for name, entry in cast("Mapping[Any, Any]", value).items()}
    if type(value) in {list, tuple}:
        return type(value)(storable(entry, f"{where}.{place}") for place, entry in enumerate(value))
    try:
        buffer = io.BytesIO()
        torch.save(value, buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True)
    except Exception:  # noqa: BLE001 - pickling runs the object's own code, which may raise anything
        raise ArgumentError(
            f"{where}: a {type(value).__module__}.{type(value).__qualname__} could not be read back without running "
            "code; keep numbers, text, lists, dicts and tensors in state dicts."
        ) from None
    return value
