"""How two checkpoints or exports differ, tensor by tensor, read in blocks: memory does not grow with their size."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from ckpt_core.distance import Distance, measure, same_bits, varies
from ckpt_core.errors import MismatchError
from ckpt_core.locate import OTHER_COMPONENTS
from ckpt_core.tensors import HfTensors, StoredTensors, TensorFacts, open_tensors

if TYPE_CHECKING:
    from ckpt_core.urls import Place

Status = Literal["equal", "differs", "dtype", "shape", "only in a", "only in b", "tied"]
"""`equal`: bit for bit. `dtype`: equal in shape alone. `tied`: only in one, where it equals another tensor, which an
export leaves out."""


@dataclass(frozen=True)
class TensorDiff:
    """One tensor of both, or of one."""

    name: str
    """Without the prefix that a checkpoint's names have before an export's."""

    status: Status
    a: TensorFacts | None
    b: TensorFacts | None
    distance: Distance | None = None
    """How far apart, of equal shapes that are not equal bit for bit."""


@dataclass(frozen=True)
class Diff:
    """How `b` differs from `a`."""

    a: str
    b: str
    prefix: str
    """What was left off the names of one of them, so that they meet the other's."""

    tensors: tuple[TensorDiff, ...]

    @property
    def equal(self) -> bool:
        """Whether both hold the same tensors, bit for bit."""
        return all(tensor.status in {"equal", "tied"} for tensor in self.tensors)

    @property
    def counts(self) -> dict[str, int]:
        """Return the number of tensors by status."""
        return dict(Counter(tensor.status for tensor in self.tensors))

    def to_dict(self) -> dict[str, Any]:
        """Return it in JSON types."""
        return {**asdict(self), "equal": self.equal, "counts": self.counts}


def diff(a: str | Place, b: str | Place) -> Diff:
    """Compare the tensors of two checkpoints (a step's model), DCP directories or exports, in any combination.

    Of an export and a DCP directory, names are compared without the prefix that a wrapper put before them, and what a
    framework keeps beside the model is left aside. Values that are no tensors are not compared.

    Raises:
        NotACheckpointError: there is neither a checkpoint nor an export at one of them.
        MismatchError: two names of a checkpoint are one without the prefix.
        CheckpointError: one is damaged or hostile.
    """
    with open_tensors(a) as first, open_tensors(b) as second:
        sides = _Sides(first, second)
        names = sorted(sides.first_names.keys() | sides.second_names.keys())
        return Diff(str(first.place), str(second.place), sides.prefix, tuple(map(sides.compare, names)))


class _Sides:
    """Both sides, and the names by which they meet."""

    def __init__(self, first: StoredTensors, second: StoredTensors) -> None:
        self.first, self.second, self.prefix = first, second, ""
        self.mixed = isinstance(first, HfTensors) != isinstance(second, HfTensors)
        if self.mixed:
            stored, export = (second, first) if isinstance(first, HfTensors) else (first, second)
            self.prefix = _prefix(stored.facts, export.facts)
        self.first_names, self.second_names = self._names(first), self._names(second)

    def _names(self, side: StoredTensors) -> dict[str, str]:
        """Return the names of a side's tensors by those to compare."""
        if not self.mixed or isinstance(side, HfTensors):
            return {name: name for name in side.facts}
        return _without_prefix(self.prefix, [n for n in side.facts if not n.startswith(OTHER_COMPONENTS)], side.place)

    def compare(self, name: str) -> TensorDiff:
        """Return how a tensor differs."""
        one, other = self.first_names.get(name), self.second_names.get(name)
        a = None if one is None else self.first.facts[one]
        b = None if other is None else self.second.facts[other]
        if one is None or a is None:
            return TensorDiff(name, self._alone(self.second, self.second_names, name, "only in b"), a, b)
        if other is None or b is None:
            return TensorDiff(name, self._alone(self.first, self.first_names, name, "only in a"), a, b)
        if a.shape != b.shape:
            return TensorDiff(name, "shape", a, b)
        if a.dtype == b.dtype and same_bits(self.first.blocks(one), self.second.blocks(other)):
            return TensorDiff(name, "equal", a, b)
        distance = measure(self.first.blocks(one), self.second.blocks(other)) if _measurable(a, b) else None
        return TensorDiff(name, "differs" if a.dtype == b.dtype else "dtype", a, b, distance)

    def _alone(self, side: StoredTensors, names: Mapping[str, str], name: str, otherwise: Status) -> Status:
        """Return whether a tensor that an export lacks is only another name of one that both have.

        It is if it is a matrix equal to that one, as trained ones are only when they are tied. Norms and biases, and
        matrices of one number, are equal by chance.
        """
        facts = side.facts[names[name]]
        matrix = len(facts.shape) > 1 and varies(side.blocks(names[name]))
        if not self.mixed or isinstance(side, HfTensors) or not matrix:
            return otherwise
        alike = [
            names[both]
            for both in self.first_names.keys() & self.second_names.keys()
            if (side.facts[names[both]].dtype, side.facts[names[both]].shape) == (facts.dtype, facts.shape)
        ]
        tied = any(same_bits(side.blocks(names[name]), side.blocks(other)) for other in sorted(alike))
        return "tied" if tied else otherwise


def _prefix(stored: Iterable[str], names: Mapping[str, Any]) -> str:
    """Return what most of the checkpoint's names have before the export's; of equally many, the shortest."""
    found = Counter(name[:cut] for name in stored for cut in _cuts(name) if name[cut:] in names)
    return min(found, key=lambda prefix: (-found[prefix], len(prefix)), default="")


def _without_prefix(prefix: str, stored: Iterable[str], place: Place) -> dict[str, str]:
    """Return names by what they are without the prefix; those that do not have it stay."""
    found: dict[str, str] = {}
    for name in stored:
        other = found.setdefault(name.removeprefix(prefix), name)
        if other != name:
            raise MismatchError(
                f"{place}: {other} and {name} are one name without the prefix {prefix!r} that the export lacks, so "
                "which is meant is not known; compare checkpoints of the model alone."
            )
    return found


def _cuts(name: str) -> Iterator[int]:
    yield 0
    yield from (place + 1 for place, letter in enumerate(name) if letter == ".")


def _measurable(a: TensorFacts, b: TensorFacts) -> bool:
    """Whether torch can make numbers of both."""
    from ckpt_core.format import dtypes

    return math.prod(a.shape) > 0 and {a.dtype, b.dtype} <= set(dtypes.NAMES)
