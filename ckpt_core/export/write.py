"""Writing an export: streamed from the checkpoint's bytes, checked and digested in the same pass."""

# torch's views of buffers are only partly annotated.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from ckpt_core import durable
from ckpt_core.errors import DamagedError, MismatchError
from ckpt_core.export.plan import Output, Plan, Tie
from ckpt_core.export.tensors import ShardFiles
from ckpt_core.format import dtypes
from ckpt_core.values import first_nonfinite

if TYPE_CHECKING:
    from ckpt_core.urls import Place

INDEX_NAME = "model.safetensors.index.json"
Records = dict[str, dict[str, Any]]


def write_weights(
    plan: Plan, source: Place, target: Path, *, allow_nonfinite: bool, progress: Callable[[int], None]
) -> Records:
    """Write every shard of a plan, and the index where there are several.

    Args:
        plan: what to write.
        source: the DCP directory.
        target: an existing directory.
        allow_nonfinite: write NaN and Inf too.
        progress: is told of bytes as they are written.

    Returns:
        `bytes` and `sha256` of each file, by name.

    Raises:
        DamagedError: a tensor has NaN or Inf, or the checkpoint's files are damaged.
        MismatchError: two tensors that the architecture ties differ, or a value does not fit the type to cast to.
    """
    records: Records = {}
    with ShardFiles(source) as files:
        for tie in plan.ties:
            _check_equal(files, tie, source)
        for name, outputs in plan.shards.items():
            records[name] = _write_shard(target / name, outputs, files, progress, allow_nonfinite=allow_nonfinite)
    if len(plan.shards) > 1:
        records[INDEX_NAME] = write_file(target / INDEX_NAME, _index_bytes(plan))
    return records


def write_file(path: Path, data: bytes) -> dict[str, Any]:
    """Write a new file, flushed to the device; return its `bytes` and `sha256`."""
    durable.write_new(path, data)
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def header_bytes(outputs: list[Output]) -> bytes:
    """Return the header of a safetensors file: the length of its JSON, then the JSON, padded to 8 bytes."""
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
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _write_shard(
    path: Path, outputs: list[Output], files: ShardFiles, progress: Callable[[int], None], *, allow_nonfinite: bool
) -> dict[str, Any]:
    hasher = hashlib.sha256()
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
    with os.fdopen(handle, "wb", buffering=0) as file:

        def put(data: Any) -> None:
            hasher.update(data)
            rest = memoryview(data)
            while rest:
                rest = rest[file.write(rest) :]

        put(header_bytes(outputs))
        for output in outputs:
            for block in files.blocks(output.source, output.entry):
                cast = block.to(getattr(torch, output.dtype))
                data = _bytes_of(cast)
                if not allow_nonfinite and first_nonfinite(data, output.dtype) is not None:
                    raise _nonfinite(block, output)
                put(data)
                progress(cast.nbytes)
        os.fsync(file.fileno())
        size = file.tell()
    return {"bytes": size, "sha256": hasher.hexdigest()}


def _bytes_of(block: torch.Tensor) -> NDArray[np.uint8]:
    return block.view(torch.uint8).numpy()


def _nonfinite(block: torch.Tensor, output: Output) -> Exception:
    """Return the error for a block with NaN or Inf after its cast, which every NaN and Inf survives."""
    if first_nonfinite(_bytes_of(block), output.entry.dtype) is None:
        return MismatchError(
            f"{output.source}: holds values that do not fit {output.dtype}, where they would be NaN or Inf; convert to "
            f"bfloat16 or float32, or keep {output.entry.dtype}."
        )
    return DamagedError(
        f"{output.source}: holds NaN or Inf; the training diverged. Convert an earlier step, or pass "
        "allow_nonfinite to have it as it is."
    )


def _check_equal(files: ShardFiles, tie: Tie, where: Place) -> None:
    """Compare two stored tensors, bit for bit."""
    kept = tie.kept.entry
    same = (kept.dtype, kept.shape) == (tie.entry.dtype, tie.entry.shape) and all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        for a, b in zip(files.blocks(tie.kept.source, kept), files.blocks(tie.source, tie.entry), strict=True)
    )
    if not same:
        raise MismatchError(
            f"{where}: {tie.source} and {tie.kept.source} differ, and the config ties them; set tie_word_embeddings "
            "to false in the config if they were trained apart."
        )


def _index_bytes(plan: Plan) -> bytes:
    weight_map: Mapping[str, str] = {o.name: name for name, outputs in plan.shards.items() for o in outputs}
    parameters = sum(torch.Size(output.shape).numel() for output in plan.outputs)
    document = {
        "metadata": {"total_parameters": parameters, "total_size": plan.nbytes},
        "weight_map": dict(sorted(weight_map.items())),
    }
    return (json.dumps(document, indent=2) + "\n").encode()
