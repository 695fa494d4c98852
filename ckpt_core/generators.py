"""Stored states of random number generators, checked before any generator takes them over.

Generators believe what they are given: numpy reads the next number from whatever position a state names, which may lie
far outside of it.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from ckpt_core import documents
from ckpt_core.durable import file_size
from ckpt_core.errors import DamagedError
from ckpt_core.safetensors_header import StoredTensor, read_header

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ckpt_core.urls import Place

_MAX_BYTES = 1 << 26
_WORDS = 624
"""The words of a Mersenne Twister's state."""

_PYTHON_VERSION = 3
_TORCH_BYTES = 5056
_TORCH_HEAD = struct.Struct("<QiiQ")
"""Of torch's generator on the CPU: its seed, the words left, whether it was seeded, and the place of the next word."""

_CUDA = struct.Struct("<Qq")
"""Of torch's generator on a GPU: its seed and its offset."""


@dataclass(frozen=True)
class Generators:
    """The generators of one rank, each as its library's own `set_state` takes it."""

    numpy: tuple[str, NDArray[np.uint32], int, int, float]
    python: tuple[int, tuple[int, ...], float | None]
    torch: NDArray[np.uint8]
    cuda: NDArray[np.uint8] | None


def read_generators(path: Place) -> Generators:
    """Read the file of one rank's generators.

    Raises:
        DamagedError: it is none, or a state in it is one that its generator never has.
    """
    try:
        stored, data = read_header(path), _read(path)
        header = documents.parse_object(data[8 : 8 + int.from_bytes(data[:8], "little")])
        details = documents.parse_object(header["__metadata__"]["generators"].encode())
        return Generators(
            _numpy(_elements(stored, "numpy", data), *details["numpy"]),
            _python(_elements(stored, "python", data), *details["python"]),
            _torch(_elements(stored, "torch", data)),
            _cuda(_elements(stored, "cuda", data)) if "cuda" in stored else None,
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{path}: not the state of generators ({error}); load an older step.") from None


def _read(path: Place) -> bytes:
    size = file_size(path)
    if size is None or size > _MAX_BYTES:
        raise ValueError(f"expected a file of at most {_MAX_BYTES} bytes, found {size}")
    return path.read_bytes()


def _elements(stored: Mapping[str, StoredTensor], name: str, data: bytes) -> NDArray[Any]:
    tensor = stored[name]
    kinds: dict[str, Any] = {"I64": np.int64, "U8": np.uint8}
    if tensor.code not in kinds or len(tensor.shape) != 1:
        raise ValueError(f"{name} is a tensor of {tensor.code} {list(tensor.shape)}")
    return np.frombuffer(data, kinds[tensor.code], tensor.shape[0], tensor.offset).copy()


def _numpy(
    keys: NDArray[Any], position: Any, has_gauss: Any, gauss: Any
) -> tuple[str, NDArray[np.uint32], int, int, float]:
    _check_words("numpy", keys, _WORDS)
    _check_place("numpy", position)
    if type(has_gauss) is not int or has_gauss not in (0, 1):
        raise ValueError(f"numpy: {has_gauss!r} for whether it keeps a number of a normal distribution")
    return "MT19937", keys.astype(np.uint32), position, has_gauss, _number("numpy", gauss)


def _python(words: NDArray[Any], version: Any, gauss: Any) -> tuple[int, tuple[int, ...], float | None]:
    if version != _PYTHON_VERSION:
        raise ValueError(f"python: version {version!r}, expected {_PYTHON_VERSION}")
    _check_words("python", words, _WORDS + 1)
    numbers = cast("list[int]", words.tolist())
    _check_place("python", numbers[-1])
    return _PYTHON_VERSION, tuple(numbers), None if gauss is None else _number("python", gauss)


def _torch(state: NDArray[Any]) -> NDArray[np.uint8]:
    if state.dtype != np.uint8 or state.size != _TORCH_BYTES:
        raise ValueError(f"torch: {state.nbytes} bytes, expected {_TORCH_BYTES}")
    _, left, seeded, following = _TORCH_HEAD.unpack_from(state.tobytes())
    # It draws `left - 1` more words from `following` on; torch itself does not look whether so many are there.
    if seeded != 1 or not 1 <= left <= _WORDS or following + left - 1 > _WORDS:
        raise ValueError(f"torch: {left} words left from {following} on, of {_WORDS}")
    return state


def _cuda(state: NDArray[Any]) -> NDArray[np.uint8]:
    if state.dtype != np.uint8 or state.size != _CUDA.size:
        raise ValueError(f"cuda: {state.nbytes} bytes, expected {_CUDA.size}")
    _, offset = _CUDA.unpack(state.tobytes())
    if offset < 0 or offset % 4:
        raise ValueError(f"cuda: the offset {offset}, expected a multiple of 4")
    return state


def _check_words(name: str, words: NDArray[Any], count: int) -> None:
    if words.dtype != np.int64 or words.size != count or int(words.min()) < 0 or int(words.max()) >= 1 << 32:
        raise ValueError(f"{name}: {words.size} words of {words.dtype}, expected {count} of 32 bits")


def _check_place(name: str, place: Any) -> None:
    if type(place) is not int or not 0 <= place <= _WORDS:
        raise ValueError(f"{name}: the position {place!r}, expected 0 to {_WORDS}")


def _number(name: str, value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{name}: {value!r}, expected a number")
    return float(value)
