"""DCP directories: saved with digests, loaded without running what they hold."""

# torch.distributed.checkpoint is only partly annotated.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Collection, Generator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlan, WriteItemType
from torch.distributed.checkpoint.state_dict_loader import (
    _load_state_dict,  # pyright: ignore[reportPrivateUsage] - `load` warns where there is no process group
)

from ckpt_core import ranks
from ckpt_core.errors import ArgumentError, CheckpointError, CkptError, CommitError, MismatchError
from ckpt_core.format.index import Index, check_files, read_index
from ckpt_core.format.manifest import FileRecord
from ckpt_core.io.agreement import buffer_names, check_agreement
from ckpt_core.io.containers import unpack
from ckpt_core.io.nesting import nest
from ckpt_core.io.reader import SafeLoadPlanner, SafeReader, load_value
from ckpt_core.io.writer import DigestWriter
from ckpt_core.urls import place_of

if TYPE_CHECKING:
    from torch.distributed.checkpoint.storage import WriteResult

    from ckpt_core.urls import Place

__all__ = [
    "DigestWriter",
    "SafeLoadPlanner",
    "SafeReader",
    "buffer_names",
    "check_state",
    "load",
    "load_value",
    "read_state",
    "save",
]


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
    state_dict: dict[str, Any],
    directory: Place,
    *,
    twin: bool = False,
    digest: bool = True,
    buffers: Collection[str] = (),
) -> dict[str, FileRecord]:
    """Collective: write `state_dict` to a new DCP directory; see `DigestWriter`.

    Args:
        state_dict: nested dicts, the same on all ranks but for the parts of sharded tensors; see `check_agreement`.
        directory: an empty or missing one.
        twin: also write the metadata as JSON.
        digest: digest each file.
        buffers: flat names of tensors that may differ between ranks, unless they are sharded: rank 0's are written.

    Returns:
        Size and digest of each file that this rank wrote and digested, by file name.

    Raises:
        CommitError: the ranks hold different state, or not all of a tensor.
    """
    writer = DigestWriter(directory, twin=twin, digest=digest)
    planner = _SavePlanner(frozenset(buffers))
    check_state(state_dict, str(directory), buffers=buffers)
    with _plain_errors(CommitError), torch.device("cpu"):  # not the default device of the caller's own code
        if dist.is_initialized() and ranks.group() is dist.group.WORLD:
            # DCP's own driver: tests of trainers look for this call.
            cast("Any", dcp).save(
                state_dict=state_dict,
                storage_writer=writer,
                planner=planner,
                process_group=ranks.group(),
                no_dist=ranks.group() is None,
            )
        else:
            _save_within(state_dict, writer, planner)
    return writer.records


def _save_within(state_dict: dict[str, Any], writer: DigestWriter, planner: DefaultSavePlanner) -> None:
    """Collective: save as DCP does, within a group that `destroy_process_group` may unregister at any time."""

    def local_plan() -> SavePlan:
        planner.set_up_planner(state_dict, writer.storage_meta(), ranks.rank() == 0)
        writer.set_up_storage_writer(ranks.rank() == 0, rank=ranks.rank())
        return writer.prepare_local_plan(planner.create_local_plan())

    def global_plans(plans: list[SavePlan]) -> list[SavePlan]:
        return writer.prepare_global_plan(planner.create_global_plan(plans)[0])

    def write() -> list[WriteResult]:
        return writer.write_data(planner.finish_plan(plan), planner).value()

    try:
        plan = ranks.spread(local_plan, global_plans)
        ranks.reduce(write, lambda results: writer.finish(planner.metadata, results))
    except Exception as error:  # noqa: BLE001 - planners raise whatever they find
        raise _plain([error], CommitError) from None


def check_state(state_dict: dict[str, Any], where: str, *, buffers: Collection[str] = ()) -> None:
    """Collective: refuse what `save` would refuse as the ranks hold different state; nothing is written."""

    def flat() -> dict[str, Any]:
        try:
            return flatten_state_dict(state_dict)[0]
        except ValueError as error:  # two entries of one name
            raise ArgumentError(f"{where}: {error}; rename one of them.") from None

    check_agreement(ranks.together(flat), where, buffers=buffers)


def read_state(directory: Place, device: str = "cpu") -> dict[str, Any]:
    """Read all that a DCP directory holds, whatever it is, as the nested dict that was saved, in its order.

    Raises:
        UnsupportedError: something there is in a form that is not read.
        CheckpointError: the checkpoint is not there, damaged or hostile.
    """
    directory = place_of(directory, "directory")
    index = read_index(directory)
    index.check_supported(index.unsupported, str(directory))
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


class _SavePlanner(DefaultSavePlanner):
    """DCP's planner; buffers that are not sharded are written by rank 0."""

    def __init__(self, buffers: frozenset[str]) -> None:
        super().__init__()
        self._buffers = buffers

    def create_local_plan(self) -> SavePlan:
        """Leave the buffers out, but for rank 0: DCP would take each from any rank."""
        plan = super().create_local_plan()
        if not self.is_coordinator:
            own = [i for i in plan.items if i.type != WriteItemType.TENSOR or i.index.fqn not in self._buffers]
            plan = self.plan = replace(plan, items=own)
        return plan


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
