"""An index as DCP's planners know it, and back."""

# torch.distributed.checkpoint is only partly annotated.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NoReturn, cast

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo  # pyright: ignore[reportPrivateUsage] - the format
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from ckpt_core.format.index import Chunk, Index, Span, TensorEntry


class FailedMetadata(Metadata):
    """Metadata that could not be read: whoever looks into it gets the error.

    A loader of torch logs an error of `read_metadata` with its traceback, and raises another one, without its class.
    """

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __getattr__(self, name: str) -> NoReturn:
        raise self.error


@dataclass
class IndexMetadata(Metadata):
    """DCP's metadata with the index that it was made of, which also knows what cannot be read."""

    index: Index = field(default_factory=lambda: Index({}, {}))


def to_index(metadata: Metadata) -> Index:
    """Return DCP's metadata, complete with where each chunk was stored, as an index."""
    storage = cast("dict[MetadataIndex, _StorageInfo]", metadata.storage_data)
    spans = {
        (key.fqn, None if key.offset is None else tuple(key.offset)): Span(i.relative_path, i.offset, i.length)
        for key, i in storage.items()
    }
    tensors = {
        name: TensorEntry(
            str(item.properties.dtype).removeprefix("torch."),
            tuple(item.size),
            tuple(Chunk(tuple(c.offsets), tuple(c.sizes), spans[name, tuple(c.offsets)]) for c in item.chunks),
        )
        for name, item in metadata.state_dict_metadata.items()
        if isinstance(item, TensorStorageMetadata)
    }
    values = {name: spans[name, None] for name in metadata.state_dict_metadata if name not in tensors}
    paths = {name: tuple(path) for name, path in (metadata.planner_data or {}).items()}
    return Index(tensors, values, paths)


def to_metadata(index: Index) -> IndexMetadata:
    """Return an index as the metadata that DCP's planners work on."""
    stock = stock_metadata(index)
    return IndexMetadata(
        stock.state_dict_metadata, stock.planner_data, stock.storage_data, stock.storage_meta, index=index
    )


def stock_metadata(index: Index) -> Metadata:
    """Return an index as DCP's own metadata, whose pickle any installation of torch reads."""
    items: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for name, entry in index.tensors.items():
        chunks = [ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes)) for c in entry.chunks]
        properties = TensorProperties(dtype=getattr(torch, entry.dtype))
        items[name] = TensorStorageMetadata(properties, torch.Size(entry.shape), chunks)
        for chunk in entry.chunks:
            storage[MetadataIndex(name, chunk.offsets)] = _StorageInfo(
                chunk.span.file, chunk.span.offset, chunk.span.length
            )
    for name, span in index.values.items():
        items[name] = BytesStorageMetadata()
        storage[MetadataIndex(name)] = _StorageInfo(span.file, span.offset, span.length)
    # Planners take these for values, and the reader refuses them by name when one asks for them.
    items |= {name: BytesStorageMetadata() for name in index.unsupported}
    return Metadata(items, dict(index.paths), storage, StorageMeta())
