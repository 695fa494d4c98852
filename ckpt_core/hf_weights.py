"""Weights of a Hugging Face directory: one safetensors file, several with an index, or each rank's parts of tensors."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ckpt_core.durable import file_size
from ckpt_core.errors import DamagedError, NotACheckpointError, UntrustedError
from ckpt_core.format.cover import Shape, gap_or_overlap
from ckpt_core.safetensors_header import StoredTensor, read_header

if TYPE_CHECKING:
    from ckpt_core.urls import Place

SUFFIX = ".safetensors"
SINGLE_NAME = "model.safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_MAX_INDEX_BYTES = 1 << 28


@dataclass(frozen=True, slots=True)
class HfTensor:
    """A tensor of a Hugging Face directory, in one file or in parts."""

    code: str
    """Element type by its name in safetensors, such as `BF16`."""

    dtype: str | None
    """Element type by torch's name; None where several elements share a byte."""

    shape: Shape
    parts: tuple[tuple[str, Shape, StoredTensor], ...]
    """Of each part its file, where it begins in the tensor, and what lies there."""

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return sum(tensor.nbytes for _, _, tensor in self.parts)


@dataclass(frozen=True)
class HfWeights:
    """The tensors of a Hugging Face directory, by the file that holds them."""

    place: Place
    """The directory."""

    files: Mapping[str, Mapping[str, StoredTensor]]
    """By the file's name in the directory, then by the tensor's."""

    @cached_property
    def tensors(self) -> dict[str, HfTensor]:
        """Return each tensor.

        Raises:
            DamagedError: several files hold one, and not as parts that make it up.
        """
        parts: dict[str, list[tuple[str, StoredTensor]]] = {}
        for file, tensors in self.files.items():
            for name, tensor in tensors.items():
                parts.setdefault(name, []).append((file, tensor))
        return {name: _tensor(name, found, self.place) for name, found in parts.items()}

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(tensor.nbytes for tensors in self.files.values() for tensor in tensors.values())


def read_weights(place: Place) -> HfWeights:
    """Read what a Hugging Face directory, or one safetensors file, holds, and check that it is all there.

    Raises:
        NotACheckpointError: there are no weights.
        UntrustedError: there are only pickles.
        DamagedError: a header is not sound, or the index and the files do not agree.
    """
    if place.name.endswith(SUFFIX) and file_size(place) is not None:
        return HfWeights(place.parent, {place.name: read_header(place)})
    names = _names(place)
    indexes = [name for name in names if name.endswith(INDEX_SUFFIX)]
    if len(indexes) > 1:
        raise DamagedError(f"{place}: several indexes ({', '.join(indexes)}), so which weights are meant is not known.")
    if indexes:
        weights = HfWeights(place, _indexed(place, indexes[0]))
        _check_one_meant(weights, indexes[0], names)
        _ = weights.tensors  # an index says where a tensor is, not that it is whole
        return weights
    files = [name for name in names if name.endswith(SUFFIX)]
    if not files:
        raise _none(place, names)
    weights = HfWeights(place, {name: read_header(place / name) for name in files})
    _ = weights.tensors  # without an index nothing else says that all is there
    return weights


def has_weights(place: Place) -> bool:
    """Whether there is a safetensors file at `place` or in it, an index of some, or weights as pickles."""
    if place.name.endswith(SUFFIX):
        return file_size(place) is not None
    return any(name.endswith((SUFFIX, INDEX_SUFFIX, *_PICKLED)) for name in _names(place))


def _names(place: Place) -> list[str]:
    return sorted(entry.name for entry in place.iterdir()) if place.is_dir() else []


def _none(place: Place, names: Iterable[str]) -> Exception:
    pickled = [name for name in names if name.endswith(_PICKLED)]
    if pickled:
        return UntrustedError(
            f"{place / pickled[0]}: weights as a pickle, which runs code when it is loaded, and no safetensors beside "
            "it; convert it where you trust it, with `save_pretrained`."
        )
    return NotACheckpointError(f"{place}: no {SUFFIX} files in it; give a Hugging Face directory.")


def _indexed(place: Place, index: str) -> dict[str, Mapping[str, StoredTensor]]:
    """Read the files that the index names, and check that each holds what the index says, and nothing else."""
    planned: dict[str, set[str]] = {}
    for name, file in _weight_map(place / index).items():
        planned.setdefault(file, set()).add(name)
    files = {file: read_header(place / file) for file in sorted(planned)}
    for file, tensors in files.items():
        wrong = sorted(planned[file] ^ tensors.keys())
        if wrong:
            said = "does not put there" if wrong[0] in tensors else "puts there, but it has not"
            raise DamagedError(
                f"{place / file}: {wrong[0]}, which {index} {said}; they are of different exports: restore both."
            )
    return files


def _weight_map(path: Place) -> dict[str, str]:
    """Return which file holds which tensor."""
    try:
        document = json.loads(_index_bytes(path))
        return {_text(name): _plain_name(file) for name, file in document["weight_map"].items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        said = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
        raise DamagedError(f"{path}: not a sound index ({said[:300]}); restore a copy of it.") from None


def _index_bytes(path: Place) -> bytes:
    size = file_size(path)
    if size is None or size > _MAX_INDEX_BYTES:
        raise ValueError(f"not a regular file of at most {_MAX_INDEX_BYTES} bytes")
    return path.read_bytes()


def _text(name: Any) -> str:
    if not isinstance(name, str):
        raise TypeError(f"a {type(name).__name__} for a name")
    return name


def _plain_name(file: Any) -> str:
    plain = isinstance(file, str) and file.endswith(SUFFIX) and file.isprintable() and not set("/\\") & set(file)
    if not plain:
        raise ValueError(f"something lies in {str(file)[:99]!r}, expected a safetensors file's plain name")
    return str(file)


def _check_one_meant(weights: HfWeights, index: str, names: Iterable[str]) -> None:
    """Check that no single file stands beside an index: `from_pretrained` would load that, whatever the index says."""
    if SINGLE_NAME in names and SINGLE_NAME not in weights.files:
        raise DamagedError(
            f"{weights.place}: {index} and a {SINGLE_NAME} that it does not name, so which weights are meant is not "
            "known; take one of them away."
        )


def _tensor(name: str, parts: Sequence[tuple[str, StoredTensor]], place: Place) -> HfTensor:
    """Return the tensor that parts make up."""
    file, first = parts[0]
    placed = tuple((file, part.begin or (0,) * len(part.shape), part) for file, part in parts)
    if len(parts) > 1 and any(part.begin is None for _, part in parts):
        raise DamagedError(
            f"{place}: {name} lies in {file} and in {parts[1][0]}, and nothing says which is meant, or that they are "
            "parts of it; give a directory that holds it once."
        )
    if any((part.code, len(part.shape)) != (first.code, len(first.shape)) for _, part in parts):
        raise DamagedError(f"{place}: the parts of {name} differ in type; restore all files of one save.")
    shape = tuple(max(ends) for ends in zip(*(_end(begin, part) for _, begin, part in placed), strict=True))
    problem = gap_or_overlap(shape, [(begin, part.shape) for _, begin, part in placed])
    if problem:
        raise DamagedError(
            f"{place}: {name}, of which {', '.join(dict.fromkeys(file for file, _ in parts))} hold parts, is not there "
            f"once and whole ({problem}); restore the files of all ranks, of one save."
        )
    return HfTensor(first.code, first.dtype, shape, placed)


def _end(begin: Shape, part: StoredTensor) -> Shape:
    return tuple(at + size for at, size in zip(begin, part.shape, strict=True))
