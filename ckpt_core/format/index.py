"""What a DCP directory says that it holds: tensors, their chunks, and where each lies.

A DCP directory says this in `.metadata`, a pickle. A checkpoint of ours has the same as JSON in `.metadata.json`, its
twin, so that nothing of ours needs the pickle. The twin names the digest of the `.metadata` that it was written with.
"""

from __future__ import annotations

import gc
import json
import logging
import math
import reprlib
from collections import defaultdict
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

from ckpt_core.durable import file_size
from ckpt_core.errors import CkptError, DamagedError, NotACheckpointError
from ckpt_core.format import dtypes, stock
from ckpt_core.format.cover import Shape, gap_or_overlap
from ckpt_core.format.digests import ALGORITHM, algorithm_of, digest_bytes
from ckpt_core.format.manifest import MANIFEST_NAME
from ckpt_core.urls import place_of

if TYPE_CHECKING:
    from ckpt_core.urls import Place

METADATA_NAME = ".metadata"
TWIN_NAME = ".metadata.json"
TWIN_VERSION = 2
MAX_METADATA_BYTES = 1 << 30
MAX_RANK = 64
_MAX = 1 << 62
_log = logging.getLogger(__name__)

Keys = tuple[str | int, ...]
T = TypeVar("T")


class Span(NamedTuple):
    """`length` bytes from `offset` of `file`, whose path is relative to the DCP directory."""

    file: str
    offset: int
    length: int


class Chunk(NamedTuple):
    """A box of one tensor: `sizes` elements from `offsets` in each dimension, stored in `span`."""

    offsets: Shape
    sizes: Shape
    span: Span


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor: element type by torch's name, shape in elements, and the chunks that make it up."""

    dtype: str
    shape: Shape
    chunks: tuple[Chunk, ...]

    @property
    def nbytes(self) -> int:
        """Size of the tensor's elements in bytes."""
        return math.prod(self.shape) * dtypes.ITEMSIZE[self.dtype]


@dataclass(frozen=True, slots=True)
class Index:
    """All that a DCP directory holds: tensors, and values (each a small pickle) by flat name."""

    tensors: Mapping[str, TensorEntry]
    values: Mapping[str, Span]
    paths: Mapping[str, Keys] = field(default_factory=dict[str, Keys])
    """Where each flat name stood in the nested state dict that was saved."""

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(entry.nbytes for entry in self.tensors.values())

    def spans(self) -> list[Span]:
        """Return where every chunk and value lies."""
        return [c.span for entry in self.tensors.values() for c in entry.chunks] + list(self.values.values())


def read_index(directory: str | Place) -> Index:
    """Read what the DCP directory `directory` holds, from its JSON twin or its pickle, and check it.

    Raises:
        NotACheckpointError: there is no `.metadata`.
        UntrustedError: the pickle asks for something that would run code.
        DamagedError: the metadata is not readable or contradicts itself.
    """
    directory = place_of(directory, "directory")
    pickled, twin = directory / METADATA_NAME, directory / TWIN_NAME
    if not pickled.exists():
        raise NotACheckpointError(
            f"{directory}: no {METADATA_NAME} in it, so no DCP checkpoint; give the directory that holds the "
            f"{METADATA_NAME} and *.distcp files."
        )
    path = twin if twin.exists() else pickled
    try:
        with _uncollected():
            document = _twin_document(twin, pickled) if path == twin else None
            if document is None:
                path = pickled
                document = stock.read_document(_read(pickled), str(pickled))
            return _index(document)
    except CkptError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        said = str(error) if type(error) is ValueError else f"not DCP metadata ({type(error).__name__}: {error})"
        raise DamagedError(f"{path}: {said[:500]}; restore a copy of the checkpoint.") from None


def check_files(directory: Place, index: Index) -> None:
    """Check that every file is there and as long as the metadata says, before memory is taken for what they hold.

    Raises:
        DamagedError: a file is missing, not a regular one, or cut short.
    """
    ends: dict[str, int] = {}
    for span in index.spans():
        ends[span.file] = max(ends.get(span.file, 0), span.offset + span.length)
    for name, end in ends.items():
        path = directory / name
        size = file_size(path)
        if size is None:
            raise DamagedError(f"{path}: missing, or not a regular file; restore a copy of the checkpoint.")
        if size < end:
            raise DamagedError(f"{path}: {size} bytes, the metadata names bytes up to {end}; restore a copy of it.")


def twin_bytes(index: Index, metadata: bytes) -> bytes:
    """Return the JSON twin of a DCP directory's metadata.

    Args:
        index: what the directory holds.
        metadata: the bytes of its `.metadata`.
    """
    document = {
        "format_version": TWIN_VERSION,
        "metadata": digest_bytes(metadata, ALGORITHM),
        "tensors": {
            name: {
                "dtype": entry.dtype,
                "shape": entry.shape,
                "chunks": [[c.offsets, c.sizes, c.span.file, c.span.offset, c.span.length] for c in entry.chunks],
            }
            for name, entry in index.tensors.items()
        },
        "values": {name: [span.file, span.offset, span.length] for name, span in index.values.items()},
        "paths": index.paths,
    }
    return (json.dumps(document, separators=(",", ":")) + "\n").encode()


def _read(path: Place) -> bytes:
    size = file_size(path)
    if size is None:
        raise ValueError("not a regular file")
    if not 0 < size <= MAX_METADATA_BYTES:
        raise ValueError(f"{size} bytes, expected 1 to {MAX_METADATA_BYTES}")
    return path.read_bytes()


@contextmanager
def _uncollected() -> Generator[None]:
    """Keep the collector of cycles from searching millions of new objects, again and again; they form none."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _twin_document(twin: Place, pickled: Place) -> dict[str, Any] | None:
    """Return what the twin says, or None if it was not written with the `.metadata` that is there now.

    Stock `dcp.save` overwrites `.metadata` and leaves the twin of an older save, which would give its places in the
    files to the tensors of the newer one.

    Raises:
        DamagedError: the directory is part of a committed step, in which nothing is ever overwritten.
        ValueError: it is no twin, or of a version that this library does not read.
    """
    document = cast("dict[str, Any]", json.loads(_read(twin)))
    version, digest = document.get("format_version"), document.get("metadata")
    if version == 1:  # it names no digest, so whether it belongs to this `.metadata` is not known
        _log.info("%s: of version 1; %s is read in its place", twin, pickled.name)
        return None
    if version != TWIN_VERSION:
        raise ValueError(f"format_version {_brief(version)}, this library reads {TWIN_VERSION}; update ckptflow")
    found = digest_bytes(_read(pickled), algorithm_of(digest)) if isinstance(digest, str) else ""
    if found and found == digest:
        return document
    if any((above / MANIFEST_NAME).exists() for above in (twin.parent.parent, twin.parent.parent.parent)):
        raise DamagedError(
            f"{twin}: of another save than {METADATA_NAME} ({found or 'no digest'}, expected {_brief(digest)}), in a "
            "committed step, which never changes; restore a copy of both files, or load an older step."
        )
    _log.warning("%s: of an older save than %s, which is read in its place; delete it", twin, pickled.name)
    return None


def _index(document: dict[str, Any]) -> Index:
    """Check every type, number and name in the metadata, and that nothing overlaps or is left out."""
    files = _Files()
    index = Index(
        tensors=_each(document["tensors"], lambda name, entry: _tensor(name, entry, files)),
        values=_each(document["values"], lambda _, value: _span(files, *value)),
        paths=_each(document["paths"], _keys),
    )
    both = index.tensors.keys() & index.values.keys()
    if both:
        raise ValueError(f"{_brief(min(both))} is a tensor and a value")
    _check_apart(index)
    return index


def _each(items: Any, read: Callable[[str, Any], T]) -> dict[str, T]:
    if not isinstance(items, dict):
        raise TypeError(f"a {type(items).__name__} in place of a dict")
    result: dict[str, T] = {}
    for name, value in cast("dict[Any, Any]", items).items():
        if not isinstance(name, str):
            raise TypeError(f"a {type(name).__name__} for a name")
        result[name] = read(name, value)
    return result


def _tensor(name: str, entry: Any, files: _Files) -> TensorEntry:
    dtype, shape = entry["dtype"], _shape(entry["shape"])
    if type(dtype) is not str or dtype not in dtypes.ITEMSIZE:
        raise ValueError(f"{_brief(name)} has dtype {_brief(dtype)}, which is none that this library reads")
    if math.prod(size or 1 for size in shape) >= _MAX:
        raise ValueError(f"{_brief(name)} has shape {shape}, more than there can be")
    chunks = tuple(
        Chunk(_shape(offsets), _shape(sizes), _span(files, file, offset, length))
        for offsets, sizes, file, offset, length in entry["chunks"]
    )
    wrong = gap_or_overlap(shape, [(offsets, sizes) for offsets, sizes, _ in chunks])
    if wrong:
        raise ValueError(f"{_brief(name)}: {wrong}; the save was not complete")
    itemsize = dtypes.ITEMSIZE[dtype]
    for _, sizes, span in chunks:
        needed = math.prod(sizes) * itemsize
        if needed > span.length:
            raise ValueError(f"{_brief(name)} has a chunk of {needed} bytes in {span}, which is shorter")
    return TensorEntry(dtype, shape, chunks)


def _shape(value: Any) -> Shape:
    if not isinstance(value, (list, tuple)) or len(cast("list[Any]", value)) > MAX_RANK:
        raise ValueError(f"{_brief(value)}: no shape")
    numbers = tuple(cast("list[Any]", value))
    for n in numbers:
        if type(n) is not int or not 0 <= n < _MAX:
            raise ValueError(f"{_brief(numbers)}: no shape")
    return numbers


class _Files(dict[str, str]):
    """Names of files, each checked when it is first asked for, and one string for all that lies in the file."""

    def __missing__(self, file: str) -> str:
        if file in {"", ".", ".."} or not file.isprintable() or set("/\\") & set(file):
            raise ValueError(f"something lies in {_brief(file)}, expected the plain name of a file in that directory")
        self[file] = file
        return file


def _span(files: _Files, file: Any, offset: Any, length: Any) -> Span:
    if type(file) is not str:
        raise ValueError(f"something lies in {_brief(file)}, expected the name of a file in that directory")
    if type(offset) is not int or type(length) is not int or not 0 <= offset < _MAX or not 0 < length < _MAX:
        raise ValueError(f"something lies at {_brief(offset)}+{_brief(length)} of {_brief(file)}: no range of bytes")
    return Span(files[file], offset, length)


def _keys(name: str, value: Any) -> Keys:
    keys = tuple(cast("list[Any]", value)) if isinstance(value, (list, tuple)) else ()
    if not keys or not all(type(key) is str or (type(key) is int and 0 <= key < _MAX) for key in keys):
        raise ValueError(f"{_brief(name)} stood at {_brief(value)}: no path of keys")
    return keys


def _check_apart(index: Index) -> None:
    spans: defaultdict[str, list[Span]] = defaultdict(list)
    for span in index.spans():
        spans[span.file].append(span)
    for file, inside in spans.items():
        inside.sort()
        for (_, offset, length), (_, start, _) in pairwise(inside):
            if start < offset + length:
                raise ValueError(f"two items share bytes of {file}, from {start}")


def _brief(value: Any) -> str:
    """Return `value` for a message: short, however large or nested it is."""
    return _REPR.repr(value)


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 200
_REPR.maxlevel = 3
