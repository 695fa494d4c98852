"""How torch.distributed.checkpoint reads through this library: straight into tensors, running nothing."""

# torch.distributed.checkpoint is only partly annotated.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from ckpt_core.errors import DamagedError, MismatchError, UntrustedError
from ckpt_core.format.index import Index, Shape, Span, read_index
from ckpt_core.io.chunks import locate_chunk, open_shard, read_box
from ckpt_core.io.metadata import to_metadata


class SafeReader(StorageReader):
    """Reads a DCP directory for `dcp.load`, with `SafeLoadPlanner` as its planner."""

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.path = Path(path)
        self.index: Index | None = None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin a load."""
        if checkpoint_id:
            self.path = Path(checkpoint_id)
        self.index = None

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """Read what the directory holds, without running its pickle."""
        self.index = read_index(self.path)
        return to_metadata(self.index)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *_: Any, **__: Any) -> None:
        """Nothing to set up: each rank read the metadata itself."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Leave the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Leave the plans as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read each item of the plan into its tensor, file by file in order of position."""
        assert self.index is not None
        spans = _spans(self.index)
        located = sorted(
            ((spans[r.storage_index.fqn, _offsets(r)], r) for r in plan.items),
            key=lambda pair: (pair[0].file, pair[0].offset),
        )
        files: dict[str, BinaryIO] = {}
        try:
            for span, item in located:
                if span.file not in files:
                    files[span.file] = open_shard(self.path / span.file)
                self._read_item(files[span.file], span, item, planner)
        finally:
            for file in files.values():
                file.close()
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _read_item(self, file: BinaryIO, span: Span, item: ReadItem, planner: LoadPlanner) -> None:
        assert self.index is not None
        name = item.storage_index.fqn
        where = f"{self.path / span.file}: {name}"
        if item.type == LoadItemType.BYTE_IO:
            file.seek(span.offset)
            planner.load_bytes(item, io.BytesIO(file.read(span.length)))
            return
        entry = self.index.tensors[name]
        sizes = next(c.sizes for c in entry.chunks if c.offsets == _offsets(item))
        target = planner.resolve_tensor(item).detach()
        read_box(file, locate_chunk(file, span, entry.dtype, sizes, where), target, tuple(item.storage_offsets), where)
        planner.commit_tensor(item, target)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether this looks like a local path."""
        return "://" not in str(checkpoint_id)


class SafeLoadPlanner(DefaultLoadPlanner):
    """DCP's planner, with values read by torch's restricted unpickler and names and shapes checked first."""

    def __init__(self, where: str | Path, *, allow_partial_load: bool = False) -> None:
        super().__init__(allow_partial_load=allow_partial_load)
        self._where = where

    def create_local_plan(self) -> LoadPlan:
        """Compare the state dict with the checkpoint before anything is read.

        Raises:
            MismatchError: a tensor is not in the checkpoint, or has another shape there.
        """
        assert self.metadata is not None
        stored = self.metadata.state_dict_metadata
        missing = [name for name in self.state_dict if name not in stored]
        if missing and not self.allow_partial_load:
            raise MismatchError(
                f"{self._where}: lacks {len(missing)} of the {len(self.state_dict)} entries to load, such as "
                f"{', '.join(missing[:3])}; it holds {', '.join(list(stored)[:3])}, ... Load it into the model that "
                "it was saved from."
            )
        for name, value in self.state_dict.items():
            item = stored.get(name)
            if isinstance(item, TensorStorageMetadata) and isinstance(value, torch.Tensor) and item.size != value.shape:
                raise MismatchError(
                    f"{self._where}: {name} has shape {tuple(item.size)}, the model's has {tuple(value.shape)}; load "
                    "it into the model that it was saved from."
                )
        return super().create_local_plan()

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Read one value without running code."""
        loaded = load_value(value.getvalue(), f"{self._where}: {read_item.dest_index.fqn}")
        buffer = io.BytesIO()
        torch.save(loaded, buffer)
        buffer.seek(0)
        super().load_bytes(read_item, buffer)


def load_value(data: bytes, where: str) -> Any:
    """Read a value that `torch.save` wrote: numbers, text, lists, dicts and tensors; anything else is refused.

    Raises:
        UntrustedError: reading it would run code.
        DamagedError: it is not readable.
    """
    try:
        return torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise UntrustedError(f"{where}: not plain data ({reason}); nothing was run. Save numbers and text.") from None
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise DamagedError(f"{where}: not a readable value ({error}); restore a copy of the checkpoint.") from None


def _spans(index: Index) -> dict[tuple[str, Shape | None], Span]:
    spans: dict[tuple[str, Shape | None], Span] = {(name, None): span for name, span in index.values.items()}
    for name, entry in index.tensors.items():
        spans.update({(name, chunk.offsets): chunk.span for chunk in entry.chunks})
    return spans


def _offsets(item: ReadItem) -> Shape | None:
    offset = item.storage_index.offset
    return None if offset is None else tuple(offset)
