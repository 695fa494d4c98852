"""A training run's own state: counters of the run as JSON, and each rank's random number generators as tensors.

`trainer/state.json` holds the counters, `trainer/rank_NNNNN.safetensors` the generators of torch, CUDA, numpy and
Python, so that nothing here needs pickle.
"""

# safetensors, numpy's generators and torch are only partly annotated.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import safetensors
import torch
from safetensors.torch import load as from_safetensors
from safetensors.torch import save as to_safetensors

from ckpt_core import durable
from ckpt_core.errors import DamagedError

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
        return cast("dict[str, Any]", json.loads(path.read_bytes()))
    except (OSError, ValueError) as error:
        raise DamagedError(f"{path}: not readable ({error}); restore a copy or load an older step.") from None


def restore_generators(directory: Place, rank: int) -> bool:
    """Set this rank's generators to what they were; tell whether the checkpoint has them for this rank.

    A checkpoint that more ranks load than saved it has none for the last ones, which keep their own.
    """
    path = directory / rank_name(rank)
    if not path.exists():
        return False
    try:
        data = _read(path)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        _restore(from_safetensors(data), json.loads(header["__metadata__"]["generators"]))
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise DamagedError(f"{path}: not the state of generators ({error}); load an older step.") from None
    return True


def _read(path: Place) -> bytes:
    size = durable.file_size(path)
    if size is None or size > _MAX_BYTES:
        raise ValueError(f"expected a file of at most {_MAX_BYTES} bytes, found {size}")
    return path.read_bytes()


def rank_name(rank: int) -> str:
    """Return the name of the file with a rank's generators."""
    return f"rank_{rank:05d}.safetensors"


def _generators() -> bytes:
    _, keys, position, has_gauss, gauss = cast("tuple[Any, ...]", np.random.get_state(legacy=True))
    version, python_keys, python_gauss = random.getstate()
    tensors = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(keys.astype(np.int64)),
        "python": torch.tensor(python_keys, dtype=torch.int64),
    }
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    details = {
        "numpy": [int(position), int(has_gauss), float(gauss)],
        "python": [version, python_gauss],
    }
    return to_safetensors(tensors, metadata={"generators": json.dumps(details)})


def _restore(tensors: dict[str, torch.Tensor], details: dict[str, Any]) -> None:
    position, has_gauss, gauss = details["numpy"]
    version, python_gauss = details["python"]
    keys = tensors["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, position, has_gauss, gauss))
    random.setstate((version, tuple(tensors["python"].tolist()), python_gauss))
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
