"""Filling live objects from a DCP directory, at any number of ranks, whatever framework wrote it."""

# torch.distributed's tensors are only partly annotated.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.distributed.tensor import DTensor

from ckpt_core import io, ranks, trainer
from ckpt_core.errors import DamagedError, MismatchError
from ckpt_core.format.digests import algorithm_of
from ckpt_core.format.index import METADATA_NAME, TWIN_NAME, Index, Keys, TensorEntry, read_index
from ckpt_core.format.manifest import record_file
from ckpt_core.io.nesting import nest
from ckpt_core.locate import OTHER_COMPONENTS, find_prefix
from ckpt_core.state import OPTIMIZER_KEY, UNUSED_KEY, ModelState, OptimizerState

if TYPE_CHECKING:
    from ckpt_core.store import Checkpoint
    from ckpt_core.urls import Place

_EXTRA = "_extra_state"
_log = logging.getLogger(__name__)


def load_model(model: torch.nn.Module, directory: Place) -> None:
    """Collective: fill a model from the DCP directory, whatever its names have in front of the model's.

    Raises:
        MismatchError: a tensor of the model is not in it, or has another shape there.
    """
    state = ModelState(model)
    own = state.state_dict()
    tensors = {name: value for name, value in own.items() if not _is_extra(name)}

    def look() -> tuple[Index, str]:
        index = read_index(directory)
        return index, find_prefix(index, tensors, str(directory))

    index, prefix = ranks.together(look)
    _tell_unread(index, prefix, own, directory)
    flat = {prefix + name: value for name, value in tensors.items()}
    extra = {name: _blank(index, name) for name in _in_saved_order(index, prefix) if _is_extra(name)}
    read = flat | extra
    io.load(read, directory, index=index)
    loaded = {name: read[prefix + name] for name in tensors}
    paths = {name: _extra_path(index, name, prefix) for name in extra}
    loaded |= nest({name: read[name] for name in extra}, paths, str(directory))
    state.load_state_dict({name: loaded.get(name, own[name]) for name in own})


def load_optimizer(state: OptimizerState, directory: Place) -> None:
    """Collective: fill an optimizer and scheduler from the DCP directory that `save_checkpoint` made of them.

    Raises:
        MismatchError: the checkpoint's optimizer has other parameters, or state of another kind.
    """

    def look() -> tuple[Place, Index]:
        below = directory / "optimizer"
        at_top = (directory / METADATA_NAME).exists() or not (below / METADATA_NAME).exists()
        found = directory if at_top else below
        return found, read_index(found)

    directory, index = ranks.together(look)
    flat = ranks.together(lambda: _optimizer_targets(state, index, directory))
    io.load(flat, directory, index=index)
    loaded = nest(flat, index.paths, str(directory))[OPTIMIZER_KEY]
    optim = {"state": {}, **loaded["optim"]}
    if UNUSED_KEY in loaded:
        optim["state"] = {}
    filled = {"optim": optim}
    if "sched" in loaded and state.scheduler is not None:
        filled["sched"] = like(state.scheduler.state_dict(), loaded["sched"])
    state.load_state_dict(filled)


def load_trainer(checkpoint: Checkpoint, rank: int, *, generators: bool) -> dict[str, Any]:
    """Return a step's counters, empty if it has none, and set this rank's generators if asked to.

    Raises:
        DamagedError: they are not readable.
    """
    directory = checkpoint.component("trainer")
    if directory is None:
        return {}
    state = trainer.load(directory)  # before any generator changes
    if generators:
        trainer.restore_generators(directory, rank)
    return state


def check_records(checkpoint: Checkpoint, rank: int) -> None:
    """Compare what of a step no CRC32 guards, and this rank reads, with the manifest: metadata and trainer state.

    Raises:
        DamagedError: a file is not what was committed.
    """
    own = {f"trainer/{trainer.STATE_NAME}", f"trainer/{trainer.rank_name(rank)}"}
    for name, record in checkpoint.manifest.files.items():
        if not (name in own or name.endswith((f"/{METADATA_NAME}", f"/{TWIN_NAME}"))):
            continue
        found = record_file(checkpoint.root / name, algorithm_of(record.digest))
        if found != record:
            raise DamagedError(
                f"{checkpoint.root / name}: {found.bytes} bytes, {found.digest}; the manifest says {record.bytes}, "
                f"{record.digest}. Restore a copy, or load an older step."
            )


def like(live: Any, stored: Any) -> Any:
    """Return `stored` with numbers for keys, and counters, where `live` has them: DCP turns every key to text."""
    if not (isinstance(live, dict) and isinstance(stored, dict)):
        return stored
    pattern, content = cast("dict[Any, Any]", live), cast("dict[Any, Any]", stored)
    numbers = any(isinstance(key, int) for key in pattern)
    built = {(int(k) if numbers else k): like(pattern.get(k), v) for k, v in content.items()}
    return Counter(built) if isinstance(live, Counter) else built


def _optimizer_targets(state: OptimizerState, index: Index, directory: Place) -> dict[str, Any]:
    """Return what to read of an optimizer, by flat name: tensors in the shape and sharding that the live one has."""
    root = f"{OPTIMIZER_KEY}."
    if not _names(index, f"{root}optim.param_groups."):
        held = ", ".join(_names(index, "")[:3])
        raise MismatchError(f"{directory}: holds no optimizer ({held}, ...); give the optimizer's directory.")
    parameters = _parameters(state)
    live = state.state_dict()["optim"]["state"]
    targets: dict[str, Any] = {}
    for name in _in_saved_order(index, root):
        place, parameter, key = (*index.paths.get(name, ()), *[None] * 5)[2:5]
        if name in index.tensors and place == "state" and parameter in parameters:
            pattern = live.get(parameter, {}).get(key)
            targets[name] = _target(index.tensors[name], parameters[parameter], pattern)
        else:
            targets[name] = _blank(index, name)
    return targets


def _target(entry: TensorEntry, parameter: torch.Tensor, pattern: Any) -> torch.Tensor:
    """Return a tensor to read a parameter's state into: the live state's, or one like the parameter or what is stored.

    With the live state's shape and sharding, one of another shape is found when it is read.
    """
    dtype = getattr(torch, entry.dtype)
    if isinstance(pattern, torch.Tensor):
        return pattern if pattern.dtype == dtype else torch.empty_like(pattern, dtype=dtype)
    if isinstance(parameter, DTensor) and tuple(parameter.shape) == entry.shape:
        return torch.empty_like(parameter.detach().to("cpu"), dtype=dtype)
    return torch.empty(entry.shape, dtype=dtype)


def _parameters(state: OptimizerState) -> dict[str, torch.Tensor]:
    groups = zip(state.names(), state.optimizer.param_groups, strict=True)
    return {name: p for names, group in groups for name, p in zip(names, group["params"], strict=True)}


def _names(index: Index, prefix: str) -> list[str]:
    return [name for name in (*index.tensors, *index.values) if name.startswith(prefix)]


def _in_saved_order(index: Index, prefix: str) -> list[str]:
    place = {name: place for place, name in enumerate(index.paths)}
    return sorted(_names(index, prefix), key=lambda name: place.get(name, len(place)))


def _blank(index: Index, name: str) -> torch.Tensor | None:
    """Return a place to read an entry of a checkpoint into."""
    entry = index.tensors.get(name)
    return None if entry is None else torch.empty(entry.shape, dtype=getattr(torch, entry.dtype))


def _is_extra(name: str) -> bool:
    return _EXTRA in name.split(".")


def _extra_path(index: Index, name: str, prefix: str) -> Keys:
    """Return the module's name of an extra state, and where in it the entry `name` belongs."""
    path = index.paths.get(name, (name,))
    end = 1 + next(place for place, key in enumerate(path) if str(key).split(".")[-1] == _EXTRA)
    return (".".join(map(str, path[:end])).removeprefix(prefix), *path[end:])


def _tell_unread(index: Index, prefix: str, own: Mapping[str, Any], directory: Place) -> None:
    unread = [
        name
        for name in index.tensors
        if name.startswith(prefix)
        and name.removeprefix(prefix) not in own
        and not _is_extra(name)
        and not name.startswith(OTHER_COMPONENTS)
    ]
    if unread:
        count = len(unread)
        _log.warning("%s: %d tensors are not the model's and stay unread, such as %s", directory, count, unread[0])
