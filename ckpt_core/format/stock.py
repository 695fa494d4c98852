"""What stock DCP wrote in `.metadata`, read without running it."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, cast

from ckpt_core.format import dtypes, pickles

_Stored = tuple[Any, Any, Any]
_METADATA = "torch.distributed.checkpoint.metadata"
_TensorStorage = pickles.record("TensorStorageMetadata")
_BytesStorage = pickles.record("BytesStorageMetadata")


def _size(numbers: Any = ()) -> tuple[Any, ...]:
    if type(numbers) is not tuple:
        raise TypeError("a size that is no tuple")
    return cast("tuple[Any, ...]", numbers)


_GLOBALS: pickles.Table = {
    (_METADATA, "Metadata"): pickles.record("Metadata"),
    (_METADATA, "MetadataIndex"): pickles.record("MetadataIndex"),
    (_METADATA, "TensorStorageMetadata"): _TensorStorage,
    (_METADATA, "TensorProperties"): pickles.record("TensorProperties"),
    (_METADATA, "ChunkStorageMetadata"): pickles.record("ChunkStorageMetadata"),
    (_METADATA, "BytesStorageMetadata"): _BytesStorage,
    (_METADATA, "StorageMeta"): pickles.record("StorageMeta"),
    (_METADATA, "_MEM_FORMAT_ENCODING"): pickles.constant(None),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): pickles.record("_StorageInfo"),
    ("torch", "Size"): _size,
    ("torch.serialization", "_get_layout"): pickles.constant(None),
    ("pathlib", "PosixPath"): pickles.constant(None),
    ("pathlib", "WindowsPath"): pickles.constant(None),
    ("collections", "OrderedDict"): pickles.empty_dict,
    **{("torch", name): name for name in dtypes.NAMES},
}


def read_document(data: bytes, where: str) -> dict[str, Any]:
    """Return what a `.metadata` pickle says in the form of our JSON twin; types are not checked yet.

    Raises:
        UntrustedError: the pickle asks for something that would run code.
        DamagedError: the bytes are not a pickle.
        ValueError, TypeError, KeyError, AttributeError: it is not the metadata of a DCP directory.
    """
    metadata = pickles.loads(data, _GLOBALS, where)
    version = metadata.state.get("version")
    if not (version is None or (type(version) is str and version.startswith("1."))):
        said = version[:40] if type(version) is str else type(version).__name__
        raise ValueError(f"DCP metadata of version {said!r}, this library reads 1; update ckptflow")
    stored = _stored(metadata.field("storage_data"))
    tensors: dict[str, Any] = {}
    values: dict[str, Any] = {}
    for name, item in metadata.field("state_dict_metadata").items():
        if isinstance(item, _TensorStorage):
            tensors[name] = _tensor(item, stored[name])
        elif isinstance(item, _BytesStorage):
            values[name] = stored[name][None]
        else:
            raise TypeError(f"{name} is neither a tensor nor a value")
    return {"tensors": tensors, "values": values, "paths": metadata.state.get("planner_data") or {}}


def _stored(storage_data: Any) -> defaultdict[str, dict[Any, _Stored]]:
    """Return file, offset and length of each item: by name, then by offsets."""
    stored: defaultdict[str, dict[Any, _Stored]] = defaultdict(dict)
    for key, info in storage_data.items():
        index, place = key.state, info.state
        name, offsets = index["fqn"], index.get("offset")
        if type(name) is not str or not pickles.is_key(offsets):
            raise TypeError(f"a {type(name).__name__} for a name, a {type(offsets).__name__} for offsets")
        if place.get("transform_descriptors"):
            raise ValueError(f"{name[:200]} is stored through transforms, which this library does not read")
        stored[name][offsets] = place["relative_path"], place["offset"], place["length"]
    return stored


def _tensor(item: pickles.Record, stored: dict[Any, _Stored]) -> dict[str, Any]:
    chunks: list[tuple[Any, ...]] = []
    for chunk in item.field("chunks"):
        offsets = chunk.state["offsets"]
        if not pickles.is_key(offsets):
            raise TypeError(f"a {type(offsets).__name__} for offsets")
        chunks.append((offsets, chunk.state["sizes"], *stored[offsets]))
    return {"dtype": item.field("properties").state[0], "shape": item.field("size"), "chunks": chunks}
