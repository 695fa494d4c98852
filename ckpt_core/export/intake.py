"""What a DCP checkpoint made of a Hugging Face directory will hold, and of what, decided from headers alone."""

# transformers is only partly annotated.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ckpt_core.errors import MismatchError
from ckpt_core.export.architecture import Architecture, find_architecture, named_class
from ckpt_core.export.names import Resolved, Table, resolve
from ckpt_core.export.plan import (
    Output,
    _rearranged,  # pyright: ignore[reportPrivateUsage] - the same sentences both ways
)
from ckpt_core.export.recipe import Recipe, copy_of
from ckpt_core.export.trace import inverted
from ckpt_core.format import dtypes
from ckpt_core.format.index import Index, Shape

if TYPE_CHECKING:
    from ckpt_core.hf_weights import HfWeights
    from ckpt_core.safetensors_header import StoredTensor

_COMPUTED = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")
"""What models once stored and now compute; transformers passes over it in any file too."""


@dataclass(frozen=True)
class Intake:
    """The tensors of a model, tied ones under each name."""

    architecture: str
    names: list[str]
    """Of all tensors, in the order of the model's state dict."""

    outputs: list[Output]
    """Those that are made of stored ones."""

    computed: list[Output]
    """Those that the model computes when it is made: as they are not stored, each is made of one of its own name."""

    layouts: Mapping[str, Shape]
    """The shape in which the outputs' recipes see each stored tensor."""

    twins: list[tuple[str, str]]
    """Stored tensors that must be equal, as the config ties them."""

    rules: tuple[str, ...]
    """The named rules that were applied, for people."""

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(output.nbytes for output in (*self.outputs, *self.computed))


def plan_intake(
    weights: HfWeights,
    config: Mapping[str, Any],
    *,
    dtype: str | None = None,
    table: Table = Table(),  # noqa: B008 - frozen
) -> Intake:
    """Match what a Hugging Face directory holds with the architecture that its config names, tensor by tensor.

    Args:
        weights: what it holds.
        config: its config; where it names no `architectures`, the class is the first whose exported names all fit.
        dtype: cast floating-point tensors to this; None keeps them.
        table: what the user says of its names.

    Raises:
        MismatchError: a tensor is missing, left over, or of another shape, or the config is no model's.
    """
    stored, where = weights.tensors, str(weights.place)
    architecture, names = _matched(stored, config, dtype, table, where)
    for exported, name in names.first.items():
        _check_fits(name, stored[name][1], architecture.recipes[exported].shape, architecture.name, where)
    for twin, kept in names.twins:
        _check_fits(twin, stored[twin][1], stored[kept][1].shape, architecture.name, where)
    kept = {name: shape for name, shape in architecture.shapes.items() if name not in architecture.unsaved}
    whole = {name: shape for name, shape in kept.items() if name not in architecture.ties}
    recipes = {name: _of_stored(recipe, names.first) for name, recipe in inverted(architecture.recipes, whole).items()}
    types = {name: str(tensor.dtype) for name, (_, tensor) in stored.items()}
    outputs = [_output(name, recipes, types, architecture, dtype, where) for name in kept]
    rules = [*names.rules]
    rules += [
        f"tied: {target} is {source}, stored under each name" for target, source in sorted(architecture.ties.items())
    ]
    rules += _rearranged(recipes)
    rules += [f"cast: {pair}" for pair in sorted({f"{o.stored} to {o.dtype}" for o in outputs if o.casts})]
    computed = _computed(architecture, outputs, dtype)
    rules += [f"computed: {output.name}, which the model makes by itself" for output in computed]
    layouts = {name: architecture.recipes[exported].layout for exported, name in names.first.items()}
    return Intake(architecture.name, list(architecture.shapes), outputs, computed, layouts, names.twins, tuple(rules))


@dataclass(frozen=True)
class _Names:
    """How the names of an export and those of a directory meet."""

    first: Mapping[str, str]
    """The stored name of each of the export's."""

    twins: list[tuple[str, str]]
    rules: tuple[str, ...]


def _matched(
    stored: Mapping[str, Any], config: Mapping[str, Any], dtype: str | None, table: Table, where: str
) -> tuple[Architecture, _Names]:
    """Return the architecture that the config means, and how its names and the stored ones meet.

    Raises:
        MismatchError: they do not.
    """
    tried: list[str] = []
    for name in _classes(config):
        architecture = find_architecture({**config, "architectures": [name]}, Index({}, {}), dtype)
        try:
            return architecture, _names(stored, architecture, table, where)
        except MismatchError:
            if config.get("architectures"):
                raise
            tried.append(name)
    raise MismatchError(
        f"{where}: its config names no architectures, and its tensors fit none of "
        f'{", ".join(tried) or "the classes of its model type"}; add "architectures" to config.json.'
    )


def _classes(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the names of the classes that a config may mean."""
    from transformers.models.auto import modeling_auto as auto

    if config.get("architectures"):
        yield str(config["architectures"][0])
        return
    for mapping in (
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_MAPPING_NAMES,
    ):
        found: Any = mapping.get(config["model_type"])
        if found:
            yield found if isinstance(found, str) else found[0]


def _names(stored: Mapping[str, Any], architecture: Architecture, table: Table, where: str) -> _Names:
    """Find the stored name of each name that an export has.

    Raises:
        MismatchError: one is missing, or a stored one is left over.
    """
    wanted = {name: [name, *_tied(recipe, architecture)] for name, recipe in architecture.recipes.items()}
    known = {name for alternatives in wanted.values() for name in alternatives}
    cls = named_class(architecture.name)
    read_as = _read_as(stored, known, cls.base_model_prefix)
    passed = [re.compile(pattern) for pattern in (*_COMPUTED, *(cls._keys_to_ignore_on_load_unexpected or ()))]
    passed += [re.compile(f"^{re.escape(name)}$") for name in architecture.unsaved]
    unread = [new for new in read_as if new not in known and any(pattern.search(new) for pattern in passed)]
    kept = [name for name in read_as if name not in unread]
    names = resolve(kept, wanted, table, model=architecture.name, where=where)
    _check_leftovers([name for name in kept if not table.drops(name)], names, architecture, where)
    found = {name: [names.stored[n] for n in may if n in names.stored] for name, may in wanted.items()}
    rules = [*names.rules, *(f"dropped: {read_as[name]}, which {architecture.name} does not read" for name in unread)]
    return _Names(
        {name: read_as[found[name][0]] for name in wanted},
        [(read_as[twin], read_as[first]) for first, *twins in found.values() for twin in twins],
        tuple(rules),
    )


def _tied(recipe: Recipe, architecture: Architecture) -> list[str]:
    """Return the other names under which a tensor of an export may be stored, if it is a whole one of the model."""
    return [t for t, s in architecture.ties.items() if recipe.straight and recipe.sources == (s,)]


def _read_as(stored: Collection[str], known: set[str], base: str) -> dict[str, str]:
    """Return the stored name of each name as it is read.

    Names that are not known are tried as transformers tries them: with parts of them as they are called today, and
    with what stands in front of the names of the base model.
    """
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    renamings = get_checkpoint_conversion_mapping("legacy") or []

    def tried(name: str) -> Iterator[str]:
        today = name
        for renaming in renamings:
            today = renaming.rename_source_key(today)[0]
        for front in ("", f"{base}."):
            yield from (front + name, front + today)

    read_as = {next((new for new in tried(name) if new in known), name): name for name in stored}
    return read_as if len(read_as) == len(stored) else {name: name for name in stored}


def _check_leftovers(names: Sequence[str], found: Resolved, architecture: Architecture, where: str) -> None:
    """Check that nothing is passed over as a trainer's: there is no trainer's state in a Hugging Face directory."""
    used = set(found.stored.values())
    left = [name for name in names if name not in used]
    if left:
        raise MismatchError(
            f"{where}: holds {len(left)} tensors that {architecture.name} does not have, such as "
            f"{', '.join(left[:3])}; drop them by a table of names if they are not to be imported."
        )


def _check_fits(name: str, tensor: StoredTensor, shape: Shape, architecture: str, where: str) -> None:
    if tensor.dtype is None:
        raise MismatchError(
            f"{where}: {name} is of {tensor.code}, several elements to a byte, which no checkpoint holds; import the "
            "weights from before they were quantized."
        )
    if tensor.shape != shape:
        raise MismatchError(
            f"{where}: {name} has shape {tensor.shape}, {architecture} with this config has {shape} there; the config "
            "is of another model."
        )


def _of_stored(recipe: Recipe, names: Mapping[str, str]) -> Recipe:
    return replace(recipe, pieces=tuple(replace(piece, source=names[piece.source]) for piece in recipe.pieces))


def _output(
    name: str,
    recipes: Mapping[str, Recipe],
    types: Mapping[str, str],
    architecture: Architecture,
    dtype: str | None,
    where: str,
) -> Output:
    recipe = recipes[architecture.ties.get(name, name)]
    made_of = {types[source] for source in recipe.sources}
    if len(made_of) != 1:
        raise MismatchError(
            f"{where}: {', '.join(recipe.sources[:3])}, ... become one tensor, {name}, but are of "
            f"{', '.join(sorted(made_of)) or 'no type'}; store them in one type."
        )
    [stored] = made_of
    loaded = architecture.dtypes[name]
    cast = dtype is not None and stored in dtypes.FLOATING and loaded in dtypes.FLOATING
    return Output(name, loaded if cast else stored, stored, recipe)


def _computed(architecture: Architecture, outputs: Sequence[Output], dtype: str | None) -> list[Output]:
    """Return the tensors that no export has, of the type that the model has, or is cast to."""
    floating = [output.dtype for output in outputs if output.dtype in dtypes.FLOATING]
    commonest = max(dict.fromkeys(floating), key=floating.count, default="float32")
    return [
        Output(name, architecture.dtypes[name] if dtype else commonest, "float32", copy_of(name, shape))
        for name, shape in architecture.shapes.items()
        if name in architecture.unsaved
    ]
