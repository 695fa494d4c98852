"""Model and optimizer checkpoints at paths of the caller's: the interface of NeMo-RL's `native_checkpoint`.

Each path becomes a stock DCP directory, whole or not at all, the model's last; a retry after a kill completes.

    save_checkpoint(model, "step_5/weights", optimizer, scheduler, "step_5/optimizer")
    load_checkpoint(model, "step_5/weights", optimizer, scheduler, "step_5/optimizer")
    convert_dcp_to_hf("step_5/weights", "step_5/hf", "path/or/id/of/config", "path/or/id/of/tokenizer")
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp  # noqa: F401 # pyright: ignore[reportUnusedImport] - where NeMo-RL has it

from ckpt_core import durable, io, ranks
from ckpt_core.errors import ArgumentError
from ckpt_core.locate import find_dcp
from ckpt_core.placement import Part, place
from ckpt_core.printable import printable_logger
from ckpt_core.restore import ModelPlan, OptimizerPlan, fill
from ckpt_core.state import MODEL_KEY, OPTIMIZER_KEY, ModelState, OptimizerState
from ckpt_core.urls import local_path, name_or_path, place_of, writable_place

__all__ = [
    "ModelState", "OptimizerState", "convert_dcp_to_hf", "load_checkpoint", "save_checkpoint",
    "save_tokenizer_on_rank0",
]  # fmt: skip

_log = printable_logger(__name__)


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

    def save() -> None:
        if optimizer is not None and optimizer_path is None:
            raise ArgumentError("optimizer_path: missing, and there is an optimizer to save; give its directory.")
        if tokenizer is not None and tokenizer_path is None:
            raise ArgumentError("tokenizer_path: missing, and there is a tokenizer to save; give its directory.")
        parts: list[Part] = []
        if tokenizer is not None:
            tokenizer_target = _absolute(tokenizer_path, "tokenizer_path")
            parts.append(Part(tokenizer_target, lambda path: _save_tokenizer(tokenizer, path), shared=True))
        if optimizer is not None:
            state = OptimizerState(model, optimizer, scheduler)
            optimizer_target = _absolute(optimizer_path, "optimizer_path")
            parts.append(Part(optimizer_target, lambda path: _save_dcp(OPTIMIZER_KEY, state.content, path)))
        weights, buffers = ModelState(model), io.buffer_names(model, MODEL_KEY)
        weights_target = _absolute(weights_path, "weights_path")
        parts.append(Part(weights_target, lambda path: _save_dcp(MODEL_KEY, weights.content, path, buffers)))
        facts = _given(optimizer=optimizer, scheduler=scheduler, tokenizer=tokenizer)
        ranks.agree({**facts, "the paths": [str(part.target) for part in parts]}, "save_checkpoint")
        place(parts)

    ranks.together(save)


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

    def load() -> None:
        if optimizer is not None and optimizer_path is None:
            raise ArgumentError("optimizer_path: missing, and there is an optimizer to load; give its directory.")
        source = place_of(weights_path, "weights_path")
        optimizer_source = None if optimizer is None else place_of(cast("str", optimizer_path), "optimizer_path")
        weights = ranks.together(lambda: ModelPlan.make(model, find_dcp(source), prefix))
        facts = {**_given(optimizer=optimizer, scheduler=scheduler), "prefix": prefix}
        ranks.agree({**facts, "the paths": [str(weights.directory), str(optimizer_source)]}, "load_checkpoint")
        state = None
        if optimizer is not None and optimizer_source is not None:
            live, path = OptimizerState(model, optimizer, scheduler), optimizer_source
            state = ranks.together(lambda: OptimizerPlan.make(live, path, weights.part))
        fill(weights, state, None)

    ranks.together(load)


def convert_dcp_to_hf(
    dcp_ckpt_path: str,
    hf_ckpt_path: str,
    model_name_or_path: str,
    tokenizer_name_or_path: str,
    overwrite: bool = False,
    hf_overrides: dict[str, Any] | None = {},  # noqa: B006 - NeMo-RL's signature; it is never changed
) -> str:
    """Convert a DCP checkpoint to a Hugging Face directory of safetensors, without a model in memory.

    Args:
        dcp_ckpt_path: a DCP directory, or one above it where a framework put it; a path or URL.
        hf_ckpt_path: the directory to write, as a path or URL; it appears whole or not at all.
        model_name_or_path: where the model's config is: a local path or Hub id.
        tokenizer_name_or_path: where the tokenizer is; None means where the config is.
        overwrite: replace `hf_ckpt_path` if it exists.
        hf_overrides: values of the model's config to replace, as `AutoConfig.from_pretrained` takes them.

    Returns:
        `hf_ckpt_path`.

    Raises:
        FileExistsError: `hf_ckpt_path` exists and `overwrite` is false.
        FileNotFoundError: there is no checkpoint.
        ValueError: the checkpoint is damaged, or does not fit the config.
    """
    from ckpt_core.export import check_free, convert
    from ckpt_core.export.assets import fetch_assets
    from ckpt_core.export.overrides import override_config

    target = writable_place(hf_ckpt_path, "hf_ckpt_path")
    source = place_of(dcp_ckpt_path, "dcp_ckpt_path")
    model = name_or_path(model_name_or_path, "model_name_or_path")
    tokenizer = name_or_path(tokenizer_name_or_path, "tokenizer_name_or_path") if tokenizer_name_or_path else None
    check_free(target, overwrite=overwrite)
    directory = find_dcp(source)
    assets = fetch_assets(model, tokenizer)
    if hf_overrides:
        assets = replace(assets, config=override_config(assets.config, hf_overrides))
    convert(directory, target, assets=assets, overwrite=overwrite)
    return hf_ckpt_path


def save_tokenizer_on_rank0(tokenizer: Any, tokenizer_path: str) -> None:
    """Save a tokenizer or processor on rank 0 alone. Collective: it returns on every rank when the files are there.

    Args:
        tokenizer: anything with `save_pretrained`.
        tokenizer_path: the directory for its files.

    Raises:
        Exception: whatever `save_pretrained` raised on rank 0, on every rank.
    """
    path = local_path(tokenizer_path, "tokenizer_path")
    distributed = dist.is_available() and dist.is_initialized()
    failure: Exception | None = None
    if not distributed or dist.get_rank() == 0:
        _log.info("saving the tokenizer to %s", path)
        try:
            tokenizer.save_pretrained(tokenizer_path if Path(tokenizer_path).absolute() == path else str(path))
        except Exception as error:  # noqa: BLE001 - a tokenizer raises what it likes; every rank is to know
            failure = error
    if distributed:
        dist.barrier()  # pyright: ignore[reportUnknownMemberType] - NeMo-RL waits so, and its tests look for it

    def outcome() -> None:
        if failure is not None:
            raise failure

    ranks.each(outcome)


def _absolute(path: str | None, argument: str) -> Path:
    # Without `..`, and without following links.
    return Path(os.path.abspath(local_path(cast("str", path), argument)))  # noqa: PTH100


def _given(**arguments: object) -> dict[str, object]:
    return {name: None if argument is None else "given" for name, argument in arguments.items()}


def _save_dcp(
    key: str, content: Callable[[], dict[str, Any]], path: Path, buffers: frozenset[str] = frozenset()
) -> None:
    io.save({key: ranks.together(content)}, path, digest=False, buffers=buffers)  # each chunk has its CRC32
    ranks.first(lambda: durable.sync_tree(path))


def _save_tokenizer(tokenizer: Any, path: Path) -> None:
    """Collective: rank 0 writes the tokenizer's files; the others wait for it."""

    def flush() -> None:
        for _, file in durable.files_below(path):
            durable.sync_file(file)
        durable.sync_tree(path)

    ranks.first(lambda: path.mkdir(parents=True, exist_ok=True))
    save_tokenizer_on_rank0(tokenizer, str(path))
    ranks.first(flush)
