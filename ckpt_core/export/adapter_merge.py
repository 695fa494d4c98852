"""The plan of a model with the updates of its LoRA adapter added to its weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ckpt_core.errors import MismatchError
from ckpt_core.export.adapter import Adapter, Part
from ckpt_core.export.architecture import Architecture, choose_class
from ckpt_core.export.lora import Update
from ckpt_core.export.names import Table
from ckpt_core.export.plan import Output, Plan, Tie, TrimRule, make_plan
from ckpt_core.export.weight_conversions import DEFAULT_FORM
from ckpt_core.format.index import Index, TensorEntry

_MATRIX_AXES = 2
_MERGED = frozenset({"float64", "float32", "float16", "bfloat16"})


def plan_merged(
    index: Index,
    adapter: Adapter,
    config: Mapping[str, Any],
    *,
    dtype: str | None,
    max_shard_bytes: int,
    table: Table,
    where: str,
    trim: TrimRule,
) -> Plan:
    """Plan the model with the adapter's updates added to its weights, as `merge_and_unload` leaves it.

    Args:
        index: what the checkpoint holds: the frozen weights too.
        adapter: which of it is the adapter's.
        config: the model's.
        dtype: cast floating-point tensors to this after the merge; None keeps them.
        max_shard_bytes: largest size of one file's tensors.
        table: what the user says of the checkpoint's names.
        where: the checkpoint, for errors.
        trim: whether a table of tokens may lose rows.

    Raises:
        MoreRowsError: a table of tokens has more rows than the config says, and may lose none.
        MismatchError: the checkpoint does not fit the configs, or the adapter is of a kind that is not merged.
    """
    targets = _targets(adapter, where)
    plain = {part.plain: part for part in adapter.of("trained", "base", "other")}
    tensors = {name: index.tensors[part.stored] for name, part in plain.items()}
    if len(tensors) != len(adapter.of("trained", "base", "other")):
        raise MismatchError(
            f"{where}: holds tensors twice, with PEFT's names and without; drop one by a table of names."
        )
    ignored = {name: index.tensors[name] for name in adapter.ignored if name in index.tensors}
    base = Index({**tensors, **ignored}, index.values)
    named: list[Any] = config.get("architectures") or []
    if any(str(name).startswith("PeftModel") for name in named):
        config = {name: value for name, value in config.items() if name != "architectures"}  # of the model around it

    def match(architecture: Architecture) -> tuple[int, tuple[Architecture, Plan]]:
        plan = make_plan(
            base, architecture, dtype=dtype, max_shard_bytes=max_shard_bytes, table=table, where=where, trim=trim
        )
        return len(plan.prefix), (architecture, plan)

    architecture, plan = choose_class(config, match, dtype, (DEFAULT_FORM,), where)
    return _Merge(index, adapter, architecture, targets, plain, where).applied(plan)


@dataclass(frozen=True)
class _Merge:
    """What turns the plan of a model without an adapter into one with its updates, and with the stored names."""

    index: Index
    adapter: Adapter
    architecture: Architecture
    targets: Mapping[str, str]
    """The module of each weight that is updated, by its plain name."""

    plain: Mapping[str, Part]
    where: str

    def applied(self, plan: Plan) -> Plan:
        shards = {name: [self._output(output) for output in outputs] for name, outputs in plan.shards.items()}
        updated = [output for outputs in shards.values() for output in outputs if output.update]
        if len(updated) != len(self.targets):
            raise MismatchError(
                f"{self.where}: {len(self.targets)} weights have an adapter, but {len(updated)} of them are in the "
                "merged model, as others are tied to them; export the adapter as it is."
            )
        used = {self._stored(name): entry for name, entry in plan.tensors.items()}
        factors = {name: self.index.tensors[name] for o in updated for name in o.sources[1:]}
        ties = tuple(Tie(self._stored(tie.source), self._stored(tie.kept)) for tie in plan.ties)
        rules = (*self._rules(updated), *plan.rules)
        return replace(plan, shards=shards, ties=ties, tensors={**used, **factors}, rules=rules)

    def _stored(self, name: str) -> str:
        return self.plain[name].stored if name in self.plain else name

    def _output(self, output: Output) -> Output:
        pieces = tuple(replace(piece, source=self._stored(piece.source)) for piece in output.recipe.pieces)
        recipe, update = replace(output.recipe, pieces=pieces), self._update(output)
        return replace(output, recipe=recipe, update=update)

    def _update(self, output: Output) -> Update | None:
        """Return the update of an output, and check that it can be added to it.

        Raises:
            MismatchError: the weight is none to which a product of two matrices is added, row by row.
        """
        modules = [self.targets[name] for name in output.recipe.sources if name in self.targets]
        if not modules:
            return None
        module, name = modules[0], self.architecture.recipes[output.name].sources[0]
        self._check_weight(output, module, name)
        embedding = module in self.adapter.embeddings
        turned = embedding or name.removesuffix(".weight") in self.architecture.turned
        a, b = self.adapter.pairs[module]
        rank, scaling = self.adapter.config.rank(module), self.adapter.config.scaling(module)
        self._check_factors(output, module, (self.index.tensors[a], self.index.tensors[b]), rank, turned=turned)
        return Update(a, b, rank, self.index.tensors[a].dtype, scaling, turned, rounded=embedding)

    def _check_weight(self, output: Output, module: str, name: str) -> None:
        if name in self.architecture.ties.values():
            raise MismatchError(
                f"{self.where}: {module} is tied to another module, which a merge would change too; export the "
                "adapter as it is."
            )
        entry = self.index.tensors[self._stored(output.recipe.sources[0])]
        if not output.recipe.straight or entry.shape != output.shape:
            raise MismatchError(
                f"{self.where}: {module} is {output.recipe.kind} in the export, and updates of such weights are not "
                "merged; export the adapter as it is."
            )

    def _check_factors(
        self, output: Output, module: str, factors: tuple[TensorEntry, TensorEntry], rank: int, *, turned: bool
    ) -> None:
        a, b = factors
        outputs, inputs = (output.shape[:1], output.shape[1:])[:: -1 if turned else 1]
        if len(output.shape) != _MATRIX_AXES or (a.shape, b.shape) != ((rank, *inputs), (*outputs, rank)):
            raise MismatchError(
                f"{self.where}: the factors of {module} have the shapes {a.shape} and {b.shape}, its weight has "
                f"{output.shape}; only products of two matrices are merged: export the adapter as it is."
            )
        if a.dtype != b.dtype or not {output.stored, a.dtype} <= _MERGED:
            raise MismatchError(
                f"{self.where}: {module} is of {output.stored}, its factors are of {a.dtype} and {b.dtype}; weights of "
                f"{', '.join(sorted(_MERGED))} are merged, with both factors of one type. Export the adapter as it is."
            )

    def _rules(self, updated: Iterable[Output]) -> list[str]:
        kinds = Counter((o.update.rank, o.update.scaling) for o in updated if o.update)
        rules = [
            f"merged: {count} weights with {scaling:.6g} times a product of rank {rank}"
            for (rank, scaling), count in sorted(kinds.items())
        ]
        if self.adapter.of("base"):
            rules.append("names: 'base_layer' removed from within")
        if self.adapter.of("trained"):
            rules.append(f"names: {len(self.adapter.of('trained'))} tensors trained as a whole, of modules_to_save")
        copies = self.adapter.of("copy")
        return rules + ([f"dropped: {len(copies)} frozen copies of modules trained as a whole"] if copies else [])


def _targets(adapter: Adapter, where: str) -> dict[str, str]:
    """Return the module of each frozen weight that the adapter updates, by its plain name."""
    weights = {part.module: part.plain for part in adapter.of("base") if part.leaf == "weight"}
    for module in adapter.pairs:
        if module not in weights:
            raise MismatchError(
                f"{where}: holds no frozen weight of {module} to merge its adapter into; export the adapter as it is, "
                "and merge it into its base model with PEFT."
            )
    return {weights[module]: module for module in adapter.pairs}
