"""State dicts read from a checkpoint as torch's own classes write them, for `load_state_dict`."""

# torch is only partly annotated.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ckpt_core import io
from ckpt_core.state import MODEL_KEY, OPTIMIZER_KEY


def read(directory: Path, component: str) -> dict[str, Any]:
    """Read `model` as `torch.nn.Module`, or `optimizer` as `torch.optim.Optimizer`, would have it.

    Tensors lie on the first GPU if there is one, as in a checkpoint that flytekit loads.
    """
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    state = io.read_state(directory, device)
    if component == "model":
        return state.get(MODEL_KEY, {})
    return _numbered(state[OPTIMIZER_KEY]["optim"])


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
