"""What stock DCP wrote in `.metadata`, read without running it."""

from __future__ import annotations

from typing import Any

from ckpt_core.format import dtypes, pickles

_METADATA = "torch.distributed.checkpoint.metadata"
_TensorStorage = pickles.record("TensorStorageMetadata")
_BytesStorage = pickles.record("BytesStorageMetadata")


def _size(*args: Any) -> tuple[Any, ...]:
    return tuple(args[0]) if args else ()


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
    spans = _spans(metadata.field("storage_data"))
    tensors: dict[str, Any] = {}
    values: dict[str, Any] = {}
    for name, item in metadata.field("state_dict_metadata").items():
        if isinstance(item, _TensorStorage):
            tensors[name] = _tensor(name, item, spans)
        elif isinstance(item, _BytesStorage):
            values[name] = spans[name, None]
        else:
            raise TypeError(f"{name} is neither a tensor nor a value")
    return {"tensors": tensors, "values": values, "paths": metadata.state.get("planner_data") or {}}


def _spans(storage_data: Any) -> dict[tuple[Any, Any], tuple[Any, Any, Any]]:
    """Return file, offset and length by name and offsets."""
    spans: dict[tuple[Any, Any], tuple[Any, Any, Any]] = {}
    for key, info in storage_data.items():
        name, offsets = _hashable(key.field("fqn")), _hashable(key.state.get("offset"))
        if info.state.get("transform_descriptors"):
            raise ValueError(f"{str(name)[:200]} is stored through transforms, which this library does not read")
        spans[name, offsets] = (info.field("relative_path"), info.field("offset"), info.field("length"))
    return spans


def _tensor(name: str, item: pickles.Record, spans: dict[tuple[Any, Any], tuple[Any, Any, Any]]) -> dict[str, Any]:
    chunks = [(chunk.field("offsets"), chunk.field("sizes")) for chunk in item.field("chunks")]
    return {
        "dtype": item.field("properties").state[0],
        "shape": item.field("size"),
        "chunks": [(offsets, sizes, *spans[name, _hashable(offsets)]) for offsets, sizes in chunks],
    }


def _hashable(key: Any) -> Any:
    if not pickles.is_key(key):
        raise TypeError(f"a {type(key).__name__} for a name or for offsets")
    return key
