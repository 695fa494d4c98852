"""What a DCP directory says that it holds: tensors, their chunks, and where each lies.

A DCP directory tells this in `.metadata`, a pickle. A checkpoint of ours has the same as JSON beside it,
in `metadata.json`, which is read first, so that nothing of ours needs the pickle.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from ckpt_core.errors import DamagedError, NotACheckpointError
from ckpt_core.format import dtypes, pickles

METADATA_NAME = ".metadata"
TWIN_NAME = "metadata.json"
TWIN_VERSION = 1
MAX_METADATA_BYTES = 1 << 30

Shape = tuple[int, ...]
Keys = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Span:
    """`length` bytes from `offset` of `file`, whose path is relative to the DCP directory."""

    file: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Chunk:
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


def read_index(directory: str | Path) -> Index:
    """Read what the DCP directory `directory` holds, from its JSON twin or its pickle, and check it.

    Raises:
        NotACheckpointError: neither file is there.
        UntrustedError: the pickle asks for something that would run code.
        DamagedError: the metadata is not readable or contradicts itself.
    """
    directory = Path(directory)
    twin = directory / TWIN_NAME
    if twin.is_file() and (directory / METADATA_NAME).is_file():
        index = _from_json(_read(twin), str(twin))
        where = str(twin)
    else:
        pickled = directory / METADATA_NAME
        if not pickled.exists():
            raise NotACheckpointError(
                f"{directory}: no {METADATA_NAME} in it, so no DCP checkpoint; give the directory that holds the "
                f"{METADATA_NAME} and *.distcp files."
            )
        index = _from_pickle(_read(pickled), str(pickled))
        where = str(pickled)
    _check(index, where)
    return index


def twin_bytes(index: Index) -> bytes:
    """Return the JSON twin of a DCP directory's metadata."""
    document = {
        "format_version": TWIN_VERSION,
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


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise DamagedError(f"{path}: not a regular file; restore a copy of the checkpoint.")
    size = path.stat().st_size
    if not 0 < size <= MAX_METADATA_BYTES:
        raise DamagedError(f"{path}: {size} bytes, expected 1 to {MAX_METADATA_BYTES}; restore a copy of the file.")
    return path.read_bytes()


def _from_json(data: bytes, where: str) -> Index:
    try:
        document = json.loads(data)
        if document["format_version"] != TWIN_VERSION:
            raise DamagedError(
                f"{where}: format_version {document['format_version']!r}, this library reads {TWIN_VERSION}; "
                "update ckptflow."
            )
        tensors = {
            name: TensorEntry(
                str(entry["dtype"]),
                tuple(entry["shape"]),
                tuple(
                    Chunk(tuple(offsets), tuple(sizes), Span(file, offset, length))
                    for offsets, sizes, file, offset, length in entry["chunks"]
                ),
            )
            for name, entry in document["tensors"].items()
        }
        values = {name: Span(*span) for name, span in document["values"].items()}
        paths = {name: tuple(path) for name, path in document["paths"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, DamagedError):
            raise
        raise DamagedError(
            f"{where}: not a metadata twin ({type(error).__name__}: {error}); restore a copy of the file."
        ) from None
    return Index(tensors, values, paths)


_METADATA = "torch.distributed.checkpoint.metadata"
_Metadata = pickles.record("Metadata")
_MetadataIndex = pickles.record("MetadataIndex")
_TensorStorage = pickles.record("TensorStorageMetadata")
_BytesStorage = pickles.record("BytesStorageMetadata")
_StorageInfo = pickles.record("_StorageInfo")


def _size(*args: Any) -> Shape:
    return cast("Shape", tuple(args[0])) if args else ()


_GLOBALS: dict[tuple[str, str], Any] = {
    (_METADATA, "Metadata"): _Metadata,
    (_METADATA, "MetadataIndex"): _MetadataIndex,
    (_METADATA, "TensorStorageMetadata"): _TensorStorage,
    (_METADATA, "TensorProperties"): pickles.record("TensorProperties"),
    (_METADATA, "ChunkStorageMetadata"): pickles.record("ChunkStorageMetadata"),
    (_METADATA, "BytesStorageMetadata"): _BytesStorage,
    (_METADATA, "StorageMeta"): pickles.record("StorageMeta"),
    (_METADATA, "_MEM_FORMAT_ENCODING"): pickles.constant(None),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _StorageInfo,
    ("torch", "Size"): _size,
    ("torch.serialization", "_get_layout"): pickles.constant(None),
    ("pathlib", "PosixPath"): pickles.constant(None),
    ("pathlib", "WindowsPath"): pickles.constant(None),
    ("collections", "OrderedDict"): dict,
    **{("torch", name): name for name in dtypes.NAMES},
}


def _from_pickle(data: bytes, where: str) -> Index:
    metadata = pickles.loads(data, _GLOBALS, where)
    try:
        spans = _spans(metadata.storage_data, where)
        tensors: dict[str, TensorEntry] = {}
        values: dict[str, Span] = {}
        for name, item in metadata.state_dict_metadata.items():
            if isinstance(item, _TensorStorage):
                tensors[name] = _tensor_entry(name, item, spans)
            elif isinstance(item, _BytesStorage):
                values[name] = spans[name, None]
            else:
                raise DamagedError(f"{where}: {name} is neither a tensor nor a value; restore a copy.")
        planner_data = cast("dict[str, Any]", metadata.planner_data or {})
        paths: dict[str, Keys] = {name: tuple(path) for name, path in planner_data.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, DamagedError):
            raise
        raise DamagedError(
            f"{where}: a pickle, but not DCP metadata ({type(error).__name__}: {error}); restore a copy of it."
        ) from None
    return Index(tensors, values, paths)


def _spans(storage_data: Any, where: str) -> dict[tuple[str, Shape | None], Span]:
    spans: dict[tuple[str, Shape | None], Span] = {}
    for key, info in storage_data.items():
        if info.state.get("transform_descriptors"):
            raise DamagedError(
                f"{where}: {key.fqn} is stored through the transforms {info.transform_descriptors}, which this "
                "library does not read; save the checkpoint without them."
            )
        offset = key.state.get("offset")
        spans[key.fqn, offset] = Span(info.relative_path, info.offset, info.length)
    return spans


def _tensor_entry(name: str, item: Any, spans: Mapping[tuple[str, Shape | None], Span]) -> TensorEntry:
    shape = cast("Shape", item.size)
    chunks = [Chunk(c.offsets, c.sizes, spans[name, c.offsets]) for c in item.chunks]
    return TensorEntry(item.properties.state[0], shape, tuple(chunks))


def _check(index: Index, where: str) -> None:
    for name, entry in index.tensors.items():
        if not (_is_name(name) and entry.dtype in dtypes.ITEMSIZE and _is_shape(entry.shape)):
            raise DamagedError(f"{where}: {name!r} has dtype {entry.dtype!r}, shape {entry.shape!r}: no tensor.")
        for chunk in entry.chunks:
            _check_span(name, chunk.span, where)
        check_cover(name, entry, where)
    for name, span in index.values.items():
        _check_span(name, span, where)


def _is_name(name: object) -> bool:
    return isinstance(name, str)


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, tuple) and all(type(n) is int and 0 <= n < 1 << 62 for n in cast("tuple[Any, ...]", shape))


def _check_span(name: str, span: Span, where: str) -> None:
    file: Any = span.file
    plain = isinstance(file, str) and file not in {"", ".", ".."} and not set("/\\\0") & set(file)
    if not plain:
        raise DamagedError(f"{where}: {name} lies in {file!r}, expected a plain file name in that directory.")
    if type(span.offset) is not int or type(span.length) is not int or span.offset < 0 or span.length <= 0:
        raise DamagedError(f"{where}: {name} lies at {span.offset!r}+{span.length!r} of {file}: no byte range.")


def check_cover(name: str, entry: TensorEntry, where: str) -> None:
    """Check that the chunks of a tensor cover each of its elements exactly once.

    Raises:
        DamagedError: a chunk is outside the shape, two overlap, or elements are left over.
    """
    rank = len(entry.shape)
    for chunk in entry.chunks:
        inside = (
            _is_shape(chunk.offsets)
            and _is_shape(chunk.sizes)
            and len(chunk.offsets) == len(chunk.sizes) == rank
            and all(o + s <= n for o, s, n in zip(chunk.offsets, chunk.sizes, entry.shape, strict=True))
        )
        if not inside:
            raise DamagedError(
                f"{where}: {name} has a chunk at {chunk.offsets!r} of size {chunk.sizes!r}, outside its shape "
                f"{entry.shape}; restore a copy of the checkpoint."
            )
    stored = sum(math.prod(chunk.sizes) for chunk in entry.chunks)
    if stored != math.prod(entry.shape):
        raise DamagedError(
            f"{where}: the chunks of {name} hold {stored} elements, its shape {entry.shape} has "
            f"{math.prod(entry.shape)}; the save was not complete: restore a copy of the checkpoint."
        )
    _check_disjoint(name, [c for c in entry.chunks if math.prod(c.sizes)], where)


def _check_disjoint(name: str, chunks: list[Chunk], where: str) -> None:
    """Sweep along the first dimension, so that row-sharded tensors cost one comparison a chunk."""
    active: list[Chunk] = []
    for chunk in sorted(chunks, key=lambda c: c.offsets):
        if chunk.offsets:
            active = [a for a in active if a.offsets[0] + a.sizes[0] > chunk.offsets[0]]
        for other in active:
            if _overlap(chunk, other):
                raise DamagedError(
                    f"{where}: two chunks of {name} overlap, at {other.offsets} and {chunk.offsets}; restore a "
                    "copy of the checkpoint."
                )
        active.append(chunk)


def _overlap(a: Chunk, b: Chunk) -> bool:
    return all(
        ao < bo + bs and bo < ao + as_ for ao, as_, bo, bs in zip(a.offsets, a.sizes, b.offsets, b.sizes, strict=True)
    )
