"""A training run's own state: counters of the run as JSON, and each rank's random number generators as tensors.

`trainer/state.json` holds the counters, `trainer/rank_NNNNN.safetensors` the generators of torch, CUDA, numpy and
Python, so that nothing here needs pickle.
"""

# safetensors, numpy's generators and torch are only partly annotated.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from safetensors.torch import save as to_safetensors

from ckpt_core import documents
from ckpt_core.errors import DamagedError
from ckpt_core.generators import read_generators
from ckpt_core.json_types import TYPES_KEY, with_types

if TYPE_CHECKING:
    from ckpt_core.urls import Place

STATE_NAME = "state.json"
_MAX_BYTES = 1 << 26


def content(state: Mapping[str, Any], rank: int) -> dict[str, bytes]:
    """Return this rank's generators as they are now and, on rank 0, the counters: as files by name."""
    files = {rank_name(rank): _generators()}
    if rank == 0:
        files[STATE_NAME] = (json.dumps(state, indent=1) + "\n").encode()
    return files


def load(directory: Place) -> dict[str, Any]:
    """Read the counters.

    Raises:
        DamagedError: they are not readable.
    """
    path = directory / STATE_NAME
    try:
        state = documents.read_object(path, _MAX_BYTES)
        types = state.pop(TYPES_KEY, None)
        return cast("dict[str, Any]", with_types(state, types))
    except (OSError, ValueError) as error:
        raise DamagedError(f"{path}: not readable ({error}); restore a copy or load an older step.") from None


def stored_generators(directory: Place, rank: int) -> Callable[[], None] | None:
    """Read this rank's generators, and return what sets the live ones; None where the checkpoint has none for it.

    A checkpoint that more ranks load than saved it has none for the last ones, which keep their own.

    Raises:
        DamagedError: a state is one that its generator never has.
    """
    path = directory / rank_name(rank)
    if not path.exists():
        return None
    stored = read_generators(path)

    def restore() -> None:
        np.random.set_state(stored.numpy)
        random.setstate(stored.python)
        torch.set_rng_state(torch.from_numpy(stored.torch))
        if stored.cuda is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(torch.from_numpy(stored.cuda))

    return restore


def rank_name(rank: int) -> str:
    """Return the name of the file with a rank's generators."""
    return f"rank_{rank:05d}.safetensors"


def _generators() -> bytes:
    _, keys, position, has_gauss, gauss = cast("tuple[Any, ...]", np.random.get_state(legacy=True))
    version, python_keys, python_gauss = random.getstate()
    tensors = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(keys.astype(np.int64)),
        "python": torch.tensor(python_keys, dtype=torch.int64, device="cpu"),
    }
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    details = {
        "numpy": [int(position), int(has_gauss), float(gauss)],
        "python": [version, python_gauss],
    }
    return to_safetensors(tensors, metadata={"generators": json.dumps(details)})
