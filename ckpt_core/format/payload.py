"""Where the raw bytes of a stored chunk lie.

In DCP's default format a chunk is a complete `torch.save` zip: stored, not compressed. Its central directory, at
the end of the chunk's span, leads to `*/data/0`, the elements, and to `*/data.pkl`, which says how they are
laid out. Both are read here without torch and without running the pickle.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import cast

from ckpt_core.errors import DamagedError, UnsupportedError, UntrustedError
from ckpt_core.format import dtypes, pickles
from ckpt_core.format.index import Shape, Span
from ckpt_core.format.source import Source
from ckpt_core.format.zips import content, data_offset, members


@dataclass(frozen=True, slots=True)
class Payload:
    """One stored tensor: `nbytes` bytes from `offset` of its file, and how its elements lie in them."""

    offset: int
    nbytes: int
    crc32: int
    """0 where the writer left it out: then it is unchecked, not bad."""

    dtype: str
    shape: Shape
    stride: Shape
    storage_offset: int

    @property
    def contiguous(self) -> bool:
        """Whether the bytes are the elements in row-major order and nothing else."""
        return (
            self.storage_offset == 0
            and self.nbytes == math.prod(self.shape) * dtypes.ITEMSIZE[self.dtype]
            and self.stride == _row_major(self.shape, self.stride)
        )


def locate(file: Source, span: Span, where: str) -> Payload:
    """Find the elements of the tensor stored in `span` of the open `file`.

    Raises:
        DamagedError: the span does not hold one tensor as `torch.save` writes it.
    """
    stored = {member.name: member for member in members(file, span, where)}
    data = [name for name in stored if name.startswith("data/")]
    if data != ["data/0"] or "data.pkl" not in stored:
        raise DamagedError(
            f"{where}: the zip at {span.offset} holds {list(stored)[:9]}, expected one tensor (data.pkl and data/0); "
            "restore a copy of the file."
        )
    if "byteorder" in stored and content(file, span, stored["byteorder"], where) != b"little":
        raise UnsupportedError(f"{where}: a tensor of big-endian elements; save it on a little-endian machine.")
    elements = stored["data/0"]
    try:
        layout = _layout(content(file, span, stored["data.pkl"], where), elements.nbytes)
    except (DamagedError, UnsupportedError, UntrustedError) as error:
        raise type(error)(f"{where}: {error}") from None
    if layout is None:
        raise DamagedError(f"{where}: the header of a chunk is not that of a plain tensor; restore a copy.")
    payload = Payload(data_offset(file, span, elements, where), elements.nbytes, elements.crc32, *layout)
    _check_bounds(payload, where)
    return payload


_V2, _V3 = pickles.record("_rebuild_tensor_v2"), pickles.record("_rebuild_tensor_v3")
_GLOBALS: pickles.Table = {
    ("torch._utils", "_rebuild_tensor_v2"): _V2,
    ("torch._utils", "_rebuild_tensor_v3"): _V3,
    ("torch._utils", "_rebuild_parameter"): pickles.first,
    ("collections", "OrderedDict"): pickles.empty_dict,
    ("torch.storage", "UntypedStorage"): "uint8",
    **{("torch", name): dtype for name, dtype in dtypes.STORAGE_CLASSES.items()},
    **{("torch", name): name for name in dtypes.NAMES},
}


@lru_cache(maxsize=1024)
def _layout(pickled: bytes, nbytes: int) -> tuple[str, Shape, Shape, int] | None:
    """Return dtype, shape, strides and storage offset (in elements) from the pickled header of `nbytes` of data.

    Most chunks of a model have the header of another one; a header that is none of a plain tensor gives None.
    """
    tensor = pickles.loads(pickled, _GLOBALS, "the header of a chunk")
    try:
        # v3 names its dtype, v2 has its storage's; whatever follows (a conjugate view, say) is not in the bytes
        storage, offset, sizes, strides, _, _, *rest = tensor.args
        kind, unit, key, _, count = storage
        [dtype] = rest if isinstance(tensor, _V3) else [unit, *rest]
        shape, stride = cast("Shape", tuple(sizes)), cast("Shape", tuple(strides))
        integers = all(type(n) is int and 0 <= n < 1 << 62 for n in (*shape, *stride, offset, count))
        named = type(unit) is str and type(dtype) is str and (kind, key) == ("storage", "0")
        whole = named and integers and count * dtypes.ITEMSIZE[unit] == nbytes
        if whole and len(shape) == len(stride) and nbytes % dtypes.ITEMSIZE[dtype] == 0:
            return dtype, shape, stride, offset
    except (AttributeError, TypeError, ValueError, KeyError):
        pass  # not the layout of a tensor: told below
    return None


def _row_major(shape: Shape, stride: Shape) -> Shape:
    """Return the strides of `shape` in row-major order; where a size is 1 or nothing is stored, any will do."""
    if 0 in shape:
        return stride
    expected: list[int] = []
    step = 1
    for size, actual in zip(reversed(shape), reversed(stride), strict=True):
        expected.append(actual if size == 1 else step)
        step *= size
    return tuple(reversed(expected))


def _check_bounds(payload: Payload, where: str) -> None:
    if 0 in payload.shape:
        return
    pairs = list(zip(payload.shape, payload.stride, strict=True))
    last = payload.storage_offset + sum((size - 1) * step for size, step in pairs)
    if any(step == 0 and size > 1 for size, step in pairs):
        raise DamagedError(f"{where}: a chunk repeats elements (stride 0); torch's writer never does that.")
    if (last + 1) * dtypes.ITEMSIZE[payload.dtype] > payload.nbytes:
        raise DamagedError(
            f"{where}: a chunk of shape {payload.shape} needs more than the {payload.nbytes} bytes stored for it; "
            "restore a copy of the file."
        )
