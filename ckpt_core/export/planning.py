"""Which plan a checkpoint and its assets lead to: of a model, of an adapter, or of a model with an adapter merged."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ckpt_core.errors import MismatchError
from ckpt_core.export.adapter import find_adapter, has_adapter
from ckpt_core.export.adapter_config import adapter_config
from ckpt_core.export.adapter_merge import plan_merged
from ckpt_core.export.adapter_plan import plan_adapter
from ckpt_core.export.architecture import Architecture, choose_class
from ckpt_core.export.assets import Assets
from ckpt_core.export.names import Table
from ckpt_core.export.plan import Plan, make_plan
from ckpt_core.export.torchtitan import as_native, is_native
from ckpt_core.export.weight_conversions import DEFAULT_FORM, RECORD_NAME, FileForm
from ckpt_core.format.index import Index, read_index

if TYPE_CHECKING:
    from ckpt_core.urls import Place

DEFAULT_SHARD_BYTES = 5_000_000_000


def plan_export(
    directory: Place,
    assets: Assets,
    *,
    dtype: str | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    table: Table = Table(),  # noqa: B008 - frozen
    merge_adapter: bool = False,
) -> Plan:
    """Return what `convert` would write; reads metadata alone.

    Raises:
        CheckpointError: the checkpoint is damaged, hostile, or does not fit the config.
    """
    settings: dict[str, Any] = {"dtype": dtype, "max_shard_bytes": max_shard_bytes, "table": table}
    plan = _plan(directory, assets, settings, merge_adapter=merge_adapter)
    return replace(plan, rules=(*plan.rules, *assets.rules))


def _plan(directory: Place, assets: Assets, settings: dict[str, Any], *, merge_adapter: bool) -> Plan:
    index, where, table = read_index(directory), str(directory), settings["table"]
    settings = {**settings, "where": where}
    has = has_adapter(index, table)
    if merge_adapter and not has:
        raise MismatchError(f"{where}: holds no LoRA adapter to merge; convert without merge_adapter.")
    if not assets.config and (merge_adapter or not has):
        raise MismatchError(f"{where}: there is no config of its model; give one with --model.")
    if has:
        config = adapter_config(assets, where, merge=merge_adapter)
        adapter = find_adapter(index, config, table, where)
        if not merge_adapter:
            return plan_adapter(index, adapter, dtype=settings["dtype"], where=where)
        return plan_merged(index, adapter, assets.config, **settings)
    return _plan_of_model(index, assets, settings)


def _plan_of_model(index: Index, assets: Assets, settings: dict[str, Any]) -> Plan:
    def match(architecture: Architecture) -> tuple[tuple[int, int, bool, int], Plan]:
        try:
            return _distance(plan := make_plan(index, architecture, **settings), index, 0), plan
        except MismatchError:
            with suppress(MismatchError):  # of the two errors the first says more
                return _distance(plan := make_plan(index, architecture.as_stored(), **settings), index, 1), plan
            if not is_native(index.tensors):
                raise
        native = as_native(architecture, assets.config, index.tensors, settings["where"])
        return _distance(plan := make_plan(index, native, **settings), index, 2), plan

    form = FileForm(assets.names, assets.files.get(RECORD_NAME))
    forms = (form, DEFAULT_FORM) if form != DEFAULT_FORM else (form,)
    return choose_class(assets.config, match, settings["dtype"], forms, settings["where"])


def _distance(plan: Plan, index: Index, form: int) -> tuple[int, int, bool, int]:
    """Return how far the names of a checkpoint are from those of a model that was saved as it is, for comparison."""
    name = next(iter(plan.tensors), "")
    last = index.paths.get(name, (name,))[-1]  # as the model's state dict has it
    above = len(name) - len(str(last))
    return form, len(index.tensors) - len(plan.tensors), len(plan.prefix) != above, len(plan.prefix)
