"""Model and optimizer checkpoints at paths of the caller's: the interface of NeMo-RL's `native_checkpoint`.

Each path becomes a stock DCP directory, whole or not at all: it is staged beside its target and renamed, the model's
last. A retry after a kill between two renames completes: the journal that the kill left tells which paths were new.

    save_checkpoint(model, "step_5/weights", optimizer, scheduler, "step_5/optimizer")
    load_checkpoint(model, "step_5/weights", optimizer, scheduler, "step_5/optimizer")
    convert_dcp_to_hf("step_5/weights", "step_5/hf", "path/or/id/of/config", "path/or/id/of/tokenizer")
"""

from __future__ import annotations

import json
import logging
import os
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from ckpt_core import durable, io, ranks
from ckpt_core.errors import ArgumentError, StepExistsError
from ckpt_core.format.index import METADATA_NAME, read_index
from ckpt_core.locate import find_dcp, find_prefix
from ckpt_core.state import MODEL_KEY, OPTIMIZER_KEY, ModelState, OptimizerState
from ckpt_core.store import rename_new

__all__ = ["ModelState", "OptimizerState", "convert_dcp_to_hf", "load_checkpoint", "save_checkpoint"]

_JOURNAL = "journal.json"
_log = logging.getLogger(__name__)


def save_checkpoint(
    model: torch.nn.Module,
    weights_path: str,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: Any | None = None,
    optimizer_path: str | None = None,
    tokenizer: Any | None = None,
    tokenizer_path: str | None = None,
) -> None:
    """Save a model and, where given, its optimizer with scheduler, and its tokenizer. Collective.

    Args:
        model: the module, sharded by FSDP or not.
        weights_path: becomes the model's DCP directory; may be an empty directory.
        optimizer: saved under the names of the model's parameters.
        scheduler: saved with the optimizer.
        optimizer_path: becomes the optimizer's DCP directory.
        tokenizer: anything with `save_pretrained`; written by rank 0.
        tokenizer_path: the directory for the tokenizer's files; may exist.

    Raises:
        ValueError: a path is missing for what is to be saved.
        FileExistsError: a path holds a checkpoint or something else; nothing was written.
    """
    if optimizer is not None and optimizer_path is None:
        raise ArgumentError("optimizer_path: missing, and there is an optimizer to save; give its directory.")
    if tokenizer is not None and tokenizer_path is None:
        raise ArgumentError("tokenizer_path: missing, and there is a tokenizer to save; give its directory.")
    parts: list[_Part] = []
    if tokenizer is not None:
        parts.append(_Part(Path(str(tokenizer_path)).absolute(), _tokenizer_writer(tokenizer), shared=True))
    if optimizer is not None:
        state = {OPTIMIZER_KEY: OptimizerState(model, optimizer, scheduler)}
        parts.append(_Part(Path(str(optimizer_path)).absolute(), lambda path: _save_dcp(state, path)))
    weights = {MODEL_KEY: ModelState(model)}
    parts.append(_Part(Path(weights_path).absolute(), lambda path: _save_dcp(weights, path)))
    _commit(parts)


def load_checkpoint(
    model: torch.nn.Module,
    weights_path: str,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: Any | None = None,
    optimizer_path: str | None = None,
) -> None:
    """Load a model and, where given, its optimizer with scheduler, at any number of ranks. Collective.

    Args:
        model: filled in place.
        weights_path: a DCP directory, or one above it where a framework put it: ours, NeMo-RL's, torchtitan's,
            Accelerate's, Lightning's.
        optimizer: filled in place.
        scheduler: filled in place, where the checkpoint has one.
        optimizer_path: the optimizer's DCP directory.

    Raises:
        ValueError: `optimizer_path` is missing, or the checkpoint is damaged, hostile or of another model.
        FileNotFoundError: there is no checkpoint.
    """
    if optimizer is not None and optimizer_path is None:
        raise ArgumentError("optimizer_path: missing, and there is an optimizer to load; give its directory.")
    load_model(model, find_dcp(Path(weights_path)))
    if optimizer is not None:
        load_optimizer(OptimizerState(model, optimizer, scheduler), Path(str(optimizer_path)))


def convert_dcp_to_hf(
    dcp_ckpt_path: str,
    hf_ckpt_path: str,
    model_name_or_path: str,
    tokenizer_name_or_path: str,
    overwrite: bool = False,
) -> str:
    """Convert a DCP checkpoint to a Hugging Face directory of safetensors, without a model in memory.

    Args:
        dcp_ckpt_path: a DCP directory, or one above it where a framework put it.
        hf_ckpt_path: the directory to write; it appears whole or not at all.
        model_name_or_path: where the model's config is: a local path or Hub id.
        tokenizer_name_or_path: where the tokenizer is; None means where the config is.
        overwrite: replace `hf_ckpt_path` if it exists.

    Returns:
        `hf_ckpt_path`.

    Raises:
        FileExistsError: `hf_ckpt_path` exists and `overwrite` is false.
        FileNotFoundError: there is no checkpoint.
        ValueError: the checkpoint is damaged, or does not fit the config.
    """
    from ckpt_core.export import convert
    from ckpt_core.export.assets import fetch_assets

    assets = fetch_assets(model_name_or_path, tokenizer_name_or_path or model_name_or_path)
    convert(find_dcp(Path(dcp_ckpt_path)), Path(hf_ckpt_path), assets=assets, overwrite=overwrite)
    return hf_ckpt_path


def load_model(model: torch.nn.Module, directory: Path) -> None:
    """Collective: fill a model from the DCP directory, whatever its names have in front of the model's.

    Raises:
        MismatchError: a tensor of the model is not in it, or has another shape there.
    """
    state = ModelState(model)
    own = state.state_dict()
    index = read_index(directory)
    prefix = find_prefix(index, own, str(directory))
    extra = [name for name in index.tensors if name.startswith(prefix) and name.removeprefix(prefix) not in own]
    if extra:
        _log.warning("%s: %d tensors are not the model's and stay unread, such as %s", directory, len(extra), extra[0])
    flat = {prefix + name: value for name, value in own.items()}
    io.load(flat, directory)
    state.load_state_dict({name: flat[prefix + name] for name in own})


def load_optimizer(state: OptimizerState, directory: Path) -> None:
    """Collective: fill an optimizer and scheduler from the DCP directory that `save_checkpoint` made of them.

    Raises:
        MismatchError: the checkpoint's optimizer has other parameters, or state of another kind.
    """
    if not (directory / METADATA_NAME).exists() and (directory / "optimizer" / METADATA_NAME).exists():
        directory = directory / "optimizer"
    index = read_index(directory)
    template = state.state_dict()
    root = f"{OPTIMIZER_KEY}.optim."
    if not any(name.startswith(f"{root}state.") for name in (*index.tensors, *index.values)):
        template["optim"]["state"] = {}  # it was saved before its first step
    if not any(name.startswith(f"{OPTIMIZER_KEY}.sched.") for name in index.values):
        template.pop("sched", None)
    io.load({OPTIMIZER_KEY: template}, directory)
    if template["optim"]["state"] or not state.optimizer.param_groups:
        state.load_state_dict(template)
    else:
        _load_unused(state, template)


def _load_unused(state: OptimizerState, template: dict[str, Any]) -> None:
    """Give an optimizer the settings, and no state, of one that had not stepped: torch's own way would make some."""
    state.optimizer.state.clear()
    for group, saved in zip(state.optimizer.param_groups, template["optim"]["param_groups"], strict=True):
        group.update({name: value for name, value in saved.items() if name != "params"})
    if "sched" in template and state.scheduler is not None:
        state.scheduler.load_state_dict(template["sched"])


@dataclass(frozen=True)
class _Part:
    """One path of a save: `write` fills a new directory, on every rank; a shared one may have files already."""

    target: Path
    write: Callable[[Path], object]
    shared: bool = False


def _save_dcp(state: dict[str, Any], path: Path) -> None:
    io.save(state, path)
    ranks.first(lambda: durable.sync_tree(path))


def _tokenizer_writer(tokenizer: Any) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        tokenizer.save_pretrained(str(path))
        for _, file in durable.files_below(path):
            durable.sync_file(file)
        durable.sync_tree(path)

    return lambda path: ranks.first(lambda: write(path))


def _commit(parts: list[_Part]) -> None:
    """Collective: write each part into one staging area beside the last part's target, then rename them in order."""
    staging = Path(ranks.first(lambda: _stage(parts)))
    try:
        for number, part in enumerate(parts):
            part.write(_staged(staging, parts, number))
        ranks.first(lambda: _rename(staging, parts))
    except BaseException:
        if ranks.rank() == 0 and not _renamed(parts):
            durable.remove_tree(staging)
        raise


def _stage(parts: list[_Part]) -> str:
    """On rank 0: refuse what exists, clear what a kill left, and make the staging area; return its path."""
    target = parts[-1].target
    target.parent.mkdir(parents=True, exist_ok=True)
    leftovers = _leftovers(target)
    journaled = {name for left in leftovers for name in _read_journal(left)}
    for part in parts:
        if not part.shared and _occupied(part.target):
            if part is parts[-1] or str(part.target) not in journaled:
                raise StepExistsError(f"{part.target}: exists, and a checkpoint is never overwritten; give a new path.")
            durable.remove_tree(part.target)  # the first part of a save that was killed before its last
    for left in leftovers:
        durable.remove_tree(left)
    staging = target.parent / f".staging-{target.name}-{uuid.uuid4().hex}"
    staging.mkdir()
    return str(staging)


def _staged(staging: Path, parts: list[_Part], number: int) -> Path:
    """Return where a part is written: inside the part whose target encloses its own, or on its own."""
    target = parts[number].target
    for other, part in enumerate(parts):
        if other != number and target.is_relative_to(part.target) and not part.shared:
            return _staged(staging, parts, other) / target.relative_to(part.target)
    return staging / str(number)


def _rename(staging: Path, parts: list[_Part]) -> None:
    """On rank 0: give each staged part its name, the model's last, with a journal for the one who retries."""
    alone = [n for n in range(len(parts)) if _staged(staging, parts, n).parent == staging]
    fresh = [str(parts[n].target) for n in alone if not parts[n].shared]
    durable.write_new(staging / _JOURNAL, json.dumps(fresh).encode())
    durable.sync_directory(staging)
    for number in alone:
        part, staged = parts[number], _staged(staging, parts, number)
        part.target.parent.mkdir(parents=True, exist_ok=True)
        if part.shared and part.target.exists():
            _merge(staged, part.target)
        else:
            rename_new(staged, part.target)
    durable.remove_tree(staging)


def _merge(source: Path, target: Path) -> None:
    """Put files into a directory that has files already, each whole."""
    for name, file in durable.files_below(source):
        place = target / name
        place.parent.mkdir(parents=True, exist_ok=True)
        file.replace(place)
    durable.sync_tree(target)


def _renamed(parts: list[_Part]) -> bool:
    """Whether a part has its name already, so that the journal must stay for the one who retries."""
    return any(_occupied(part.target) for part in parts if not part.shared)


def _occupied(path: Path) -> bool:
    if path.is_dir() and not path.is_symlink():
        return next(path.iterdir(), None) is not None
    return os.path.lexists(path)


def _leftovers(target: Path) -> list[Path]:
    return list(target.parent.glob(f".staging-{target.name}-*"))


def _read_journal(staging: Path) -> list[str]:
    with suppress(FileNotFoundError, ValueError):
        return cast("list[str]", json.loads((staging / _JOURNAL).read_bytes()))
    return []
