"""One file of an export, as a unit of work that any process can do: what it holds, made of what, as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any

from ckpt_core.durable import file_size
from ckpt_core.errors import DamagedError
from ckpt_core.export.lora import Update
from ckpt_core.export.plan import Output, Plan
from ckpt_core.export.recipe import Piece, Recipe
from ckpt_core.format.index import Chunk, Span, TensorEntry

if TYPE_CHECKING:
    from ckpt_core.urls import Place

Identity = list[int | float]
"""What of a file changes when its content does: its size in bytes, and when it was last written."""


@dataclass(frozen=True)
class Shard:
    """A file of an export."""

    name: str
    outputs: list[Output]
    """Its tensors, in the order in which they are written."""

    tensors: Mapping[str, TensorEntry]
    """Where the stored tensors lie that they are made of."""

    checked: list[str]
    """Stored tensors whose CRC32s are looked at before, as no output reads them in the order in which they lie."""

    files: Mapping[str, Identity]
    """The checkpoint's files that it reads, as they were when it was planned."""

    @property
    def nbytes(self) -> int:
        """Size of its tensors in bytes."""
        return sum(output.nbytes for output in self.outputs)

    def check_unchanged(self, place: Place) -> None:
        """Check that the checkpoint's files are those for which the shard was planned.

        Raises:
            DamagedError: one was changed, or is gone.
        """
        for name, identity in self.files.items():
            if identity_of(place / name) != identity:
                raise DamagedError(
                    f"{place / name}: changed while it was converted; nothing was kept. Convert again when nobody "
                    "writes there, and save each checkpoint to a directory of its own."
                )


def shards_of(plan: Plan, place: Place) -> list[Shard]:
    """Cut a plan into its files."""
    identities: dict[str, Identity] = {}
    seen: set[str] = set()
    shards: list[Shard] = []
    for name, outputs in plan.shards.items():
        tensors = {source: plan.tensors[source] for output in outputs for source in output.sources}
        files = {chunk.span.file for entry in tensors.values() for chunk in entry.chunks}
        for file in files - identities.keys():
            identities[file] = identity_of(place / file)
        turned = {source for o in outputs if not o.recipe.straight for source in o.recipe.sources}
        shards.append(Shard(name, outputs, tensors, sorted(turned - seen), {f: identities[f] for f in sorted(files)}))
        seen |= turned
    return shards


def identity_of(place: Place) -> Identity:
    """Return what of a file changes when its content does.

    Raises:
        DamagedError: it is not there.
    """
    if file_size(place) is None:
        raise DamagedError(f"{place}: missing, or not a regular file; restore a copy of the checkpoint.")
    status = place.stat()
    return [status.st_size, status.st_mtime]


def shard_bytes(shard: Shard) -> bytes:
    """Return a shard as JSON."""
    document = {
        "name": shard.name,
        "outputs": [_output_document(o) for o in shard.outputs],
        "tensors": {
            name: [
                e.dtype,
                e.shape,
                [[c.offsets, c.sizes, c.span.file, c.span.offset, c.span.length] for c in e.chunks],
            ]
            for name, e in shard.tensors.items()
        },
        "checked": shard.checked,
        "files": shard.files,
    }
    return (json.dumps(document, separators=(",", ":")) + "\n").encode()


def parse_shard(data: bytes) -> Shard:
    """Return the shard that `shard_bytes` wrote."""
    document: dict[str, Any] = json.loads(data)
    return Shard(
        document["name"],
        [_output(*output) for output in document["outputs"]],
        {name: _entry(*entry) for name, entry in document["tensors"].items()},
        document["checked"],
        document["files"],
    )


def _output_document(output: Output) -> list[Any]:
    update = astuple(output.update) if output.update else None
    return [output.name, output.dtype, output.stored, _recipe_document(output.recipe), update, output.untrained]


def _output(name: str, dtype: str, stored: str, recipe: list[Any], update: list[Any] | None, untrained: bool) -> Output:
    return Output(name, dtype, stored, _recipe(*recipe), Update(*update) if update else None, untrained)


def _recipe_document(recipe: Recipe) -> list[Any]:
    pieces = [[p.offsets, p.sizes, p.source, p.view, p.start, p.axes] for p in recipe.pieces]
    return [recipe.shape, recipe.layout, pieces]


def _recipe(shape: list[int], layout: list[int], pieces: list[Any]) -> Recipe:
    made = (
        Piece(tuple(offsets), tuple(sizes), source, tuple(view), tuple(start), tuple(axes))
        for offsets, sizes, source, view, start, axes in pieces
    )
    return Recipe(tuple(shape), tuple(layout), tuple(made))


def _entry(dtype: str, shape: list[int], chunks: list[Any]) -> TensorEntry:
    made = (Chunk(tuple(offsets), tuple(sizes), Span(*span)) for offsets, sizes, *span in chunks)
    return TensorEntry(dtype, tuple(shape), tuple(made))
