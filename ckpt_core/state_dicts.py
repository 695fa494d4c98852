"""State dicts read from a checkpoint as torch's own classes write them, for `load_state_dict`."""

# torch is only partly annotated.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from ckpt_core import io
from ckpt_core.errors import MismatchError
from ckpt_core.format.index import Keys, read_index
from ckpt_core.io.nesting import nest
from ckpt_core.restore import like
from ckpt_core.state import MODEL_KEY, OPTIMIZER_KEY, UNUSED_KEY

if TYPE_CHECKING:
    from ckpt_core.urls import Place


def read_model(directory: Place) -> dict[str, Any]:
    """Read a model as `torch.nn.Module.state_dict` gives it, on the first GPU if there is one, as flytekit has it."""
    return _read(directory).get(MODEL_KEY, {})


def read_optimizer(directory: Place) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Read an optimizer as `torch.optim.Optimizer.state_dict` gives it, and its scheduler's state if it has one."""
    saved: dict[str, Any] = _read(directory)[OPTIMIZER_KEY]
    optim: dict[str, Any] = saved["optim"]
    if UNUSED_KEY in saved:
        optim = {**optim, "state": {}}
    return _numbered(optim), saved.get("sched")


def load_optimizer(optimizer: torch.optim.Optimizer, scheduler: Any | None, directory: Place) -> None:
    """Fill an optimizer, and its scheduler, that was saved without its module: by the numbers of its parameters.

    Raises:
        MismatchError: it has other groups.
    """
    optim, sched = read_optimizer(directory)
    try:
        optimizer.load_state_dict(optim)
    except ValueError as error:
        raise MismatchError(f"{directory}: {error}; load it into the optimizer that it was saved from.") from None
    if sched is not None and scheduler is not None:
        scheduler.load_state_dict(like(scheduler.state_dict(), sched))


def _read(directory: Place) -> dict[str, Any]:
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    return _in_saved_order(io.read_state(directory, device), read_index(directory).paths, str(directory))


def _in_saved_order(state: dict[str, Any], paths: Mapping[str, Keys], where: str) -> dict[str, Any]:
    """Return a nested state dict with its keys in the order in which they were saved."""
    flat: dict[str, Any] = {}
    for name, path in paths.items():
        value: Any = state
        for key in path:
            value = value[key]
        flat[name] = value
    return nest(flat, paths, where) if flat else state


def _numbered(optim: dict[str, Any]) -> dict[str, Any]:
    """Replace the names of parameters by their numbers: their places in the parameter groups, counted on."""
    groups = [dict(group) for group in optim["param_groups"]]
    names = [name for group in groups for name in group["params"]]
    number = {name: position for position, name in enumerate(names)}
    for group in groups:
        group["params"] = [number[name] for name in group["params"]]
    stored = {str(name): state for name, state in optim.get("state", {}).items()}
    return {
        "state": {number[name]: stored[str(name)] for name in names if str(name) in stored},
        "param_groups": groups,
    }
