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
from ckpt_core.export.architecture import find_architecture
from ckpt_core.export.assets import Assets
from ckpt_core.export.names import Table
from ckpt_core.export.plan import Plan, make_plan
from ckpt_core.format.index import read_index

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
    architecture = find_architecture(assets.config, index, settings["dtype"])
    try:
        return make_plan(index, architecture, **settings)
    except MismatchError:
        with suppress(MismatchError):  # of the two errors the first says more
            return make_plan(index, architecture.as_stored(), **settings)
        raise
