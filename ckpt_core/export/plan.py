"""What an export will hold and where each byte comes from, decided from metadata before anything is written."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from ckpt_core.errors import ArgumentError, MismatchError
from ckpt_core.export.architecture import Architecture
from ckpt_core.format import dtypes
from ckpt_core.format.index import Index, Shape, TensorEntry
from ckpt_core.locate import OTHER_COMPONENTS, find_prefix


@dataclass(frozen=True, slots=True)
class Output:
    """One tensor of the export: made of the one stored tensor `source`, cast to `dtype` where that differs."""

    name: str
    dtype: str
    shape: Shape
    source: str
    entry: TensorEntry

    @property
    def nbytes(self) -> int:
        """Size in the export, in bytes."""
        return math.prod(self.shape) * dtypes.ITEMSIZE[self.dtype]


@dataclass(frozen=True, slots=True)
class Tie:
    """A tensor stored a second time under another name; it must equal the one that the export keeps."""

    source: str
    entry: TensorEntry
    kept: Output


@dataclass(frozen=True)
class Plan:
    """An export: its shards by file name, with their tensors in the order in which they are written."""

    architecture: str
    shards: dict[str, list[Output]]
    ties: tuple[Tie, ...]
    rules: tuple[str, ...]
    """The named rules that were applied, for people and for `export.json`."""

    @property
    def outputs(self) -> list[Output]:
        """Every tensor of the export."""
        return [output for shard in self.shards.values() for output in shard]

    @property
    def nbytes(self) -> int:
        """Size of all tensors in the export, in bytes."""
        return sum(output.nbytes for output in self.outputs)


def make_plan(index: Index, architecture: Architecture, *, dtype: str | None, max_shard_bytes: int, where: str) -> Plan:
    """Match a checkpoint with an architecture, tensor by tensor.

    Args:
        index: what the checkpoint holds; its chunks are known to cover each tensor exactly once.
        architecture: what the model expects.
        dtype: cast floating-point tensors to this; None keeps them.
        max_shard_bytes: largest size of one file's tensors.
        where: the checkpoint, for errors.

    Raises:
        MismatchError: a tensor is missing, left over, or of another shape.
    """
    if max_shard_bytes <= 0:
        raise ArgumentError(f"max_shard_bytes={max_shard_bytes}: expected a positive number of bytes.")
    ties = architecture.ties
    wanted = [name for name in architecture.shapes if name not in ties]
    prefix = find_prefix(index, _stored_names(architecture, index), where)
    _check_leftovers(index, architecture, prefix, where)
    rules = [f"names: {prefix!r} removed from the front"] if prefix else []
    outputs: list[Output] = []
    repeated: list[Tie] = []
    values = [prefix + name for name in wanted if prefix + name in index.values]
    if values:
        raise MismatchError(f"{where}: {values[0]} is a value, {architecture.name} expects a tensor; give its config.")
    for name in wanted:
        twins = [prefix + n for n in (name, *(t for t, s in ties.items() if s == name)) if prefix + n in index.tensors]
        outputs.append(_output(architecture, name, twins[0], index, dtype, where))
        repeated += [Tie(twin, index.tensors[twin], outputs[-1]) for twin in twins[1:]]
    rules += [f"tied: {target} is {source}, stored once" for target, source in sorted(ties.items())]
    rules += [f"renamed: {old} to {new}" for old, new in sorted(architecture.renames.items())]
    rules += [f"cast: {pair}" for pair in sorted({f"{o.entry.dtype} to {o.dtype}" for o in outputs if _is_cast(o)})]
    shards = _split(outputs, max_shard_bytes)
    return Plan(architecture.name, shards, tuple(repeated), tuple(rules))


def _is_cast(output: Output) -> bool:
    return output.entry.dtype != output.dtype


def _stored_names(architecture: Architecture, index: Index) -> list[str]:
    """Return the expected names; of tied tensors, the one that the checkpoint has."""
    names: list[str] = []
    for name in architecture.shapes:
        if name in architecture.ties:
            continue
        twins = [name, *(target for target, source in architecture.ties.items() if source == name)]
        there = [t for t in twins if any(s == t or s.endswith("." + t) for s in index.tensors)] if twins[1:] else []
        names.append(there[0] if there else name)
    return names


def _check_leftovers(index: Index, architecture: Architecture, prefix: str, where: str) -> None:
    expected = {prefix + name for name in architecture.shapes}
    leftovers = [
        name
        for name in (*index.tensors, *index.values)
        if name not in expected and not name.startswith(OTHER_COMPONENTS) and not name.endswith("._extra_state")
    ]
    if leftovers:
        raise MismatchError(
            f"{where}: holds {len(leftovers)} tensors that {architecture.name} does not have, such as "
            f"{', '.join(leftovers[:3])}; give the config that it was trained with."
        )


def _output(architecture: Architecture, name: str, source: str, index: Index, dtype: str | None, where: str) -> Output:
    entry, shape = index.tensors[source], architecture.shapes[name]
    if entry.shape != shape:
        raise MismatchError(
            f"{where}: {source} has shape {entry.shape}, {architecture.name} with this config expects {shape}; give "
            "the config that it was trained with."
        )
    if entry.dtype not in dtypes.SAFETENSORS:
        raise MismatchError(f"{where}: {source} is of {entry.dtype}, which safetensors cannot hold.")
    cast = dtype is not None and entry.dtype in dtypes.FLOATING and not architecture.keeps_float32(name, dtype)
    exported = architecture.renames.get(name, name)
    return Output(exported, dtype if cast and dtype else entry.dtype, shape, source, entry)


def _split(outputs: Iterable[Output], max_shard_bytes: int) -> dict[str, list[Output]]:
    """Fill shards in order; a tensor larger than the limit has one of its own."""
    groups: list[list[Output]] = [[]]
    size = 0
    for output in outputs:
        if groups[-1] and size + output.nbytes > max_shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(output)
        size += output.nbytes
    count = len(groups)
    names = [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    return dict(zip(names if count > 1 else ["model.safetensors"], map(_in_file_order, groups), strict=True))


def _in_file_order(outputs: list[Output]) -> list[Output]:
    """Order tensors as safetensors does: widest elements first, so that all are aligned, then by name."""
    return sorted(outputs, key=lambda o: (-_ALIGNMENT[o.dtype], o.name))


_ALIGNMENT = {name: dtypes.ITEMSIZE[name] for name in dtypes.SAFETENSORS}
