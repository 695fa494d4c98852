"""The tensors of any checkpoint or export: what they are, and their elements in blocks, without loading any whole."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ckpt_core.durable import file_size
from ckpt_core.errors import NotACheckpointError
from ckpt_core.export import stream
from ckpt_core.export.recipe import Recipe, copy_of
from ckpt_core.export.stored import DcpStored, HfStored
from ckpt_core.format import dtypes
from ckpt_core.format.index import Index, Shape, TensorEntry, check_files, read_index
from ckpt_core.format.manifest import MANIFEST_NAME
from ckpt_core.format.source import read_into
from ckpt_core.hf_weights import HfTensor, HfWeights, has_weights, read_weights
from ckpt_core.locate import find_dcp
from ckpt_core.store import open_checkpoint
from ckpt_core.urls import place_of

if TYPE_CHECKING:
    import torch

    from ckpt_core.export.plan import Plan
    from ckpt_core.urls import AnyPath, Place

BLOCK_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class TensorFacts:
    """A tensor without its elements."""

    dtype: str
    """Element type by torch's name; by safetensors' where torch has none."""

    shape: tuple[int, ...]
    nbytes: int
    """Size of the elements in bytes."""

    files: tuple[str, ...]
    """The files that hold it, one for each of its chunks."""


class StoredTensors(Protocol):
    """The tensors at one place; use it in a `with` statement."""

    place: Place
    """The directory that holds them."""

    facts: dict[str, TensorFacts]

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """Yield the elements of a tensor, flat and in row-major order, about `BLOCK_BYTES` at a time."""
        ...

    def __enter__(self) -> StoredTensors: ...

    def __exit__(self, *_: object) -> None: ...


def open_tensors(url: AnyPath, argument: str = "path") -> StoredTensors:
    """Open a committed step (its model), any DCP directory, any Hugging Face directory, or a safetensors file.

    A step is leased until they are closed, so that no pruner deletes it meanwhile.

    Raises:
        NotACheckpointError: it is none of them.
        CheckpointError: it is damaged or hostile.
    """
    place = place_of(url, argument)
    with ExitStack() as held:
        if file_size(place / MANIFEST_NAME) is not None:
            checkpoint = open_checkpoint(place)
            held.enter_context(checkpoint.lease())
            place = checkpoint.root
        return _open(place, held)


def _open(place: Place, held: ExitStack) -> StoredTensors:
    """Open what lies at `place`; what is held until it is closed changes hands once that has gone well."""
    try:
        directory = find_dcp(place)
    except NotACheckpointError:
        if not has_weights(place):
            raise
        weights = read_weights(place)
        return HfTensors(weights, held.pop_all())
    index = read_index(directory)
    check_files(directory, index)
    return DcpTensors(directory, index, held.pop_all())


class DcpTensors:
    """The tensors of a DCP directory."""

    def __init__(self, directory: Place, index: Index, held: ExitStack) -> None:
        self.place = directory
        self.index = index
        self.facts = {
            name: TensorFacts(e.dtype, e.shape, e.nbytes, tuple(chunk.span.file for chunk in e.chunks))
            for name, e in index.tensors.items()
        }
        self._opened = held
        self._files: Any = None

    def __enter__(self) -> DcpTensors:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """Yield the elements of a tensor, flat and in row-major order, in blocks."""
        import torch

        if self._files is None:
            self._files = self._opened.enter_context(DcpStored(self.place, self.index.tensors))
        entry = self.index.tensors[name]
        for block in stream.blocks(self._files, copy_of(name, entry.shape), entry.dtype):
            elements: Any = torch.from_numpy(block)  # pyright: ignore[reportUnknownMemberType] - partly annotated
            yield elements.view(getattr(torch, entry.dtype))


class PlannedTensors:
    """The tensors of a DCP directory as those of its export, by their names there; with second names of tied ones."""

    def __init__(self, directory: Place, plan: Plan) -> None:
        self.place = directory
        self.prefix = plan.prefix
        self.rearranged = any(
            not o.recipe.straight or o.recipe.sources[0] != plan.prefix + o.name for o in plan.outputs
        )
        """Whether the export has other names than the checkpoint, or other tensors."""

        self.ties: dict[str, str] = {}
        """The name of the kept tensor of each one that is stored a second time."""

        self.facts: dict[str, TensorFacts] = {}
        self._recipes: dict[str, tuple[Recipe, str]] = {}
        self._stored = DcpStored(directory, plan.tensors)
        read = Counter[str]()
        for piece in (piece for output in plan.outputs for piece in output.recipe.pieces):
            read[piece.source] += math.prod(piece.sizes)
        for output in plan.outputs:
            entries = [plan.tensors[source] for source in output.recipe.sources]
            # Of a tensor with rows that an export leaves out the shape is told as it is stored.
            whole = all(read[s] == math.prod(plan.tensors[s].shape) for s in output.recipe.sources)
            self._add(output.name, output.recipe, output.stored, output.shape if whole else entries[0].shape, entries)
        for tie in plan.ties:
            name, entry = tie.source.removeprefix(plan.prefix), plan.tensors[tie.source]
            kept = next(o.name for o in plan.outputs if tie.kept in o.recipe.sources)
            if name not in self.facts:
                self._add(name, copy_of(tie.source, entry.shape), entry.dtype, entry.shape, [entry])
                self.ties[name] = kept

    def _add(self, name: str, recipe: Recipe, dtype: str, shape: Shape, entries: Sequence[TensorEntry]) -> None:
        nbytes = math.prod(shape) * dtypes.ITEMSIZE[dtype]
        files = tuple(chunk.span.file for entry in entries for chunk in entry.chunks)
        self.facts[name] = TensorFacts(dtype, shape, nbytes, files)
        self._recipes[name] = recipe, dtype

    def __enter__(self) -> PlannedTensors:
        return self

    def __exit__(self, *_: object) -> None:
        self._stored.__exit__()

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """Yield the elements of a tensor, flat and in row-major order, in blocks."""
        import torch

        recipe, dtype = self._recipes[name]
        for block in stream.blocks(self._stored, recipe, dtype):
            elements: Any = torch.from_numpy(block)  # pyright: ignore[reportUnknownMemberType] - partly annotated
            yield elements.view(getattr(torch, dtype))


class HfTensors:
    """The tensors of a Hugging Face directory."""

    def __init__(self, weights: HfWeights, held: ExitStack) -> None:
        self.place = weights.place
        self.weights = weights
        self.facts = {
            name: TensorFacts(each.dtype or each.code, each.shape, each.nbytes, tuple(file for file, *_ in each.parts))
            for name, each in weights.tensors.items()
        }
        self._opened = held
        self._files: HfStored | None = None

    def __enter__(self) -> HfTensors:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """Yield the elements of a tensor, flat and in order, in blocks; as bytes where torch has no such type."""
        import torch

        if self._files is None:
            self._files = self._opened.enter_context(HfStored(self.weights))
        tensor = self.weights.tensors[name]
        if tensor.dtype is None:
            yield from self._bytes(name, tensor)
            return
        for block in stream.blocks(self._files, copy_of(name, tensor.shape), tensor.dtype):
            elements: Any = torch.from_numpy(block)  # pyright: ignore[reportUnknownMemberType] - partly annotated
            yield elements.view(getattr(torch, tensor.dtype))

    def _bytes(self, name: str, tensor: HfTensor) -> Iterator[torch.Tensor]:
        import torch

        assert self._files
        [(file, _, part)] = tensor.parts  # torch saves no parts of such types
        for start in range(0, part.nbytes, BLOCK_BYTES):
            data = memoryview(bytearray(min(BLOCK_BYTES, part.nbytes - start)))
            read_into(self._files.source(file), part.offset + start, data, f"{self.place / file}: {name}")
            yield torch.frombuffer(data, dtype=torch.uint8)
