"""Which directory below a path is the DCP directory that was meant, and how its names relate to a model's."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, cast

from ckpt_core.errors import MismatchError, NotACheckpointError
from ckpt_core.format.index import METADATA_NAME, Index, is_dcp
from ckpt_core.printable import printable_logger

if TYPE_CHECKING:
    from ckpt_core.urls import Place

_log = printable_logger(__name__)

_HINT_LEVELS, _HINT_DIRECTORIES, _HINT_ENTRIES = 4, 100, 1000
"""How far a search for a hint goes: levels, directories in all, and entries of each."""

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
    if is_dcp(path):
        return path
    found = [path / level for level in MODEL_LEVELS if is_dcp(path / level)]
    if len(found) == 1:
        _log.info("%s: the model's checkpoint is %s", path, found[0])
        return found[0]
    if found:
        raise NotACheckpointError(f"{path}: several checkpoints below it: {', '.join(map(str, found))}; give one.")
    if not path.exists():
        raise NotACheckpointError(f"{path}: no DCP checkpoint, and no such directory; give one that is there.")
    below = _first_below(path)
    hint = f"there is one at {below}" if below else "give the directory that holds .metadata and *.distcp files"
    raise NotACheckpointError(f"{path}: no DCP checkpoint in it; {hint}.")


def _first_below(path: Place) -> Place | None:
    """Return a DCP directory below one, for a hint, if a short search finds one: it may be a root, or a bucket."""
    level = [path] if path.parent != path else []
    visited = 0
    for _ in range(_HINT_LEVELS):
        children: list[Place] = []
        for directory in level[: _HINT_DIRECTORIES - visited]:
            visited += 1
            with suppress(OSError):
                entries = cast("Iterable[Place]", islice(directory.iterdir(), _HINT_ENTRIES))
                children += [entry for entry in entries if _is_directory(entry)]
        level = sorted(children)
        for directory in level[:_HINT_DIRECTORIES]:
            with suppress(OSError):
                if (directory / METADATA_NAME).exists():
                    return directory
    return None


def _is_directory(entry: Place) -> bool:
    return entry.is_dir() and not (isinstance(entry, Path) and entry.is_symlink())


def find_prefix(
    index: Index, names: Iterable[str], where: str, prefix: str | None = None, *, values: Collection[str] = ()
) -> str:
    """Return what the checkpoint's names of a model have before the model's own: `model.`, nothing, or other.

    Args:
        index: what the checkpoint holds.
        names: the model's tensors.
        where: the checkpoint, for errors.
        prefix: the user's choice, with or without its last dot; below `model.`, that may be left out. Tensors that are
            not the model's are then left unread. Without a choice, there must be none but what frameworks keep beside
            a model.
        values: the model's entries that are no tensors, which may consist of some.

    Raises:
        MismatchError: no prefix makes the names meet, more than one does, or tensors would be left unread.
    """
    names = list(names)
    stored = {*index.tensors, *index.values}
    complete = sorted(p for p in _prefixes(stored, names) if all(p + name in stored for name in names))
    if prefix is not None:
        return _chosen(prefix, complete, names, where)
    if not complete:
        missing = _fewest_missing(stored, names)
        raise MismatchError(
            f"{where}: lacks {len(missing)} of the model's {len(names)} tensors, such as {', '.join(missing[:3])}; it "
            f"holds {', '.join(sorted(stored)[:3])}, ... Is it a checkpoint of this architecture?"
        )
    left = {p: left_over(index, p, names, values) for p in complete}
    clean = [p for p in complete if not left[p]]
    if len(clean) == 1:
        return clean[0]
    if len(complete) > 1:
        raise MismatchError(
            f"{where}: holds more than one model that fits: {', '.join(map(_shown, complete))}; choose one by `prefix`."
        )
    [only], [unread] = complete, left.values()
    raise MismatchError(
        f"{where}: holds {len(unread)} tensors that the model does not have, such as {', '.join(unread[:3])}; load it "
        f"into the model that it was saved from, or give prefix={_shown(only)} to leave them unread."
    )


def left_over(index: Index, prefix: str, names: Iterable[str], values: Collection[str] = ()) -> list[str]:
    """Return the tensors of a checkpoint that are neither the model's nor what is kept beside one.

    Beside a model that has a prefix, a single tensor such as `rng` is no module's: modules have names of their own.
    """
    above = prefix[: prefix[:-1].rfind(".") + 1]  # `app.model.` stands beside `app.optimizer.`
    own = {prefix + name for name in names}
    inside = tuple(f"{prefix}{name}." for name in values)
    return [
        name
        for name in index.tensors
        if name not in own
        and not name.startswith(inside)
        and not _is_beside(name.removeprefix(above))
        and not (prefix and "." not in name.removeprefix(above))
    ]


def _is_beside(name: str) -> bool:
    return is_training_state(name) or "_extra_state" in name.split(".")


def _prefixes(stored: Iterable[str], names: list[str]) -> set[str]:
    """Return what may stand before the model's names: what stands before the longest of them."""
    if not names:
        return {next((f"{MODEL_LEVELS[0]}." for name in stored if name.startswith(f"{MODEL_LEVELS[0]}.")), "")}
    probe = max(names, key=len)
    found = {name.removesuffix(probe) for name in stored if name == probe or name.endswith("." + probe)}
    return {prefix for prefix in found if not (prefix and is_training_state(prefix))}


def _fewest_missing(stored: set[str], names: list[str]) -> list[str]:
    tries = [[name for name in names if p + name not in stored] for p in {"", *_prefixes(stored, names)}]
    return min(tries, key=len)


def _chosen(prefix: str, complete: list[str], names: list[str], where: str) -> str:
    asked = prefix.removesuffix(".") + "." if prefix else ""
    for known in (asked, f"{MODEL_LEVELS[0]}.{asked}"):
        if known in complete:
            return known
    found = f"of those that fit, it has {', '.join(map(_shown, complete))}" if complete else "no other prefix fits"
    raise MismatchError(f"{where}: holds no tensors of the model's {len(names)} below prefix {prefix!r}; {found}.")


def _shown(prefix: str) -> str:
    return repr(prefix.removesuffix("."))
