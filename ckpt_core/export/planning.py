"""Which plan a checkpoint and its assets lead to: of a model, of an adapter, or of a model with an adapter merged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from ckpt_core.errors import MismatchError
from ckpt_core.export.adapter import Adapter, embedding_rows, find_adapter, has_adapter
from ckpt_core.export.adapter_config import ADAPTER_CONFIG_NAME, adapter_config
from ckpt_core.export.adapter_merge import plan_merged
from ckpt_core.export.adapter_plan import plan_adapter
from ckpt_core.export.architecture import Architecture, choose_class
from ckpt_core.export.assets import Assets, check_generation_config, lacks_tokenizer_json
from ckpt_core.export.names import Table
from ckpt_core.export.plan import MoreRowsError, Plan, TrimRule, make_plan
from ckpt_core.export.quantization import check_no_scales, without_quantization
from ckpt_core.export.torchtitan import as_native, is_native
from ckpt_core.export.vocabulary import (
    all_ids,
    check_loaded_tokenizer,
    check_special_ids,
    check_tokenizer,
    load_sizes,
    resized,
    vocabulary_size,
)
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
    if not has and not assets.config and ADAPTER_CONFIG_NAME in assets.files:
        adapter_config(assets, where, merge=False)  # of another kind, it says so
        raise MismatchError(
            f"{where}: holds no LoRA adapter, though {ADAPTER_CONFIG_NAME} is that of one, and there is no config of "
            "its model; give one with --model, or the checkpoint of the adapter."
        )
    if not assets.config and (merge_adapter or not has):
        raise MismatchError(f"{where}: there is no config of its model; give one with --model.")
    check_no_scales({name: entry.dtype for name, entry in index.tensors.items()}, where)
    if not has:
        return _plan_model(partial(_plan_plain, index, settings, assets), assets, where)
    adapter = find_adapter(index, adapter_config(assets, where, merge=merge_adapter), table, where)
    if not merge_adapter:
        rules = _check_adapter_tokens(adapter, index, assets, where)
        plan = plan_adapter(index, adapter, dtype=settings["dtype"], where=where)
        return replace(plan, rules=(*plan.rules, *rules))
    return _plan_model(lambda config, trim: plan_merged(index, adapter, config, **settings, trim=trim), assets, where)


def _check_adapter_tokens(adapter: Adapter, index: Index, assets: Assets, where: str) -> list[str]:
    """Compare the tokenizer with the embeddings that lie in the checkpoint, or else with the config of the base model.

    Raises:
        MismatchError: a token has no row.
    """
    used = assets.tokens
    if rows := embedding_rows(adapter, index):
        check_tokenizer(used=used, rows=rows, what="the model that was trained", where=where)
    base = vocabulary_size(assets.config)
    if used is None or base is None or used <= base:
        return []
    return [
        f"vocabulary: the tokenizer has token ids up to {used - 1}, and the config of the base model says {base} "
        "tokens; resize its embeddings before the adapter is loaded"
    ]


def _plan_plain(
    index: Index, settings: dict[str, Any], assets: Assets, config: Mapping[str, Any], trim: TrimRule
) -> Plan:
    settings = {**settings, "trim": trim}

    def match(architecture: Architecture) -> tuple[tuple[int, int, bool, int], Plan]:
        try:
            return _distance(plan := make_plan(index, architecture, **settings), index, 0), plan
        except MismatchError:
            with suppress(MismatchError):  # of the two errors the first says more
                return _distance(plan := make_plan(index, architecture.as_stored(), **settings), index, 1), plan
            if not is_native(index.tensors):
                raise
        native = as_native(architecture, config, index.tensors, settings["where"])
        return _distance(plan := make_plan(index, native, **settings), index, 2), plan

    form = FileForm(assets.names, assets.files.get(RECORD_NAME))
    forms = (form, DEFAULT_FORM) if form != DEFAULT_FORM else (form,)
    return choose_class(config, match, settings["dtype"], forms, settings["where"])


def _plan_model(make: Callable[[Mapping[str, Any], TrimRule], Plan], assets: Assets, where: str) -> Plan:
    """Plan an export that has a row for each token in use, with the config that says so.

    Rows that something may use are kept, though the config of a base model does not know them: a row too much costs a
    few bytes, and can still be cut off; one too few was trained for nothing.
    """
    rules: list[str] = []
    trim = _trim_rule(assets)
    try:
        plan = make(assets.config, trim)
    except MoreRowsError as found:
        try:
            plan = make(resized(assets.config, found.rows - found.expected), trim)
        except MoreRowsError:  # what the config says of its vocabulary is not what gives this table its rows
            raise MismatchError(f"{where}: {found}; give the config that it was trained with.") from None
        rules.append(
            f"vocabulary: set to {plan.tokens} tokens, as all {found.rows} rows of {found.stored} are kept, where the "
            f"config said {found.expected}: {found.why}"
        )
    if plan.tokens is not None:
        check_tokenizer(used=assets.tokens, rows=plan.tokens, what=plan.architecture, where=where)
        if lacks_tokenizer_json(assets.files):
            rules += check_loaded_tokenizer(
                assets.files, plan.config, rows=plan.tokens, what=plan.architecture, where=where
            )
        rules += check_special_ids(
            plan.config, assets.files, rows=plan.tokens, architecture=plan.architecture, where=where
        )
    config, dropped = without_quantization(plan.config, {o.name: o.dtype for o in plan.outputs}, where)
    rules += [*dropped, *check_generation_config(assets.files)]
    return replace(plan, config=config, rules=(*plan.rules, *rules))


def _trim_rule(assets: Assets) -> TrimRule:
    """Return what decides whether rows beyond the config's are unused."""

    @cache
    def size() -> int | None:
        if assets.tokens is None:  # transformers may make a tokenizer of a few tokens of files without a vocabulary
            return None
        with suppress(MismatchError):
            return load_sizes(assets.files, assets.config)[1]
        return None

    def trim(stored: str, rows: int, expected: int) -> str:
        for key, number in all_ids(assets.config, assets.files):
            if expected <= number < rows:
                raise MoreRowsError(stored, rows, expected, f"{key} is {number}")
        tokens = size()
        if tokens is None:
            raise MoreRowsError(stored, rows, expected, "no tokenizer that can be read says that the others are unused")
        if tokens > expected:
            raise MoreRowsError(stored, rows, expected, f"the tokenizer has {tokens} tokens")
        return f"neither the tokenizer, of {tokens} tokens, nor an id of a config needs the others"

    return trim


def _distance(plan: Plan, index: Index, form: int) -> tuple[int, int, bool, int]:
    """Return how far the names of a checkpoint are from those of a model that was saved as it is, for comparison."""
    name = next(iter(plan.tensors), "")
    last = index.paths.get(name, (name,))[-1]  # as the model's state dict has it
    above = len(name) - len(str(last))
    return form, len(index.tensors) - len(plan.tensors), len(plan.prefix) != above, len(plan.prefix)
