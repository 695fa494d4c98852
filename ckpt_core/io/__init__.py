"""DCP directories: saved with digests, loaded without running what they hold."""

# torch.distributed.checkpoint is only partly annotated.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from ckpt_core.errors import CheckpointError, CkptError, CommitError, MismatchError
from ckpt_core.format.index import check_files, read_index
from ckpt_core.format.manifest import FileRecord
from ckpt_core.io.nesting import nest
from ckpt_core.io.reader import SafeLoadPlanner, SafeReader, load_value
from ckpt_core.io.writer import DigestWriter

__all__ = ["DigestWriter", "SafeLoadPlanner", "SafeReader", "load", "load_value", "read_state", "save"]


def load(state_dict: dict[str, Any], directory: Path, *, partial: bool = False) -> None:
    """Collective: fill `state_dict` in place from a DCP directory.

    Args:
        state_dict: tensors are filled in place, values replaced, `Stateful` objects loaded.
        directory: the DCP directory.
        partial: leave what the checkpoint does not have as it is, instead of raising.

    Raises:
        CheckpointError: the checkpoint is not there, damaged, hostile, or of another model.
    """
    planner = SafeLoadPlanner(directory, allow_partial_load=partial)
    with _plain_errors(MismatchError):
        dcp_load(state_dict, storage_reader=SafeReader(directory), planner=planner)


def save(state_dict: dict[str, Any], directory: Path, *, twin: bool = False) -> dict[str, FileRecord]:
    """Collective: write `state_dict` to a new DCP directory.

    Returns:
        Size and digest of each file that this rank wrote, by file name.
    """
    writer = DigestWriter(directory, twin=twin)
    with _plain_errors(CommitError):
        dcp_save(state_dict, storage_writer=writer)
    return writer.records


def read_state(directory: Path, device: str = "cpu") -> dict[str, Any]:
    """Read all that a DCP directory holds, whatever it is, as the nested dict that was saved."""
    index = read_index(directory)
    check_files(directory, index)
    flat: dict[str, Any] = {
        name: torch.empty(entry.shape, dtype=getattr(torch, entry.dtype), device=device)
        for name, entry in index.tensors.items()
    }
    flat.update(dict.fromkeys(index.values))
    with _plain_errors(MismatchError):
        dcp_load(flat, storage_reader=SafeReader(directory), planner=SafeLoadPlanner(directory), no_dist=True)
    return nest(flat, index.paths, str(directory))


class _plain_errors:  # noqa: N801 - reads as a statement
    """Turns DCP's CheckpointException, which is no Exception, into the error that a rank had, or else `otherwise`."""

    def __init__(self, otherwise: type[CheckpointError]) -> None:
        self._otherwise = otherwise

    def __enter__(self) -> None:
        self._warnings = warnings.catch_warnings()
        self._warnings.__enter__()
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._warnings.__exit__(None, None, None)
        if isinstance(error, CheckpointException):
            raise self._plain([failure for failure, _ in error.failures.values()]) from None

    def _plain(self, failures: list[BaseException]) -> BaseException:
        for failure in failures:
            if isinstance(failure, (CkptError, OSError)) or not isinstance(failure, Exception):
                return failure
        return self._otherwise(f"{type(failures[0]).__name__}: {failures[0]}")
