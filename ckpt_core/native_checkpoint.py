"""Model and optimizer checkpoints at paths of the caller's: the interface of NeMo-RL's `native_checkpoint`.

Each path becomes a stock DCP directory, whole or not at all, the model's last; a retry after a kill completes.

    save_checkpoint(model, "step_5/weights", optimizer, scheduler, "step_5/optimizer")
    load_checkpoint(model, "step_5/weights", optimizer, scheduler, "step_5/optimizer")
    convert_dcp_to_hf("step_5/weights", "step_5/hf", "path/or/id/of/config", "path/or/id/of/tokenizer")
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ckpt_core import durable, io, ranks
from ckpt_core.errors import ArgumentError
from ckpt_core.locate import find_dcp
from ckpt_core.placement import Part, place
from ckpt_core.restore import ModelPlan, OptimizerPlan, fill
from ckpt_core.state import MODEL_KEY, OPTIMIZER_KEY, ModelState, OptimizerState
from ckpt_core.urls import place_of

__all__ = ["ModelState", "OptimizerState", "convert_dcp_to_hf", "load_checkpoint", "save_checkpoint"]


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
    parts: list[Part] = []
    if tokenizer is not None:
        parts.append(Part(_absolute(tokenizer_path), lambda path: _save_tokenizer(tokenizer, path), shared=True))
    if optimizer is not None:
        state = OptimizerState(model, optimizer, scheduler)
        parts.append(Part(_absolute(optimizer_path), lambda path: _save_dcp(OPTIMIZER_KEY, state.content, path)))
    weights = ModelState(model)
    parts.append(Part(_absolute(weights_path), lambda path: _save_dcp(MODEL_KEY, weights.content, path)))
    place(parts)


def load_checkpoint(
    model: torch.nn.Module,
    weights_path: str,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: Any | None = None,
    optimizer_path: str | None = None,
    *,
    prefix: str | None = None,
) -> None:
    """Load a model and, where given, its optimizer with scheduler, at any number of ranks. Collective.

    Names, shapes and parameter groups are compared, and the optimizer's and scheduler's state is read whole, before
    anything is overwritten. The model's tensors are then read into their place: a damaged one leaves the model with
    part of what was loaded, and the error says so.

    Args:
        model: filled in place.
        weights_path: a DCP directory, or one above it where a framework put it: ours, NeMo-RL's, torchtitan's,
            Accelerate's, Lightning's.
        optimizer: filled in place.
        scheduler: filled in place, where the checkpoint has one.
        optimizer_path: the optimizer's DCP directory.
        prefix: which model of several in `weights_path` is meant, such as `ema`: what its names begin with. Without it,
            a checkpoint with more than one that fits, or with tensors of something else, is refused.

    Raises:
        ValueError: `optimizer_path` is missing, or the checkpoint is damaged, hostile or of another model.
        FileNotFoundError: there is no checkpoint.
    """
    if optimizer is not None and optimizer_path is None:
        raise ArgumentError("optimizer_path: missing, and there is an optimizer to load; give its directory.")
    weights = ranks.together(lambda: ModelPlan.make(model, find_dcp(place_of(weights_path)), prefix))
    state = None
    if optimizer is not None:
        live, path = OptimizerState(model, optimizer, scheduler), place_of(str(optimizer_path))
        state = ranks.together(lambda: OptimizerPlan.make(live, path, weights.part))
    fill(weights, state, None)


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
    from ckpt_core.export import check_free, convert
    from ckpt_core.export.assets import fetch_assets

    target = Path(hf_ckpt_path)
    check_free(target, overwrite=overwrite)
    directory = find_dcp(place_of(dcp_ckpt_path))
    assets = fetch_assets(model_name_or_path, tokenizer_name_or_path or model_name_or_path)
    convert(directory, target, assets=assets, overwrite=overwrite)
    return hf_ckpt_path


def _absolute(path: str | None) -> Path:
    return Path(os.path.abspath(str(path)))  # noqa: PTH100 - without `..`, and without following links


def _save_dcp(key: str, content: Callable[[], dict[str, Any]], path: Path) -> None:
    io.save({key: ranks.together(content)}, path, digest=False)  # each chunk has its CRC32
    ranks.first(lambda: durable.sync_tree(path))


def _save_tokenizer(tokenizer: Any, path: Path) -> None:
    """Collective: rank 0 writes the tokenizer's files; the others wait for it."""

    def write() -> None:
        path.mkdir(parents=True, exist_ok=True)
        tokenizer.save_pretrained(str(path))
        for _, file in durable.files_below(path):
            durable.sync_file(file)
        durable.sync_tree(path)

    ranks.first(write)
