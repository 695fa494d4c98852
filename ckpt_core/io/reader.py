"""How torch.distributed.checkpoint reads through this library: straight into tensors, running nothing."""

# torch.distributed.checkpoint is only partly annotated.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from ckpt_core.errors import CkptError, DamagedError, MismatchError, UnsupportedError, UntrustedError
from ckpt_core.format import pickles
from ckpt_core.format.chunks import locate_chunk
from ckpt_core.format.index import Chunk, Index, Shape, Span, check_files, read_index
from ckpt_core.format.pickled_names import may_run_code
from ckpt_core.format.source import Source, open_source, read_into
from ckpt_core.format.zips import read_all
from ckpt_core.io import numpy_values
from ckpt_core.io.chunks import read_box
from ckpt_core.io.metadata import FailedMetadata, IndexMetadata, to_metadata
from ckpt_core.printable import printable_logger
from ckpt_core.urls import is_reachable, place_of
from ckpt_core.workers import in_parallel

if TYPE_CHECKING:
    from ckpt_core.urls import Place

_log = printable_logger(__name__)
_MAX_GLOBALS = 1000


class SafeReader(StorageReader):
    """Reads a DCP directory for `dcp.load`; with any planner, nothing that it holds is run.

    Args:
        path: the directory, or its URL.
        index: what it holds, where that is known already.
    """

    def __init__(self, path: str | Place, index: Index | None = None) -> None:
        super().__init__()
        self.path = place_of(path, "path")
        self.index = index

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin a load."""
        if checkpoint_id is not None:
            self.path, self.index = place_of(checkpoint_id, "checkpoint_id"), None

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """Read what the directory holds, without running its pickle.

        An error comes when the metadata is looked at, or at the latest from `set_up_storage_reader`.
        """
        try:
            if self.index is None:
                self.index = read_index(self.path)
            check_files(self.path, self.index)
        except (CkptError, OSError) as error:
            return FailedMetadata(error)
        return to_metadata(self.index)

    def set_up_storage_reader(self, metadata: Metadata, *_: Any, **__: Any) -> None:
        """Nothing to set up: each rank read the metadata itself.

        Raises:
            CheckpointError: it could not.
        """
        if isinstance(metadata, FailedMetadata):
            raise metadata.error

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Leave the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Leave the plans as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read each item of the plan into its tensor: several ranges of bytes at once, each file in its order."""
        reads = self._begin(plan, planner)
        sizes = [read.target.nbytes for read in reads]
        in_parallel(self._read, reads, sizes, remote=not isinstance(self.path, Path))
        for read in reads:
            planner.commit_tensor(read.item, read.target)
        parts = sum(tuple(read.target.shape) != read.chunk.sizes for read in reads)
        if parts:
            _log.info("%s: of %d chunks only a part was read: structure checked, not the CRC32", self.path, parts)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _begin(self, plan: LoadPlan, planner: LoadPlanner) -> list[_Read]:
        """Load the values, and return what is to be read into tensors, in the order of files and places."""
        assert self.index is not None
        chunks = _chunks(self.index)
        self.index.check_supported((item.storage_index.fqn for item in plan.items), str(self.path))
        pairs = sorted(
            ((chunks[item.storage_index.fqn, _offsets(item)], item) for item in plan.items),
            key=lambda pair: (pair[0].span.file, pair[0].span.offset),
        )
        values = [pair for pair in pairs if pair[1].type == LoadItemType.BYTE_IO]
        for name, group in groupby(values, key=lambda pair: pair[0].span.file):
            with open_source(self.path / name) as file:
                for chunk, item in group:
                    where = self._where(chunk, item)
                    planner.load_bytes(item, _harmless(load_value(file, chunk.span, where), where))
        tensors = [pair for pair in pairs if pair[1].type != LoadItemType.BYTE_IO]
        return [_Read(chunk, item, planner.resolve_tensor(item).detach()) for chunk, item in tensors]

    def _read(self, reads: Sequence[_Read]) -> None:
        """Read neighbours: one file is open at a time, however many ranks saved."""
        assert self.index is not None
        for name, group in groupby(reads, key=lambda read: read.chunk.span.file):
            with open_source(self.path / name) as file:
                for read in group:
                    chunk, where = read.chunk, self._where(read.chunk, read.item)
                    entry = self.index.tensors[read.item.storage_index.fqn]
                    payload = locate_chunk(file, chunk.span, entry.dtype, chunk.sizes, where)
                    read_box(file, payload, read.target, tuple(read.item.storage_offsets), where)

    def _where(self, chunk: Chunk, item: ReadItem) -> str:
        return f"{self.path / chunk.span.file}: {item.storage_index.fqn}"

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether it is a path or URL that can be reached."""
        return is_reachable(checkpoint_id)


@dataclass(frozen=True, slots=True)
class _Read:
    """One range of a tensor that is to be read."""

    chunk: Chunk
    item: ReadItem
    target: torch.Tensor


class SafeLoadPlanner(DefaultLoadPlanner):
    """DCP's planner, with names, kinds and shapes compared before anything is read."""

    def __init__(self, where: str | Place, *, allow_partial_load: bool = False) -> None:
        super().__init__(allow_partial_load=allow_partial_load)
        self._where = where

    def create_local_plan(self) -> LoadPlan:
        """Compare the state dict with the checkpoint.

        Raises:
            MismatchError: an entry is not in the checkpoint, or is of another kind or shape there.
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
        if isinstance(self.metadata, IndexMetadata):
            self.metadata.index.check_supported(self.state_dict, str(self._where))
        for name, value in self.state_dict.items():
            if name in stored:
                self._compare(name, stored[name], value)
        return super().create_local_plan()

    def _compare(self, name: str, item: TensorStorageMetadata | BytesStorageMetadata, value: Any) -> None:
        found = tuple(item.size) if isinstance(item, TensorStorageMetadata) else "no tensor"
        wanted = tuple(value.shape) if isinstance(value, torch.Tensor) else "no tensor"
        if found != wanted:
            raise MismatchError(
                f"{self._where}: {name} has shape {found}, what it is loaded into has {wanted}; load it into the model "
                "that it was saved from."
            )


def load_value(file: Source, span: Span, where: str) -> Any:
    """Read a value that `torch.save` wrote: numbers, text, lists, dicts, tensors, numpy's numbers and arrays of them.

    Anything else is refused.

    Raises:
        UntrustedError: reading it could run code.
        UnsupportedError: it holds objects of other classes.
        DamagedError: it is not readable, or not what was written.
    """
    asked, records = _Anything(), read_all(file, span, where)
    pickles.loads(records.get("data.pkl", b""), asked, where)
    try:
        if any(module.partition(".")[0] == "numpy" for module, _ in asked):
            return numpy_values.load(records, where)
        data = bytearray(span.length)
        read_into(file, span.offset, memoryview(data), where)
        return torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except UnsupportedError as error:
        said = str(error).removeprefix(f"{where}: ")
        raise UnsupportedError(f"{where}: {said}") from None
    except CkptError:
        raise
    except pickle.UnpicklingError:
        raise asked.refused(where) from None
    except Exception as error:  # noqa: BLE001 - torch's unpickler raises whatever a hostile file makes it raise
        raise DamagedError(f"{where}: not a readable value ({error}); restore a copy of the checkpoint.") from None


def _harmless(value: Any, where: str) -> io.BytesIO:
    """Return plain data as bytes, for a planner that may run whatever it loads."""
    buffer = io.BytesIO()
    try:
        torch.save(value, buffer)
    except RecursionError:
        raise DamagedError(
            f"{where}: a value of lists in lists without end; restore a copy of the checkpoint."
        ) from None
    buffer.seek(0)
    return buffer


class _Anything(dict[tuple[str, str], Any]):
    """Stands for every global, so that only a pickle's structure is judged; torch judges the globals after it."""

    def refused(self, where: str) -> UntrustedError | UnsupportedError:
        """Return the error that names what the pickle asked for."""
        running = [f"{module}.{name}" for module, name in self if may_run_code(module, name)]
        if running:
            return UntrustedError(
                f"{where}: not plain data: its pickle asks for {', '.join(running)[:500]}, which could run code; "
                "nothing was run. Do not load it with pickle or torch.load."
            )
        names = [f"{module}.{name}" for module, name in self]
        return UnsupportedError(
            f"{where}: not plain data: its pickle asks for {', '.join(names)[:500]}, which this library does not read; "
            "save numbers, text, lists, dicts and tensors."
        )

    def __missing__(self, key: tuple[str, str]) -> Any:
        if len(self) == _MAX_GLOBALS:
            raise ValueError(f"more than {_MAX_GLOBALS} classes and functions")
        sized = key[1] == "bytearray" or (key[0].partition(".")[0] == "torch" and key[1].endswith("Tensor"))
        self[key] = _not_by_size if sized else pickles.Record
        return self[key]


def _not_by_size(*arguments: Any) -> pickles.Record:
    """Stand in for what takes as much memory as a number says.

    Raises:
        ValueError: it is called with numbers.
    """
    if not all(isinstance(argument, (str, pickles.Record, list, tuple)) for argument in arguments):
        raise ValueError("something is made by its size alone")
    return pickles.Record()


def _chunks(index: Index) -> dict[tuple[str, Shape | None], Chunk]:
    """Return each chunk by name and offsets, and each value, as a chunk without either, by name."""
    chunks: dict[tuple[str, Shape | None], Chunk] = {(n, None): Chunk((), (), s) for n, s in index.values.items()}
    for name, entry in index.tensors.items():
        chunks.update({(name, chunk.offsets): chunk for chunk in entry.chunks})
    return chunks


def _offsets(item: ReadItem) -> Shape | None:
    offset = item.storage_index.offset
    return None if offset is None else tuple(offset)
