"""What stock DCP wrote in `.metadata`, read without running it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any, cast

from ckpt_core.errors import UnsupportedError
from ckpt_core.format import dtypes, pickles

_METADATA = "torch.distributed.checkpoint.metadata"
_OLD_METADATA = "torch.distributed._shard.sharded_tensor.metadata"
_TensorStorage = pickles.record("TensorStorageMetadata")
_BytesStorage = pickles.record("BytesStorageMetadata")
_StorageInfo = pickles.record("_StorageInfo")


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
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _StorageInfo,
    ("torch", "Size"): _size,
    ("torch.serialization", "_get_layout"): pickles.constant(None),
    ("collections", "OrderedDict"): pickles.empty_dict,
    **{("torch", name): name for name in (*dtypes.NAMES, *dtypes.QUANTIZED)},
    # Python 3.13 calls its paths otherwise
    **{
        (module, name): pickles.constant(None)
        for module in ("pathlib", "pathlib._local")
        for name in ("Path", "PosixPath", "PurePath", "PurePosixPath", "PureWindowsPath", "WindowsPath")
    },
    # torch 2.2 and older
    (_OLD_METADATA, "TensorProperties"): pickles.record("TensorProperties"),
    (_OLD_METADATA, "MEM_FORMAT_ENCODING"): pickles.constant(None),
}


def read_document(data: bytes, where: str) -> dict[str, Any]:
    """Return what a `.metadata` pickle says in the form of our JSON twin; types are not checked yet.

    What is stored in a form that is not read is in `unsupported`, with the reason and where it lies.

    Raises:
        UntrustedError: the pickle asks for something that could run code.
        UnsupportedError: it is metadata of another version.
        DamagedError: the bytes are not a pickle.
        ValueError, TypeError, KeyError, AttributeError: it is not the metadata of a DCP directory.
    """
    metadata = pickles.loads(data, _GLOBALS, where, unknown=True)
    if isinstance(metadata, pickles.Unknown):
        raise UnsupportedError(
            f"{where}: a {metadata.name} in place of DCP's Metadata, which this library does not read."
        )
    version = metadata.state.get("version")
    if version is not None and type(version) is not str:
        raise TypeError(f"a {type(version).__name__} for a version")
    if version is not None and not version.startswith("1."):
        raise UnsupportedError(
            f"{where}: DCP metadata of version {version[:40]!r}, this library reads 1; update ckptflow."
        )
    stored = _stored(metadata.field("storage_data"))
    tensors: dict[str, Any] = {}
    values: dict[str, Any] = {}
    unsupported: dict[str, Any] = {}
    for name, item in metadata.field("state_dict_metadata").items():
        if not isinstance(name, str) or not isinstance(item, pickles.Record):
            raise TypeError(f"a {type(name).__name__} for a name, or a {type(item).__name__} for what has it")
        reason = _unread(item, stored[name].values())
        if reason:
            unsupported[name] = {"reason": reason, "spans": [_place(info) for info in stored[name].values()]}
        elif isinstance(item, _TensorStorage):
            tensors[name] = _tensor(item, stored[name])
        elif isinstance(item, _BytesStorage):
            values[name] = _place(stored[name][None])
        else:
            raise TypeError(f"{name} is neither a tensor nor a value")
    paths: Any = metadata.state.get("planner_data") or {}
    return {"tensors": tensors, "values": values, "paths": paths, "unsupported": unsupported}


def _unread(item: pickles.Record, infos: Iterable[pickles.Record]) -> str | None:
    """Return why something that may be in order is not read, or None."""
    if isinstance(item, pickles.Unknown):
        return f"described by a {item.name}"
    for info in infos:
        if isinstance(info, pickles.Unknown):
            return f"stored by a {info.name}"
        transforms: Any = info.state.get("transform_descriptors")
        if transforms:
            names = [text for text in list(transforms)[:9] if type(text) is str]
            return f"stored through {', '.join(names)[:99] or 'transforms'}"
    if isinstance(item, _TensorStorage):
        dtype = _dtype(item)
        if type(dtype) is str and dtype in dtypes.QUANTIZED:
            return f"of quantized elements, {dtype}"
        if isinstance(dtype, type) and issubclass(dtype, pickles.Unknown):
            return f"of elements of another type, {dtype.name}"
    return None


def _stored(storage_data: Any) -> defaultdict[str, dict[Any, pickles.Record]]:
    """Return what says where each item lies: by name, then by offsets."""
    stored: defaultdict[str, dict[Any, pickles.Record]] = defaultdict(dict)
    for key, info in storage_data.items():
        index = key.state
        name, offsets = index["fqn"], index.get("offset")
        if type(name) is not str or not pickles.is_key(offsets) or not isinstance(info, pickles.Record):
            raise TypeError(f"a {type(name).__name__} for a name, a {type(offsets).__name__} for offsets")
        stored[name][offsets] = info
    return stored


def _place(info: pickles.Record) -> tuple[Any, Any, Any]:
    """Return file, offset and length of an item."""
    if not isinstance(info, _StorageInfo):
        return "", 0, 0
    state = info.state
    return state["relative_path"], state["offset"], state["length"]


def _dtype(item: pickles.Record) -> Any:
    """Return a tensor's element type, which newer and older classes of torch keep in a tuple or by name."""
    state: Any = item.field("properties").state
    fields = cast("dict[str, Any]", {"dtype": state[0]} if type(state) is tuple else state)
    return fields["dtype"]


def _tensor(item: pickles.Record, stored: dict[Any, pickles.Record]) -> dict[str, Any]:
    chunks: list[tuple[Any, ...]] = []
    for chunk in item.field("chunks"):
        offsets = chunk.state["offsets"]
        if not pickles.is_key(offsets):
            raise TypeError(f"a {type(offsets).__name__} for offsets")
        chunks.append((offsets, chunk.state["sizes"], *_place(stored[offsets])))
    return {"dtype": _dtype(item), "shape": item.field("size"), "chunks": chunks}
