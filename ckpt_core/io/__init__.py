"""DCP directories: saved with digests, loaded without running what they hold."""

# torch.distributed.checkpoint is only partly annotated.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import (
    _load_state_dict,  # pyright: ignore[reportPrivateUsage] - `load` warns where there is no process group
)
from torch.distributed.checkpoint.state_dict_saver import (
    _save_state_dict,  # pyright: ignore[reportPrivateUsage] - `save` warns too, and a thread cannot silence it
)

from ckpt_core import ranks
from ckpt_core.errors import CheckpointError, CkptError, CommitError, MismatchError
from ckpt_core.format.index import Index, check_files, read_index
from ckpt_core.format.manifest import FileRecord
from ckpt_core.io.containers import unpack
from ckpt_core.io.nesting import nest
from ckpt_core.io.reader import SafeLoadPlanner, SafeReader, load_value
from ckpt_core.io.writer import DigestWriter

if TYPE_CHECKING:
    from ckpt_core.urls import Place

__all__ = ["DigestWriter", "SafeLoadPlanner", "SafeReader", "load", "load_value", "read_state", "save"]


def load(state_dict: dict[str, Any], directory: Place, *, partial: bool = False, index: Index | None = None) -> None:
    """Collective: fill `state_dict` in place from a DCP directory.

    Args:
        state_dict: tensors are filled in place, values replaced.
        directory: the DCP directory.
        partial: leave what the checkpoint does not have as it is, instead of raising.
        index: what the directory holds, where that is known already.

    Raises:
        CheckpointError: the checkpoint is not there, damaged, hostile, or of another model.
    """
    planner = SafeLoadPlanner(directory, allow_partial_load=partial)
    # What a rank reads depends on no other rank: only the outcome is exchanged, and no plans.
    ranks.each(lambda: _read(state_dict, SafeReader(directory, index), planner))


def save(
    state_dict: dict[str, Any], directory: Place, *, twin: bool = False, digest: bool = True
) -> dict[str, FileRecord]:
    """Collective: write `state_dict` to a new DCP directory; see `DigestWriter`.

    Returns:
        Size and digest of each file that this rank wrote and digested, by file name.
    """
    writer = DigestWriter(directory, twin=twin, digest=digest)
    # `dcp.save` is what trainers' tests look for; without a process group it warns.
    call: Any = cast("Any", dcp).save if dist.is_initialized() else _save_state_dict
    with _plain_errors(CommitError), torch.device("cpu"):  # not the default device of the caller's own code
        call(
            state_dict=state_dict,
            storage_writer=writer,
            process_group=ranks.group(),
            no_dist=not ranks.initialized(),
        )
    return writer.records


def read_state(directory: Place, device: str = "cpu") -> dict[str, Any]:
    """Read all that a DCP directory holds, whatever it is, as the nested dict that was saved, in its order."""
    index = read_index(directory)
    check_files(directory, index)
    flat: dict[str, Any] = {
        name: torch.empty(entry.shape, dtype=getattr(torch, entry.dtype), device=device)
        for name, entry in index.tensors.items()
    }
    flat.update(dict.fromkeys(index.values))
    _read(flat, SafeReader(directory, index), SafeLoadPlanner(directory))
    place = {name: place for place, name in enumerate(index.paths)}
    ordered = dict(sorted(flat.items(), key=lambda item: place.get(item[0], len(place))))
    state = nest(ordered, index.paths, str(directory))
    parts = {name: unpack(part, f"{directory}: {name}") for name, part in state.items() if isinstance(part, dict)}
    return state | parts


def _read(state_dict: dict[str, Any], reader: SafeReader, planner: SafeLoadPlanner) -> None:
    with _plain_errors(MismatchError), torch.device("cpu"):  # not the default device of the caller's own code
        _load_state_dict(state_dict=state_dict, storage_reader=reader, planner=planner, no_dist=True)


@contextmanager
def _plain_errors(otherwise: type[CheckpointError]) -> Generator[None]:
    """Turn DCP's CheckpointException, which is no Exception, into the error that a rank had, or else `otherwise`."""
    try:
        yield
    except CheckpointException as error:
        raise _plain([failure for failure, _ in error.failures.values()], otherwise) from None


def _plain(failures: list[BaseException], otherwise: type[CheckpointError]) -> BaseException:
    for failure in failures:
        if isinstance(failure, (CkptError, OSError)) or not isinstance(failure, Exception):
            return failure
    return otherwise(f"{type(failures[0]).__name__}: {failures[0]}")
