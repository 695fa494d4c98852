"""What a DCP directory says that it holds: tensors, their chunks, and where each lies.

A DCP directory says this in `.metadata`, a pickle. A checkpoint of ours has the same as JSON in `.metadata.json`, its
twin, so that nothing of ours needs the pickle. The twin names the digest of the `.metadata` that it was written with.
"""

from __future__ import annotations

import gc
import json
import math
import re
import reprlib
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

from ckpt_core import documents
from ckpt_core.durable import file_size
from ckpt_core.errors import CkptError, DamagedError, NotACheckpointError, UnsupportedError
from ckpt_core.format import dtypes, stock
from ckpt_core.format.cover import Shape, gap_or_overlap
from ckpt_core.format.digests import ALGORITHM, algorithm_of, digest_bytes
from ckpt_core.format.manifest import MANIFEST_NAME
from ckpt_core.printable import printable_logger
from ckpt_core.urls import place_of

if TYPE_CHECKING:
    from ckpt_core.urls import Place

METADATA_NAME = ".metadata"
TWIN_NAME = ".metadata.json"
TWIN_VERSION = 2
RANK_METADATA = re.compile(r"__([0-9]{1,6})\.metadata")
"""Of a save without collectives, each rank's own `.metadata`."""

MAX_METADATA_BYTES = 1 << 29
"""Three million chunks; read, they take twenty times as much memory."""

MAX_RANK = 64
MAX_DEPTH = 256
"""How deep a saved state dict may be nested; what reads it recurses."""

_MAX = 1 << 62
_log = printable_logger(__name__)

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
class Unread:
    """A tensor or value in a form that this library does not read."""

    reason: str
    spans: tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class Index:
    """All that a DCP directory holds: tensors, and values (each a small pickle) by flat name."""

    tensors: Mapping[str, TensorEntry]
    values: Mapping[str, Span]
    paths: Mapping[str, Keys] = field(default_factory=dict[str, Keys])
    """Where each flat name stood in the nested state dict that was saved."""

    unsupported: Mapping[str, Unread] = field(default_factory=dict[str, Unread])
    """What is there too, and is refused by name when it is asked for."""

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(entry.nbytes for entry in self.tensors.values())

    def spans(self) -> list[Span]:
        """Return where every chunk and value lies."""
        chunks = [c.span for entry in self.tensors.values() for c in entry.chunks]
        return [*chunks, *self.values.values(), *(span for each in self.unsupported.values() for span in each.spans)]

    def check_supported(self, names: Iterable[str], where: str) -> None:
        """Check that nothing of these names is in a form that is not read.

        Raises:
            UnsupportedError: something is.
        """
        found = [name for name in names if name in self.unsupported]
        if found:
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            raise UnsupportedError(
                f"{where}: {found[0]} is {self.unsupported[found[0]].reason}, which this library does not read{more}; "
                "all else there can be loaded."
            )


def is_dcp(directory: Place) -> bool:
    """Whether there is the metadata of a DCP directory: `.metadata`, or one of each rank."""
    return (directory / METADATA_NAME).exists() or (directory / f"__0{METADATA_NAME}").exists()


def metadata_files(directory: Place) -> list[Place]:
    """Return the files that say what the DCP directory holds, those of ranks in their order.

    Raises:
        NotACheckpointError: there are none.
        DamagedError: there are both kinds, or a rank's is missing.
    """
    pickled, of_rank_0 = directory / METADATA_NAME, directory / f"__0{METADATA_NAME}"
    if pickled.exists():
        if of_rank_0.exists():
            raise DamagedError(
                f"{directory}: {METADATA_NAME} and {of_rank_0.name}, of two saves; the later wrote over files "
                "of the other; delete the metadata of the older one, and verify what is left."
            )
        return [pickled]
    found = {int(match[1]): entry for entry in _entries(directory) if (match := RANK_METADATA.fullmatch(entry.name))}
    missing = [rank for rank in range(max(found, default=-1) + 1) if rank not in found]
    if not found:
        raise NotACheckpointError(
            f"{directory}: no {METADATA_NAME} in it, so no DCP checkpoint; give the directory that holds the "
            f"{METADATA_NAME} and *.distcp files."
        )
    if missing:
        raise DamagedError(
            f"{directory}: {len(found)} ranks' metadata, and none of rank {missing[0]}; the save was not complete: "
            "load an older one."
        )
    return [found[rank] for rank in sorted(found)]


def metadata_digest(directory: Place) -> str:
    """Return the digest of what says what a DCP directory holds.

    Raises:
        CheckpointError: there is no metadata, or not all of it.
    """
    return digest_bytes(b"".join(file.read_bytes() for file in metadata_files(directory)))


def read_index(directory: str | Place) -> Index:
    """Read what the DCP directory `directory` holds, from its JSON twin or its pickle, and check it.

    A save without collectives left one pickle of each rank: they are merged.

    Raises:
        NotACheckpointError: there is no `.metadata`.
        UntrustedError: a pickle asks for something that could run code.
        UnsupportedError: the metadata is of another version.
        DamagedError: the metadata is not readable or contradicts itself.
    """
    directory = place_of(directory, "directory")
    files = metadata_files(directory)
    if files[0].name != METADATA_NAME:
        from ckpt_core.format.rank_metadata import merge

        return merge(directory, [read_pickle(file, complete=False) for file in files])
    twin = directory / TWIN_NAME
    with _named(twin):
        document = _twin_document(twin, files[0]) if twin.exists() else None
        if document is not None:
            return index_of(document)
    return read_pickle(files[0])


def read_pickle(path: Place, *, complete: bool = True) -> Index:
    """Read one `.metadata`, and check it.

    Args:
        path: the file.
        complete: whether it must say where every element of each tensor lies; a rank's own does not.
    """
    with _named(path):
        return index_of(stock.read_document(_read(path), str(path)), complete=complete)


@contextmanager
def _named(path: Place) -> Generator[None]:
    """Turn what reading metadata raises into an error that names the file."""
    try:
        with _uncollected():
            yield
    except CkptError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        said = str(error) if type(error) is ValueError else f"not DCP metadata ({type(error).__name__}: {error})"
        raise DamagedError(f"{path}: {said[:500]}; restore a copy of the checkpoint.") from None


def _entries(directory: Place) -> list[Place]:
    return list(directory.iterdir()) if directory.is_dir() else []


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
    document = documents.parse_object(_read(twin))
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


def index_of(document: dict[str, Any], *, complete: bool = True) -> Index:
    """Check every type, number and name in the metadata, that nothing overlaps and, if `complete`, nothing is left out.

    Raises:
        ValueError, KeyError, TypeError, AttributeError, IndexError: something is wrong.
    """
    files = _Files()
    index = Index(
        tensors=_each(document["tensors"], lambda name, entry: _tensor(name, entry, files, complete=complete)),
        values=_each(document["values"], lambda _, value: _span(files, *value)),
        paths=_each(document["paths"], _keys),
        unsupported=_each(document.get("unsupported", {}), lambda _, entry: _unread(entry, files)),
    )
    _check_kinds(index)
    check_apart(index)
    return index


def _check_kinds(index: Index) -> None:
    both = index.tensors.keys() & index.values.keys()
    both |= {name for name in index.unsupported if name in index.tensors or name in index.values}
    if both:
        raise ValueError(f"{_brief(min(both))} is a tensor and a value")


def _each(items: Any, read: Callable[[str, Any], T]) -> dict[str, T]:
    if not isinstance(items, dict):
        raise TypeError(f"a {type(items).__name__} in place of a dict")
    result: dict[str, T] = {}
    for name, value in cast("dict[Any, Any]", items).items():
        if not isinstance(name, str):
            raise TypeError(f"a {type(name).__name__} for a name")
        result[name] = read(name, value)
    return result


def _unread(entry: Any, files: _Files) -> Unread:
    if not isinstance(entry["reason"], str):
        raise TypeError(f"a {type(entry['reason']).__name__} for a reason")
    return Unread(entry["reason"], tuple(_span(files, *span) for span in entry["spans"] if span[2]))


def _tensor(name: str, entry: Any, files: _Files, *, complete: bool) -> TensorEntry:
    dtype, shape = entry["dtype"], _shape(entry["shape"])
    if type(dtype) is not str or dtype not in dtypes.ITEMSIZE:
        raise ValueError(f"{_brief(name)} has dtype {_brief(dtype)}, which is none that this library reads")
    if math.prod(size or 1 for size in shape) >= _MAX:
        raise ValueError(f"{_brief(name)} has shape {shape}, more than there can be")
    chunks = tuple(
        Chunk(_shape(offsets), _shape(sizes), _span(files, file, offset, length))
        for offsets, sizes, file, offset, length in entry["chunks"]
    )
    wrong = gap_or_overlap(shape, [(offsets, sizes) for offsets, sizes, _ in chunks]) if complete else None
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
        if {"", ".", ".."} & set(file.split("/")) or not file.isprintable() or "\\" in file or ":/" in file:
            raise ValueError(
                f"something lies in {_brief(file)}, expected the name of a file in or below that directory"
            )
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
    if not 0 < len(keys) <= MAX_DEPTH or not all(
        type(key) is str or (type(key) is int and 0 <= key < _MAX) for key in keys
    ):
        raise ValueError(f"{_brief(name)} stood at {_brief(value)}: no path of keys")
    return keys


def check_apart(index: Index) -> None:
    """Check that no two items share bytes.

    Raises:
        ValueError: two do.
    """
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
