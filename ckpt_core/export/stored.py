"""Stored tensors, by name: boxes of elements in open files, of a DCP directory or of a Hugging Face directory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from ckpt_core.export.regions import row_major
from ckpt_core.format.chunks import locate_chunk
from ckpt_core.format.index import Shape, TensorEntry
from ckpt_core.format.payload import Payload
from ckpt_core.format.source import Source, open_source

if TYPE_CHECKING:
    from ckpt_core.hf_weights import HfWeights
    from ckpt_core.urls import Place

_OPEN_FILES = 64


@dataclass(frozen=True, slots=True)
class Box:
    """A box of one tensor: `sizes` elements from `offsets`, in a file."""

    offsets: Shape
    sizes: Shape
    file: str


class Stored(Protocol):
    """Tensors in files. For one thread."""

    place: Place

    def boxes(self, name: str) -> Sequence[Box]:
        """Return the boxes that make up a tensor; a 0-d tensor is one of shape `(1,)`."""
        ...

    def payload(self, name: str, number: int) -> Payload:
        """Return where the elements of one of a tensor's boxes lie in its file."""
        ...

    def source(self, file: str) -> Source:
        """Return an open file."""
        ...

    def __enter__(self) -> Stored: ...

    def __exit__(self, *_: object) -> None: ...


class _Files:
    """The open files of one directory; those used last stay open, however many ranks saved."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self._files: OrderedDict[str, Source] = OrderedDict()

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    def source(self, file: str) -> Source:
        """Return an open file."""
        if file not in self._files:
            if len(self._files) >= _OPEN_FILES:
                self._files.popitem(last=False)[1].close()
            self._files[file] = open_source(self.place / file)
        self._files.move_to_end(file)
        return self._files[file]


class DcpStored(_Files):
    """The tensors of a DCP directory."""

    def __init__(self, place: Place, tensors: Mapping[str, TensorEntry]) -> None:
        super().__init__(place)
        self._tensors = tensors

    def __enter__(self) -> DcpStored:
        return self

    def boxes(self, name: str) -> list[Box]:
        """Return the chunks of a tensor."""
        chunks = self._tensors[name].chunks
        return [Box(c.offsets or (0,), c.sizes or (1,), c.span.file) for c in chunks]

    def payload(self, name: str, number: int) -> Payload:
        """Find a chunk's elements, and check that they are of the metadata's type and size."""
        entry = self._tensors[name]
        chunk = entry.chunks[number]
        where = f"{self.place / chunk.span.file}: {name}"
        return locate_chunk(self.source(chunk.span.file), chunk.span, entry.dtype, chunk.sizes, where)


class HfStored(_Files):
    """The tensors of a Hugging Face directory: boxes of files in row-major order, without a CRC32.

    Args:
        weights: what the directory holds.
        layouts: shapes in which recipes see tensors, where those are not the tensors' own; of tensors in one part.
    """

    def __init__(self, weights: HfWeights, layouts: Mapping[str, Shape] | None = None) -> None:
        super().__init__(weights.place)
        self._tensors = weights.tensors
        self._layouts = layouts or {}

    def __enter__(self) -> HfStored:
        return self

    def boxes(self, name: str) -> list[Box]:
        """Return the parts of a tensor."""
        parts = self._tensors[name].parts
        if len(parts) == 1:
            [(file, _, part)] = parts
            shape = self._layouts.get(name) or part.shape or (1,)
            return [Box((0,) * len(shape), shape, file)]
        return [Box(begin or (0,), part.shape or (1,), file) for file, begin, part in parts]

    def payload(self, name: str, number: int) -> Payload:
        """Return where the elements of a part lie."""
        _, _, part = self._tensors[name].parts[number]
        return Payload(part.offset, part.nbytes, 0, str(part.dtype), part.shape, row_major(part.shape), 0)
