"""The plan of an export of a LoRA adapter alone, as PEFT's `save_pretrained` writes it. Without torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from ckpt_core.errors import MismatchError
from ckpt_core.export.adapter import PREFIX, Adapter, Part
from ckpt_core.export.names import WRAPPERS
from ckpt_core.export.plan import Output, Plan, cast_rules, in_file_order
from ckpt_core.export.recipe import copy_of
from ckpt_core.format import dtypes
from ckpt_core.format.index import Index

_HEADS = frozenset({"classifier", "score"})
ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"


def plan_adapter(index: Index, adapter: Adapter, *, dtype: str | None, where: str) -> Plan:
    """Plan one file of the factors, and of the modules that were trained as a whole.

    Args:
        index: what the checkpoint holds.
        adapter: which of it is the adapter's.
        dtype: cast floating-point tensors to this; None keeps them.
        where: the checkpoint, for errors.

    Raises:
        MismatchError: a tensor is missing, or of a type that safetensors does not have.
    """
    kept = [part for part in adapter.parts if _is_saved(part, adapter)]
    _check_trained(adapter, kept, where)
    outputs = [_output(part.exported, part.stored, index, dtype, where) for part in kept]
    _check_names_differ(outputs, where)
    rules = [f"adapter: {len(adapter.pairs)} modules with factors, of {len(outputs)} tensors, in PEFT's layout"]
    rules += [*_renamed(adapter, kept), *_dropped(adapter, kept)]
    rules += cast_rules(outputs)
    used = {part.stored: index.tensors[part.stored] for part in kept}
    return Plan(
        f"LoRA adapter of {adapter.config.base}", {ADAPTER_WEIGHTS_NAME: in_file_order(outputs)}, (), used, tuple(rules)
    )


def _is_saved(part: Part, adapter: Adapter) -> bool:
    if part.kind == "base":
        return adapter.config.keeps_base(part.module)
    whole = part.kind == "other" and adapter.config.trains(part.module.rpartition(".")[0])
    return part.kind in {"factor", "trained"} or whole


def _check_trained(adapter: Adapter, kept: Iterable[Part], where: str) -> None:
    """Check that a module that the config says was trained as a whole is there."""
    exported = [part.exported for part in kept]
    missing = [name for name in adapter.config.trained_names if not any(f"{name}." in each for each in exported)]
    # PEFT lists both names of a classifier's head for any classifier, whichever of them the model has.
    if set(missing) < _HEADS <= set(adapter.config.trained_names):
        return
    for name in missing:
        raise MismatchError(
            f"{where}: {adapter.config.where} names {name!r} in modules_to_save, but no such tensor is there; give "
            "the config that it was trained with."
        )


def _check_names_differ(outputs: Iterable[Output], where: str) -> None:
    for name, count in Counter(output.name for output in outputs).items():
        if count > 1:
            raise MismatchError(f"{where}: holds {name} {count} times; drop all but one by a table of names.")


def _output(name: str, stored: str, index: Index, dtype: str | None, where: str) -> Output:
    entry = index.tensors[stored]
    if entry.dtype not in dtypes.SAFETENSORS:
        raise MismatchError(f"{where}: {stored} is of {entry.dtype}, which safetensors cannot hold.")
    cast = dtype is not None and entry.dtype in dtypes.FLOATING
    return Output(name, dtype if cast and dtype else entry.dtype, entry.dtype, copy_of(stored, entry.shape))


def _renamed(adapter: Adapter, kept: Iterable[Part]) -> list[str]:
    """Say what was done to the names of an adapter's tensors."""
    stored = [part.stored for part in kept]
    fronts = {name.rpartition(PREFIX)[0] for name in stored if PREFIX in name} - {""}
    within = {word for name in stored for word in name.rpartition(PREFIX)[2].split(".")} & WRAPPERS
    names = {part.adapter for part in kept if part.adapter}
    rules = adapter.table.rules()
    rules += [f"names: {front!r} removed from the front" for front in sorted(fronts)]
    rules += [f"names: {word!r} removed from within" for word in sorted(within)]
    rules += [f"names: {name!r}, the adapter's name, removed from within" for name in sorted(names)]
    return rules + ([] if all(PREFIX in name for name in stored) else [f"names: {PREFIX!r} put in front"])


def _dropped(adapter: Adapter, kept: Iterable[Part]) -> list[str]:
    """Name what of the checkpoint is not in an adapter's export."""
    names = {part.stored for part in kept}
    drops = adapter.table.drops
    left_out = {
        "frozen tensors of the model": [part.stored for part in adapter.parts if part.stored not in names],
        "names by the table of names": [name for name in adapter.ignored if drops(name)],
        "names beside the model": [name for name in adapter.ignored if not drops(name)],
    }
    return [f"dropped: {len(each)} {what}, such as {each[0]}" for what, each in left_out.items() if each]
