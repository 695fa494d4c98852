"""The tensors of any checkpoint or export: what they are, and their elements in blocks, without loading any whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ckpt_core.durable import file_size
from ckpt_core.errors import NotACheckpointError
from ckpt_core.export import stream
from ckpt_core.export.recipe import copy_of
from ckpt_core.export.stored import DcpStored
from ckpt_core.format.index import Index, check_files, read_index
from ckpt_core.format.manifest import MANIFEST_NAME
from ckpt_core.format.source import Source, open_source, read_into
from ckpt_core.hf_weights import HfWeights, has_weights, read_weights
from ckpt_core.locate import find_dcp
from ckpt_core.store import open_checkpoint
from ckpt_core.urls import place_of

if TYPE_CHECKING:
    import torch

    from ckpt_core.urls import Place

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


def open_tensors(url: str | Place) -> StoredTensors:
    """Open a committed step (its model), any DCP directory, any Hugging Face directory, or a safetensors file.

    A step is leased until they are closed, so that no pruner deletes it meanwhile.

    Raises:
        NotACheckpointError: it is none of them.
        CheckpointError: it is damaged or hostile.
    """
    place = place_of(url)
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


class HfTensors:
    """The tensors of a Hugging Face directory."""

    def __init__(self, weights: HfWeights, held: ExitStack) -> None:
        self.place = weights.place
        self.weights = weights
        self._tensors = weights.tensors
        self.facts = {
            name: TensorFacts(tensor.dtype or tensor.code, tensor.shape, tensor.nbytes, (file,))
            for name, (file, tensor) in self._tensors.items()
        }
        self._opened = held
        self._sources: dict[str, Source] = {}

    def __enter__(self) -> HfTensors:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """Yield the elements of a tensor, flat and in order, in blocks; as bytes where torch has no such type."""
        import torch

        file, tensor = self._tensors[name]
        for start in range(0, tensor.nbytes, BLOCK_BYTES):
            data = memoryview(bytearray(min(BLOCK_BYTES, tensor.nbytes - start)))
            read_into(self._source(file), tensor.offset + start, data, f"{self.place / file}: {name}")
            yield torch.frombuffer(data, dtype=getattr(torch, tensor.dtype or "uint8"))

    def _source(self, file: str) -> Source:
        if file not in self._sources:
            self._sources[file] = self._opened.enter_context(open_source(self.place / file))
        return self._sources[file]
