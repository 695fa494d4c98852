"""Writing one file of an export: streamed from the checkpoint's bytes, checked and digested in the same pass."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ckpt_core.durable import LocalSink
from ckpt_core.errors import MismatchError
from ckpt_core.export.cast import cast
from ckpt_core.export.finite import check_finite
from ckpt_core.export.lora import Updated
from ckpt_core.export.plan import Output, Plan
from ckpt_core.export.recipe import copy_of
from ckpt_core.export.shard import Shard
from ckpt_core.export.stored import Stored
from ckpt_core.export.stream import blocks, check_chunks, ranges
from ckpt_core.format import dtypes
from ckpt_core.format.chunks import Words, bytes_of
from ckpt_core.format.index import Shape
from ckpt_core.format.source import LocalSource
from ckpt_core.values import Statistics

if TYPE_CHECKING:
    from ckpt_core.durable import Sink
    from ckpt_core.format.digests import Hasher

INDEX_NAME = "model.safetensors.index.json"
_PAGE_BYTES = 4096

Written = Callable[[int], None]


@dataclass(frozen=True)
class Care:
    """How closely bytes are looked at while they are converted."""

    digest: bool = True
    """False leaves out all that looks at every byte: CRC32, sha256, NaN and Inf, statistics."""

    allow_nonfinite: bool = False


def write_shard(sink: Sink, shard: Shard, stored: Stored, *, care: Care, written: Written) -> dict[str, Any]:
    """Write a shard to a new file, but for sealing it.

    Args:
        sink: the file.
        shard: what to write.
        stored: what it is made of.
        care: how closely to look at the bytes.
        written: is told of bytes as they are written.

    Returns:
        `bytes` and `sha256` of the file, and `tensors`: the statistics of each. Without digests `sha256` is None,
        and there are no statistics.

    Raises:
        DamagedError: a tensor has NaN or Inf, or the checkpoint's files are damaged.
        MismatchError: a value does not fit the type to cast to.
    """
    if care.digest:
        for source in shard.checked:
            check_chunks(stored, source)
    file = _File(sink, shard.outputs, care)
    for output in shard.outputs:
        file.append(output, stored, written)
    return file.record()


def check_ties(plan: Plan, stored: Stored) -> None:
    """Compare each tensor that is stored a second time with the one that the export keeps, bit for bit.

    Raises:
        MismatchError: they differ.
    """
    for tie in plan.ties:
        kept, other = plan.tensors[tie.kept], plan.tensors[tie.source]
        check_same(stored, (tie.source, other.dtype, other.shape), (tie.kept, kept.dtype, kept.shape))


Described = tuple[str, str, Shape]
"""A stored tensor: its name, element type and shape."""


def check_same(stored: Stored, twin: Described, kept: Described) -> None:
    """Compare two tensors that the config ties, bit for bit.

    Raises:
        MismatchError: they differ.
    """
    flows = (blocks(stored, copy_of(name, shape), dtype) for name, dtype, shape in (twin, kept))
    if twin[1:] != kept[1:] or not all((a == b).all() for a, b in zip(*flows, strict=True)):
        raise MismatchError(
            f"{stored.place}: {twin[0]} and {kept[0]} differ, and the config ties them; set tie_word_embeddings to "
            "false in the config if they were trained apart."
        )


def header_bytes(outputs: Sequence[Output], *, unit: int = 8) -> bytes:
    """Return the header of a safetensors file: the length of its JSON, then the JSON, padded to `unit` bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for output in outputs:
        header[output.name] = {
            "dtype": dtypes.SAFETENSORS[output.dtype],
            "shape": list(output.shape),
            "data_offsets": [offset, offset + output.nbytes],
        }
        offset += output.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(len(text) + 8) % unit)
    return struct.pack("<Q", len(text)) + text


def index_bytes(plan: Plan) -> bytes:
    """Return the index that says which file holds which tensor."""
    weight_map = {o.name: name for name, outputs in plan.shards.items() for o in outputs}
    document = {
        "metadata": {"total_parameters": plan.elements, "total_size": plan.nbytes},
        "weight_map": dict(sorted(weight_map.items())),
    }
    return (json.dumps(document, indent=2) + "\n").encode()


class _File:
    """One new safetensors file, written from its first byte to its last."""

    def __init__(self, sink: Sink, outputs: Sequence[Output], care: Care) -> None:
        self._sink, self._care = sink, care
        self._sha256: Hasher = hashlib.sha256()
        self._statistics: dict[str, dict[str, float]] = {}
        self._place = 0
        # Where nothing is digested blocks can be shared, if they begin where those of the checkpoint do: on a page.
        self._put(memoryview(header_bytes(outputs, unit=8 if care.digest else _PAGE_BYTES)))

    def append(self, output: Output, stored: Stored, written: Written) -> None:
        """Write the next tensor."""
        if self._care.digest or not self._copy(output, stored, written):
            self._stream(output, stored, written)

    def record(self) -> dict[str, Any]:
        """Return what is to be known of the file."""
        if not self._care.digest:
            return {"bytes": self._place, "sha256": None}
        return {"bytes": self._place, "sha256": self._sha256.hexdigest(), "tensors": self._statistics}

    def _copy(self, output: Output, stored: Stored, written: Written) -> bool:
        """Have the kernel copy a tensor whose bytes are the stored ones; return whether that was possible."""
        if not (isinstance(self._sink, LocalSink) and output.unchanged):
            return False
        found = ranges(stored, output.recipe, output.stored)
        if found is None:
            return False
        for each in found:
            source = stored.source(each.file)
            assert isinstance(source, LocalSource)
            source.copy_to(each.offset, each.nbytes, self._sink.handle, self._place + each.place)
            written(each.nbytes)
        self._sink.skip(output.nbytes)
        self._place += output.nbytes
        return True

    def _stream(self, output: Output, stored: Stored, written: Written) -> None:
        """Write a tensor block by block."""
        statistics = Statistics(output.dtype)
        for block in _updated_blocks(output, stored, check=self._care.digest):
            made = cast(block, output.stored, output.dtype) if output.casts else block
            if self._care.digest:
                if not self._care.allow_nonfinite:
                    check_finite(block, made, output, stored.place)
                statistics.add(made)
            self._put(bytes_of(made))
            written(made.nbytes)
        if statistics.known:
            self._statistics[output.name] = statistics.document()

    def _put(self, data: memoryview) -> None:
        if self._care.digest:
            self._sha256.update(data)
        self._sink.write(data)
        self._place += len(data)


def _updated_blocks(output: Output, stored: Stored, *, check: bool) -> Iterator[Words]:
    """Yield the elements of a tensor as they are before any cast."""
    made = blocks(stored, output.recipe, output.stored, check=check)
    if output.update is None:
        return made
    updated = Updated(output.update, output.shape, output.stored, stored, check=check)
    return map(updated.next, made)
