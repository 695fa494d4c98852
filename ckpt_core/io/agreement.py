"""Structure and replicated content of a state dict: compared between ranks before any of them writes."""

# torch is only partly annotated.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false

from __future__ import annotations

import io
import logging
import pickle
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.checkpoint.state_dict import (
    _get_fqns,  # pyright: ignore[reportPrivateUsage] - names as in a state dict, whatever wraps the module
)
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from ckpt_core import ranks
from ckpt_core.errors import ArgumentError, CommitError
from ckpt_core.format.digests import hasher
from ckpt_core.io.chunks import raw_bytes

if TYPE_CHECKING:
    from ckpt_core.format.digests import Hasher

Facts = dict[str, str]
Part = tuple[str, tuple[int, ...]]
"""A part of a tensor: the tensor's name, and where in it the part begins."""

_SCALARS = frozenset({bool, int, float, complex, str, bytes, type(None)})
_SHOWN = 60
"""As many characters of a value as a message shows; a longer one is told from others by its digest."""

_WHOLE_BYTES = 1 << 20
_SAMPLE_BYTES = 1 << 14
_log = logging.getLogger(__name__)


def check_agreement(flat: Mapping[str, Any], where: str, *, buffers: Collection[str] = ()) -> None:
    """Collective: compare flat state dicts; what is not the same on all ranks is refused by its name.

    Compared are the names, of each tensor its kind, dtype and global shape, of each value its content, and of each
    tensor that is not sharded its bytes: all of them up to 1 MiB, and of a larger one 64 blocks of 16 KiB, evenly
    spaced. Buffers that are not sharded may differ, as those of BatchNorm do between data-parallel ranks: rank 0's
    are what is saved, and a warning names them.

    Raises:
        ArgumentError: an entry could not be read back: a sharded tensor inside a value, or a sum that is not complete.
        CommitError: the ranks hold different state.
    """
    strict, loose = ranks.together(lambda: _describe(flat, frozenset(buffers)))
    if ranks.world_size() == 1:
        return
    replicas = ranks.together(lambda: _replicas(flat))
    digests = ranks.gather((_digest_of(strict), _digest_of(loose), bool(replicas)))
    if len({digest for digest, *_ in digests}) > 1:
        number, name, expected, found = next(difference for difference in _differences(strict) if difference)
        raise CommitError(
            f"{where}: the ranks disagree on {name}: rank 0 has {expected}, rank {number} has {found}; nothing was "
            "committed. Every rank must hold the same model and optimizer, built in the same order, and what is not "
            "sharded must be equal: broadcast it. Stages of a pipeline are not one model: save them with "
            "torch.distributed.checkpoint and `ckpt_core.io.DigestWriter`."
        )
    if any(has for *_, has in digests):
        ranks.reduce(lambda: replicas, lambda parts: _check_replicas(parts, where))
    if len({digest for _, digest, _ in digests}) > 1:
        number, name, *_ = next(difference for difference in _differences(loose) if difference)
        if ranks.rank() == 0:
            _log.warning(
                "%s: buffers differ between ranks 0 and %d, such as %s; rank 0's are saved", where, number, name
            )


def buffer_names(module: torch.nn.Module, key: str) -> frozenset[str]:
    """Return the flat names of a module's buffers, whose state is saved below `key`."""
    return frozenset(f"{key}.{name}" for buffer, _ in module.named_buffers() for name in _get_fqns(module, buffer))


def _replicas(flat: Mapping[str, Any]) -> dict[Part, str]:
    """Return the digest of this rank's part of each sharded tensor of which other ranks may have the same part."""
    digests: dict[Part, str] = {}
    for name, tensor in flat.items():
        if not isinstance(tensor, DTensor) or tensor.device_mesh.get_coordinate() is None:
            continue
        mesh, placements = tensor.device_mesh, tensor.placements
        if any(placement.is_replicate() and size > 1 for placement, size in zip(placements, mesh.shape, strict=True)):
            _, offsets = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
            digests[name, tuple(offsets)] = _content(tensor.to_local(), name)
    return digests


def _check_replicas(digests: list[dict[Part, str]], where: str) -> None:
    """Compare the digests of parts that several ranks have; they are given for each rank.

    Raises:
        CommitError: two ranks have different bytes.
    """
    seen: dict[Part, tuple[int, str]] = {}
    for number, own in enumerate(digests):
        for part, digest in own.items():
            first, expected = seen.setdefault(part, (number, digest))
            if digest != expected:
                raise CommitError(
                    f"{where}: {part[0]}: ranks {first} and {number} hold replicas of the part at {part[1]}, and these "
                    "differ; nothing was committed. Synchronise the replicas, or load an older step."
                )


def _describe(flat: Mapping[str, Any], buffers: frozenset[str]) -> tuple[Facts, Facts]:
    """Return what must be equal on all ranks, by name, and what only should be."""
    strict: Facts = {}
    loose: Facts = {}
    for name, value in sorted(flat.items()):
        if not isinstance(value, torch.Tensor):
            strict[name] = _value_facts(value, _content(value, name))
            continue
        sharded = isinstance(value, (DTensor, ShardedTensor))
        kind = "a sharded tensor" if sharded else "a tensor"
        strict[name] = f"{kind} of {value.dtype} {tuple(value.size())}"
        if isinstance(value, DTensor) and any(placement.is_partial() for placement in value.placements):
            raise ArgumentError(f"{name}: a sum of which each rank has one term; redistribute it before it is saved.")
        if sharded:
            continue
        if name in buffers:
            loose[name] = _content(value, name)
        elif ranks.world_size() > 1:
            strict[name] += f" of content {_content(value, name)}"
    return strict, loose


def _value_facts(value: object, content: str) -> str:
    """Return what tells a value from another: its text where that is short and says all, else its digest."""
    kind = type(value).__name__
    entries = cast("list[object]", value) if type(value) in {list, tuple} else [value]
    text = repr(value) if all(type(entry) in _SCALARS for entry in entries[:_SHOWN]) else ""
    return f"{kind} {text}" if text and len(text) <= _SHOWN else f"{kind} of content {content}"


def _digest_of(facts: Facts) -> str:
    digest = hasher()
    for item in facts.items():
        digest.update(repr(item).encode())
    return digest.hexdigest()


def _differences(facts: Facts) -> list[tuple[int, str, str, str] | None]:
    """Collective: return for each rank the first entry in which it differs from rank 0: rank, name and both facts."""
    expected = ranks.first(lambda: facts)
    names = sorted(name for name in {*expected, *facts} if expected.get(name) != facts.get(name))
    nothing = "nothing"
    own = (ranks.rank(), names[0], expected.get(names[0], nothing), facts.get(names[0], nothing)) if names else None
    return ranks.gather(own)


def _content(value: Any, name: str) -> str:
    digest = hasher()
    try:
        _add(digest, value, name)
    except RecursionError:
        raise ArgumentError(f"{name}: values in values, too deep to be saved; flatten it.") from None
    return digest.hexdigest()


def _add(digest: Hasher, value: Any, name: str) -> None:
    """Digest a value so that equal ones have equal digests, whichever objects in it are one and the same."""
    if isinstance(value, (DTensor, ShardedTensor)):
        raise ArgumentError(
            f"{name}: a sharded tensor inside of a value, such as a tuple: one rank's part alone would be saved; keep "
            "tensors in dicts and lists."
        )
    if isinstance(value, torch.Tensor):
        _add_tensor(digest, value)
        return
    digest.update(f"{type(value).__module__}.{type(value).__qualname__}(".encode())
    entries = _entries(value)
    if entries is None:
        digest.update(repr(value).encode() if type(value) in _SCALARS else _plain_bytes(value))
    else:
        for entry in entries:
            _add(digest, entry, name)
    digest.update(b")")


def _entries(value: Any) -> Iterable[Any] | None:
    """Return what is in a container, in an order that equal ones share; None for anything else."""
    if isinstance(value, Mapping):
        return sorted(cast("Mapping[Any, Any]", value).items(), key=lambda item: repr(item[0]))
    if isinstance(value, (set, frozenset)):
        return sorted(cast("set[Any]", value), key=repr)
    return cast("Iterable[Any]", value) if isinstance(value, (list, tuple)) else None


def _plain_bytes(value: Any) -> bytes:
    """Return a value's pickle, written as if no object occurred in it twice; empty if it has none."""
    buffer = io.BytesIO()
    pickler = pickle.Pickler(buffer, protocol=4)
    pickler.fast = True
    try:
        pickler.dump(value)
    except Exception:  # noqa: BLE001 - pickling runs the object's own code, which may raise anything
        return b""
    return buffer.getvalue()


def _add_tensor(digest: Hasher, tensor: torch.Tensor) -> None:
    """Digest dtype, shape and bytes of a tensor; of a large one, samples."""
    digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    if tensor.layout != torch.strided or tensor.numel() == 0 or tensor.is_meta or tensor.is_quantized:
        return  # without bytes, or refused when it is written
    elements = tensor.detach().resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8)
    size = elements.numel()
    starts = [0] if size <= _WHOLE_BYTES else _spaced(size)
    length = size if size <= _WHOLE_BYTES else _SAMPLE_BYTES
    for start in starts:
        digest.update(raw_bytes(elements[start : start + length].cpu()))


def _spaced(size: int) -> list[int]:
    count = _WHOLE_BYTES // _SAMPLE_BYTES
    return [(size - _SAMPLE_BYTES) * number // (count - 1) for number in range(count)]
