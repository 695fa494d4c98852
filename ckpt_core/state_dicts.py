"""State dicts read from a checkpoint as torch's own classes write them, for `load_state_dict`."""

# torch is only partly annotated.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ckpt_core import io
from ckpt_core.state import MODEL_KEY, OPTIMIZER_KEY, UNUSED_KEY

if TYPE_CHECKING:
    from ckpt_core.urls import Place


def read_model(directory: Place) -> dict[str, Any]:
    """Read a model as `torch.nn.Module.state_dict` gives it, on the first GPU if there is one, as flytekit has it."""
    return _read(directory).get(MODEL_KEY, {})


def read_optimizer(directory: Place) -> dict[str, Any]:
    """Read an optimizer as `torch.optim.Optimizer.state_dict` gives it."""
    saved: dict[str, Any] = _read(directory)[OPTIMIZER_KEY]
    optim: dict[str, Any] = saved["optim"]
    if UNUSED_KEY in saved:
        optim = {**optim, "state": {}}
    return _numbered(optim)


def _read(directory: Place) -> dict[str, Any]:
    return io.read_state(directory, "cuda:0" if torch.cuda.is_available() else "cpu")


def _numbered(optim: dict[str, Any]) -> dict[str, Any]:
    """Replace the names of parameters by their numbers: their places in the parameter groups, counted on."""
    groups = [dict(group) for group in optim["param_groups"]]
    names = [name for group in groups for name in group["params"]]
    number = {name: position for position, name in enumerate(names)}
    for group in groups:
        group["params"] = [number[name] for name in group["params"]]
    stored = {str(name): state for name, state in optim.get("state", {}).items()}
    others = {key: value for key, value in optim.items() if key not in {"state", "param_groups"}}
    state = {number[name]: stored.pop(str(name)) for name in names if str(name) in stored}
    return {"state": {**state, **stored}, "param_groups": groups, **others}
