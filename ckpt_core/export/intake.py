"""What a DCP checkpoint made of a Hugging Face directory will hold, and of what, decided from headers alone."""

# transformers is only partly annotated.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ckpt_core.errors import MismatchError
from ckpt_core.export.architecture import Architecture, choose_class
from ckpt_core.export.hf_names import HfNames, match_names
from ckpt_core.export.names import Table
from ckpt_core.export.plan import Output, cast_rules, config_dtype, rearranged
from ckpt_core.export.quantization import check_no_scales, without_quantization
from ckpt_core.export.recipe import Recipe, copy_of
from ckpt_core.export.regions import seen_in
from ckpt_core.export.trace import inverted
from ckpt_core.export.weight_conversions import DEFAULT_FORM, FileForm
from ckpt_core.format import dtypes
from ckpt_core.format.index import Shape

if TYPE_CHECKING:
    from ckpt_core.hf_weights import HfTensor, HfWeights


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

    config: Mapping[str, Any]
    dtype: str
    """The type that `config.json` names."""

    record: bytes | None
    """The conversions that the file needed, if they are not the default ones."""

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
        config: its config; where it names no `architectures`, the class is the one of its model type that fits.
        dtype: cast floating-point tensors to this; None keeps them.
        table: what the user says of its names.

    Raises:
        MismatchError: a tensor is missing, left over, or of another shape, or the config is no model's, or that of
            several.
    """
    stored, where = weights.tensors, str(weights.place)
    types = {name: str(tensor.dtype) for name, tensor in stored.items()}
    check_no_scales(types, where)
    form = FileForm({table.renamed(name) for name in stored if not table.drops(name)})

    def match(architecture: Architecture) -> tuple[bool, tuple[Architecture, HfNames]]:
        names = match_names(stored, architecture, table, where)
        for exported, name in names.exported.items():
            _check_fits(name, stored[name], architecture.recipes[exported].shape, architecture.name, where)
        for own, name in names.own.items():
            _check_fits(name, stored[name], architecture.shapes[own], architecture.name, where)
        return not names.exact, (architecture, names)

    architecture, names = choose_class(config, match, dtype, (form, DEFAULT_FORM), where)
    for twin, kept in names.twins:
        _check_fits(twin, stored[twin], stored[kept].shape, architecture.name, where)
    kept = {name: shape for name, shape in architecture.shapes.items() if name not in architecture.unsaved}
    whole = {name: shape for name, shape in kept.items() if name not in architecture.ties}
    recipes = {
        name: copy_of(names.own[name], whole[name]) if name in names.own else _of_stored(recipe, names.exported)
        for name, recipe in inverted(architecture.recipes, whole).items()
    }
    in_parts = {name: tensor.shape or (1,) for name, tensor in stored.items() if len(tensor.parts) > 1}
    recipes = {n: seen_in(r, in_parts) if in_parts.keys() & {*r.sources} else r for n, r in recipes.items()}
    outputs = [_output(name, recipes, types, architecture, dtype, where) for name in kept]
    rules = [*names.rules]
    rules += [
        f"tied: {target} is {source}, stored under each name" for target, source in sorted(architecture.ties.items())
    ]
    rules += rearranged(recipes)
    rules += cast_rules(outputs)
    computed = _computed(architecture, outputs, dtype)
    rules += [f"computed: {output.name}, which the model makes by itself" for output in computed]
    layouts = {name: architecture.recipes[exported].layout for exported, name in names.exported.items()}
    made = {output.name: output.dtype for output in outputs}
    exported = {name: made[recipe.sources[0]] for name, recipe in architecture.recipes.items()}
    written, dropped = without_quantization(architecture.config, exported, where)
    return Intake(
        architecture.name,
        list(architecture.shapes),
        outputs,
        computed,
        layouts,
        names.twins,
        (*rules, *dropped),
        written,
        config_dtype(architecture, exported),
        architecture.record,
    )


def _check_fits(name: str, tensor: HfTensor, shape: Shape, architecture: str, where: str) -> None:
    if tensor.dtype is None:
        raise MismatchError(
            f"{where}: {name} is of {tensor.code}, several elements to a byte, which no checkpoint holds; import the "
            "weights from before they were quantized."
        )
    if tensor.shape != shape:
        missing = ", or the file of a rank is missing" if len(tensor.parts) > 1 else ""
        raise MismatchError(
            f"{where}: {name} has shape {tensor.shape}, {architecture} with this config has {shape} there; the config "
            f"is of another model{missing}."
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
    return Output(name, loaded if cast else stored, stored, recipe, untrained=name in architecture.untrained)


def _computed(architecture: Architecture, outputs: Sequence[Output], dtype: str | None) -> list[Output]:
    """Return the tensors that no export has, of the type that the model has, or is cast to."""
    floating = [output.dtype for output in outputs if output.dtype in dtypes.FLOATING]
    commonest = max(dict.fromkeys(floating), key=floating.count, default="float32")
    return [
        Output(name, architecture.dtypes[name] if dtype else commonest, "float32", copy_of(name, shape), untrained=True)
        for name, shape in architecture.shapes.items()
        if name in architecture.unsaved
    ]
