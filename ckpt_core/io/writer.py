"""How torch.distributed.checkpoint writes through this library: stock files, digested as they are written."""

# torch.distributed.checkpoint is only partly annotated.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo  # pyright: ignore[reportPrivateUsage] - the format
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from ckpt_core import durable
from ckpt_core.errors import ArgumentError, CommitError, StepExistsError
from ckpt_core.format.cover import gap_or_overlap
from ckpt_core.format.digests import ALGORITHM, CACHED_BYTES, crc32, hasher
from ckpt_core.format.dtypes import SAVED
from ckpt_core.format.index import METADATA_NAME, TWIN_NAME, Shape, twin_bytes
from ckpt_core.format.manifest import FileRecord, record_bytes
from ckpt_core.io.archive import Archive
from ckpt_core.io.chunks import raw_bytes
from ckpt_core.io.metadata import to_index
from ckpt_core.urls import is_reachable, writable_place

if TYPE_CHECKING:
    from ckpt_core.urls import Place


_WRITE_BYTES = 1 << 20
_COPIED_BYTES = 32 << 20


class DigestWriter(StorageWriter):
    """Writes a DCP directory; `records` then holds size and digest of each file that this rank wrote and digested.

    Never overwrites, flushes to the device, and refuses to finish unless every planned chunk was stored once and the
    chunks hold each element of each tensor once. For `use_collectives=False`, which leaves one `.metadata` a rank and
    so proves nothing of the whole, it is an ArgumentError before anything is written.

    Args:
        path: an empty or missing directory, or a URL's prefix, that all ranks share.
        twin: also write the metadata as JSON, so that readers of ours need no pickle.
        digest: digest each file, beside the CRC32 of each chunk in it.
    """

    def __init__(self, path: str | Place, *, twin: bool = False, digest: bool = True) -> None:
        super().__init__()
        self.path = writable_place(path, "path")
        self.records: dict[str, FileRecord] = {}
        self._twin, self._digest = twin, digest
        self._rank = 0

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin a save."""
        if checkpoint_id is not None:
            self.path = writable_place(checkpoint_id, "checkpoint_id")
        self.records = {}

    def set_up_storage_writer(self, is_coordinator: bool, *_: Any, **kwargs: Any) -> None:  # noqa: ARG002 - a published signature
        """Refuse to write without a coordinator; note which rank this is.

        A plan that says so would not do: with `enable_plan_caching` it may come from another writer's save.
        """
        if not kwargs.get("use_collectives", True):
            raise ArgumentError(
                f"{self.path}: use_collectives=False writes one .metadata for each rank, and no rank knows whether the "
                "checkpoint is whole; nothing was written. Leave use_collectives out."
            )
        self._rank = int(kwargs.get("rank", 0))

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Make the directory; leave the plan as it is."""
        if durable.file_size(self.path / METADATA_NAME) is not None:
            raise StepExistsError(f"{self.path}: holds a checkpoint, which is never overwritten; give a new path.")
        if isinstance(self.path, Path):
            self.path.mkdir(parents=True, exist_ok=True)
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Compare what the ranks say of each tensor; leave the plans as they are."""
        _check_same_tensors(plans)
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Append each item to this rank's file."""
        name = f"__{self._rank}_0.distcp"
        with _DigestFile(self.path / name, digest=self._digest) as file:
            results = [_write_item(file, name, item, planner) for item in _tensors_last(plan.items)]
            digest = file.seal()
        if digest is not None:
            self.records[name] = FileRecord(file.size, digest)
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the coordinator: compare what was stored with the plan, then write the metadata."""
        stored = [result for rank in results for result in rank]
        _check_complete(metadata, stored)
        _check_coverage(metadata)
        metadata.storage_data = {result.index: result.storage_data for result in stored}
        for item in metadata.state_dict_metadata.values():
            if isinstance(item, TensorStorageMetadata):
                item.properties.pin_memory = False  # that the copy it was written from was pinned is no fact of it
        metadata.storage_meta = StorageMeta()  # stock DCP would record this machine's paths here
        metadata.version = "1.0.0"
        data = pickle.dumps(metadata)
        if self._twin:
            self._write(TWIN_NAME, twin_bytes(to_index(metadata), data))
        self._write(METADATA_NAME, data)

    def _write(self, name: str, data: bytes) -> None:
        durable.write_new(self.path / name, data)
        self.records[name] = record_bytes(data)

    def storage_meta(self) -> StorageMeta:
        """Say nothing about where the checkpoint was made."""
        return StorageMeta()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether it is a path or URL that can be reached."""
        return is_reachable(checkpoint_id)


def _tensors_last(items: list[WriteItem]) -> list[WriteItem]:
    return sorted(items, key=lambda item: item.type != WriteItemType.BYTE_IO)


def _write_item(file: _DigestFile, name: str, item: WriteItem, planner: SavePlanner) -> WriteResult:
    data = planner.resolve_data(item)
    offset = file.size
    if isinstance(data, io.BytesIO):
        file.write(data.getbuffer())
    else:
        _check_planned(item, data)
        offset = _write_tensor(file, data.detach(), item.index.fqn)
    length = file.size - offset
    return WriteResult(index=item.index, size_in_bytes=length, storage_data=_StorageInfo(name, offset, length))


def _write_tensor(file: _DigestFile, tensor: torch.Tensor, name: str) -> int:
    """Append a tensor as `torch.save` writes it; return where it begins.

    Raises:
        ArgumentError: it is of a kind that could not be read back.
    """
    if str(tensor.dtype).removeprefix("torch.") not in SAVED or tensor.layout != torch.strided:
        raise ArgumentError(
            f"{name}: a tensor of {tensor.dtype} and {tensor.layout} could not be read back; save it in another form."
        )
    archive = Archive(tensor.dtype, tuple(tensor.shape))
    file.write(memoryview(bytes(-file.size % archive.page)))
    offset = file.size
    file.write(memoryview(archive.head))
    found = 0
    for piece in _pieces(tensor):
        found = file.write(raw_bytes(piece.resolve_conj().resolve_neg().cpu().contiguous()), found)
    file.write(memoryview(archive.tail(found)))
    return offset


def _pieces(tensor: torch.Tensor) -> Sequence[torch.Tensor]:
    """Return a tensor as it is, or by rows where its elements have to be copied first."""
    if tensor.dim() == 0 or tensor.numel() == 0 or (tensor.device.type == "cpu" and tensor.is_contiguous()):
        return [tensor]
    return tensor.split(max(1, _COPIED_BYTES // tensor[0].nbytes))


def _check_complete(metadata: Metadata, stored: list[WriteResult]) -> None:
    planned: set[tuple[str, Shape | None]] = set()
    for name, item in metadata.state_dict_metadata.items():
        if isinstance(item, TensorStorageMetadata):
            planned.update((name, tuple(chunk.offsets)) for chunk in item.chunks)
        else:
            planned.add((name, None))
    found = [(r.index.fqn, None if r.index.offset is None else tuple(r.index.offset)) for r in stored]
    if len(found) != len(set(found)) or set(found) != planned:
        missing, extra = sorted(planned - set(found), key=str), sorted(set(found) - planned, key=str)
        raise CommitError(
            f"the ranks stored {len(found)} chunks, the plan has {len(planned)}; missing {missing[:3]}, not planned "
            f"{extra[:3]}. Nothing was committed: check the disk and the ranks' output, then save again."
        )


def _check_same_tensors(plans: list[SavePlan]) -> None:
    """Compare shape and dtype of each tensor between ranks: DCP takes them from the first one."""
    seen: dict[str, tuple[int, torch.Size, torch.dtype]] = {}
    for number, plan in enumerate(plans):
        for item in plan.items:
            data = item.tensor_data
            if data is None:
                continue
            first, shape, dtype = seen.setdefault(item.index.fqn, (number, data.size, data.properties.dtype))
            if (shape, dtype) != (data.size, data.properties.dtype):
                raise CommitError(
                    f"{item.index.fqn}: the ranks disagree: {dtype} {tuple(shape)} on rank {first}, "
                    f"{data.properties.dtype} {tuple(data.size)} on rank {number}; nothing was written. Every rank "
                    "must hold the same model and optimizer."
                )


def _check_planned(item: WriteItem, tensor: torch.Tensor) -> None:
    """Compare a part with what the plan, and so the metadata, says of it."""
    data = item.tensor_data
    if data is None:
        return
    planned = (tuple(data.chunk.sizes), data.properties.dtype)
    if (tuple(tensor.shape), tensor.dtype) != planned:
        raise CommitError(
            f"{item.index.fqn}: this rank's part is {tensor.dtype} {tuple(tensor.shape)}, its place in the whole is "
            f"{planned[1]} {planned[0]}; the tensor's sharding does not describe it. Nothing was committed."
        )


def _check_coverage(metadata: Metadata) -> None:
    """Raise unless the chunks of each tensor hold each of its elements once."""
    for name, item in metadata.state_dict_metadata.items():
        if not isinstance(item, TensorStorageMetadata):
            continue
        fault = gap_or_overlap(tuple(item.size), [(tuple(c.offsets), tuple(c.sizes)) for c in item.chunks])
        if fault is not None:
            raise CommitError(
                f"{name}: {fault}; nothing was committed. Not all ranks that hold a part of it took part in this save: "
                "save on all of them, within the process group that it was sharded over."
            )


class _DigestFile:
    """A new file that counts and digests what is appended to it. Use it in a `with` statement."""

    def __init__(self, place: Place, *, digest: bool) -> None:
        self._sink = durable.create(place)
        self._hasher = hasher() if digest else None
        self.size = 0

    def __enter__(self) -> _DigestFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._sink.close()

    def write(self, data: memoryview, found: int = 0) -> int:
        """Append bytes, and return the CRC32 of them and those before, whose CRC32 is `found`.

        Each block is digested while it is in the core's cache.
        """
        for start in range(0, len(data), _WRITE_BYTES):
            block = data[start : start + _WRITE_BYTES]
            found = self._digest(block, found)
            self._sink.write(block)
        self.size += len(data)
        return found

    def _digest(self, block: memoryview, found: int) -> int:
        for start in range(0, len(block), CACHED_BYTES):
            part = block[start : start + CACHED_BYTES]
            if self._hasher is not None:
                self._hasher.update(part)
            found = crc32(part, found)
        return found

    def seal(self) -> str | None:
        """Flush to the device and close; return the digest of the whole file, if there is to be one."""
        self._sink.seal()
        return None if self._hasher is None else f"{ALGORITHM}:{self._hasher.hexdigest()}"
