"""What an export will hold and where each byte comes from, decided from metadata before anything is written."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ckpt_core.errors import ArgumentError, MismatchError
from ckpt_core.export.architecture import Architecture
from ckpt_core.export.lora import Update
from ckpt_core.export.names import Table, Wanted, resolve
from ckpt_core.export.recipe import Piece, Recipe
from ckpt_core.format import dtypes
from ckpt_core.format.cover import gap_or_overlap
from ckpt_core.format.index import Index, Shape, TensorEntry

_NUMBER = re.compile(r"(?<=\.)[0-9]+(?=\.|$)")


@dataclass(frozen=True, slots=True)
class Output:
    """One tensor of the export, of `dtype`, made of stored ones of the type `stored`."""

    name: str
    dtype: str
    stored: str
    recipe: Recipe
    update: Update | None = None
    """What an adapter adds to the stored elements, before any cast."""

    untrained: bool = False
    """Whether no training changes it by gradients: then Inf is a bound or a mask, and no fault."""

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of all stored tensors that it is made of."""
        return self.recipe.sources + ((self.update.a, self.update.b) if self.update else ())

    @property
    def unchanged(self) -> bool:
        """Whether its bytes are the stored ones."""
        return not self.casts and self.update is None

    @property
    def shape(self) -> Shape:
        """Its size along each axis."""
        return self.recipe.shape

    @property
    def nbytes(self) -> int:
        """Size in the export, in bytes."""
        return math.prod(self.shape) * dtypes.ITEMSIZE[self.dtype]

    @property
    def casts(self) -> bool:
        """Whether its elements are of another type than the stored ones."""
        return self.stored != self.dtype


@dataclass(frozen=True, slots=True)
class Tie:
    """A tensor stored a second time under another name; it must equal the one that the export keeps."""

    source: str
    kept: str


class MoreRowsError(Exception):
    """A checkpoint has more rows of a table of tokens than the config says, and not all of the rest are unused."""

    def __init__(self, stored: str, rows: int, expected: int, why: str) -> None:
        super().__init__(f"{stored} has {rows} rows, where the config says {expected}, and {why}")
        self.stored, self.rows, self.expected, self.why = stored, rows, expected, why


TrimRule = Callable[[str, int, int], str]
"""Says why rows beyond those of the config may be cut off: of a tensor, its rows and the config's.

Raises:
    MoreRowsError: they may not.
"""


def _never(stored: str, rows: int, expected: int) -> str:
    raise MoreRowsError(stored, rows, expected, "nothing says that the others are unused")


@dataclass(frozen=True)
class Plan:
    """An export: its shards by file name, with their tensors in the order in which they are written."""

    architecture: str
    shards: Mapping[str, list[Output]]
    ties: tuple[Tie, ...]
    tensors: Mapping[str, TensorEntry]
    """Where the tensors lie that it is made of."""

    rules: tuple[str, ...]
    """The named rules that were applied, for people and for `export.json`."""

    dtype: str = "float32"
    """The type that `config.json` names, in which transformers loads the model."""

    config: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """The model's config; empty for an adapter's export."""

    prefix: str = ""
    """What the checkpoint's names have before the model's."""

    tokens: int | None = None
    """How many token ids the model has rows for; None without a table of tokens."""

    @property
    def outputs(self) -> list[Output]:
        """Every tensor of the export."""
        return [output for shard in self.shards.values() for output in shard]

    @property
    def nbytes(self) -> int:
        """Size of all tensors in the export, in bytes."""
        return sum(output.nbytes for output in self.outputs)

    @property
    def elements(self) -> int:
        """How many elements all tensors in the export have."""
        return sum(math.prod(output.shape) for output in self.outputs)


def make_plan(
    index: Index,
    architecture: Architecture,
    *,
    dtype: str | None,
    max_shard_bytes: int,
    where: str,
    table: Table = Table(),  # noqa: B008 - frozen
    trim: TrimRule = _never,
) -> Plan:
    """Match a checkpoint with an architecture, tensor by tensor.

    Args:
        index: what the checkpoint holds; its chunks are known to cover each tensor exactly once.
        architecture: what the model expects.
        dtype: cast floating-point tensors to this; None keeps them.
        max_shard_bytes: largest size of one file's tensors.
        where: the checkpoint, for errors.
        table: what the user says of the checkpoint's names.
        trim: whether a table of tokens may lose rows.

    Raises:
        MoreRowsError: a table of tokens has more rows than the config says, and may lose none.
        MismatchError: a tensor is missing, left over, or of another shape, or not each byte has exactly one source.
    """
    if max_shard_bytes <= 0:
        raise ArgumentError(f"max_shard_bytes={max_shard_bytes}: expected a positive number of bytes.")
    ties = architecture.ties
    stored_names = [n for n in architecture.shapes if n not in ties and n not in architecture.unsaved]
    wanted = {n: [n, *(t for t, s in ties.items() if s == n)] for n in stored_names}
    names = resolve(
        (*index.tensors, *index.values, *index.unsupported),
        Wanted([[wanted]]),
        table,
        unsaved=architecture.unsaved,
        values=index.values,
        untrained=[n for n, e in index.tensors.items() if e.dtype not in dtypes.FLOATING],
        model=architecture.name,
        where=where,
    )
    twins = {name: [names.stored[n] for n in may if n in names.stored] for name, may in wanted.items()}
    sources = {name: _Source.of(name, stored[0], index, architecture, where, trim) for name, stored in twins.items()}
    _check_used_once(architecture, sources)
    outputs = [_output(n, recipe, sources, architecture, dtype, where) for n, recipe in architecture.recipes.items()]
    repeated = [Tie(twin, stored[0]) for stored in twins.values() for twin in stored[1:]]
    rules = [*names.rules]
    rules += [f"tied: {target} is {source}, stored once" for target, source in sorted(ties.items())]
    rules += [source.trimmed for source in sources.values() if source.trimmed]
    rules += ["names: in the form of the file that the model was loaded from"] if architecture.record else []
    rules += rearranged(architecture.recipes)
    rules += cast_rules(outputs)
    used = {name: index.tensors[name] for stored in twins.values() for name in stored}
    return Plan(
        architecture.name,
        _split(outputs, max_shard_bytes),
        tuple(repeated),
        used,
        tuple(rules),
        dtype=config_dtype(architecture, {output.name: output.dtype for output in outputs}),
        config=architecture.config,
        prefix=names.prefix,
        tokens=architecture.tokens,
    )


def config_dtype(architecture: Architecture, stored: Mapping[str, str]) -> str:
    """Return the type that `save_pretrained` writes into a config: that of the model's first floating-point parameter.

    A parameter of eight bits is passed over: torch makes no model in such a type, so its config would not load.

    Args:
        architecture: what the model is.
        stored: the type of each tensor of the export.
    """
    types = (stored[name] for name in architecture.order)
    return next((dtype for dtype in types if dtype in dtypes.FLOATING and dtypes.ITEMSIZE[dtype] > 1), "float32")


@dataclass(frozen=True, slots=True)
class _Source:
    """A stored tensor that stands for one of the model's."""

    stored: str
    entry: TensorEntry
    shape: Shape
    """What the model has of it: all, or the first rows."""

    trimmed: str

    @classmethod
    def of(
        cls, name: str, stored: str, index: Index, architecture: Architecture, where: str, trim: TrimRule
    ) -> _Source:
        """Find a stored tensor, and compare its shape and type with what the model and the format want.

        Raises:
            MismatchError: it does not fit.
        """
        index.check_supported([stored], where)
        if stored in index.values:
            raise MismatchError(f"{where}: {stored} is a value, {architecture.name} expects a tensor; give its config.")
        entry, shape = index.tensors[stored], architecture.shapes[name]
        if entry.dtype not in dtypes.SAFETENSORS:
            raise MismatchError(f"{where}: {stored} is of {entry.dtype}, which safetensors cannot hold.")
        if entry.shape == shape:
            return cls(stored, entry, shape, "")
        padded = name in architecture.padded and entry.shape[1:] == shape[1:] and entry.shape[:1] > shape[:1]
        if not padded:
            raise MismatchError(
                f"{where}: {stored} has shape {entry.shape}, {architecture.name} with this config expects {shape}; "
                "give the config that it was trained with."
            )
        why = trim(stored, entry.shape[0], shape[0])
        rule = f"trimmed: {stored} from {entry.shape[0]} rows to the config's {shape[0]}; {why}"
        return cls(stored, entry, shape, rule)

    def seen(self, piece: Piece) -> Piece:
        """Return a piece of the model's tensor as one of the stored tensor, which may have more rows."""
        view = self.entry.shape if self.trimmed else piece.view
        return replace(piece, source=self.stored, view=view)


def _check_used_once(architecture: Architecture, sources: Mapping[str, _Source]) -> None:
    """Check that each element of the export has one source, and that each element of the model's is used once.

    Raises:
        MismatchError: that is not so.
    """
    boxes: dict[str, list[Piece]] = {name: [] for name in sources}
    for name, recipe in architecture.recipes.items():
        wrong = recipe.wrong()
        if wrong:
            raise MismatchError(f"{architecture.name}: {name} cannot be made of the model's tensors: {wrong}.")
        for piece in recipe.pieces:
            boxes[piece.source].append(piece)
    for name, pieces in boxes.items():
        if not (pieces or math.prod(sources[name].shape)):
            continue  # without elements there is nothing to move
        view = pieces[0].view if pieces else (-1,)
        same = all(piece.view == view for piece in pieces)
        wrong = gap_or_overlap(view, [(p.start, p.taken) for p in pieces]) if same and pieces else "it is not used"
        if wrong:
            raise MismatchError(f"{architecture.name}: {name} is not in the export once: {wrong}.")


def _output(
    name: str,
    recipe: Recipe,
    sources: Mapping[str, _Source],
    architecture: Architecture,
    dtype: str | None,
    where: str,
) -> Output:
    made_of = [sources[source].entry.dtype for source in recipe.sources]
    if len(set(made_of)) != 1:
        raise MismatchError(
            f"{where}: {', '.join(recipe.sources)} become one tensor, {name}, but are of "
            f"{', '.join(sorted(set(made_of)))}; save them in one type."
        )
    [stored] = set(made_of)
    wider = max((architecture.dtypes[source] for source in recipe.sources), key=lambda kind: dtypes.ITEMSIZE[kind])
    cast = dtype is not None and stored in dtypes.FLOATING and wider in dtypes.FLOATING
    pieces = tuple(sources[piece.source].seen(piece) for piece in recipe.pieces)
    untrained = architecture.untrained.issuperset(recipe.sources)
    return Output(name, wider if cast else stored, stored, replace(recipe, pieces=pieces), untrained=untrained)


def cast_rules(outputs: Iterable[Output]) -> list[str]:
    """Say from which type to which tensors are cast."""
    return [f"cast: {pair}" for pair in sorted({f"{o.stored} to {o.dtype}" for o in outputs if o.casts})]


def rearranged(recipes: Mapping[str, Recipe]) -> list[str]:
    """Say which tensors have other names than in the model, or are split, stacked or turned; `*` is any number."""
    said: dict[str, None] = {}
    for name, recipe in recipes.items():
        if recipe.straight and recipe.sources[0] != name:
            said[f"renamed: {_any_number(recipe.sources[0])} to {_any_number(name)}"] = None
        elif not recipe.straight:
            made_of = dict.fromkeys(map(_any_number, recipe.sources))
            said[f"{recipe.kind}: {_any_number(name)} from {', '.join(made_of)}"] = None
    return sorted(said)


def _any_number(name: str) -> str:
    return _NUMBER.sub("*", name)


def _split(outputs: Iterable[Output], max_shard_bytes: int) -> dict[str, list[Output]]:
    """Fill shards in order, as `save_pretrained` does: a tensor larger than the limit has one of its own, at once."""
    groups: list[list[Output]] = []
    current: list[Output] = []
    size = 0
    for output in outputs:
        if output.nbytes > max_shard_bytes:
            groups.append([output])
            continue
        if size + output.nbytes > max_shard_bytes:
            groups.append(current)
            current, size = [], 0
        current.append(output)
        size += output.nbytes
    if current or not groups:
        groups.append(current)
    count = len(groups)
    names = [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    return dict(zip(names if count > 1 else ["model.safetensors"], map(in_file_order, groups), strict=True))


def in_file_order(outputs: list[Output]) -> list[Output]:
    """Order tensors as safetensors does: widest elements first, so that all are aligned, then by name."""
    return sorted(outputs, key=lambda o: (-dtypes.ITEMSIZE[o.dtype], o.name))
