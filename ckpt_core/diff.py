"""Differences of two checkpoints or exports, tensor by tensor, read in blocks: memory does not grow with their size."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from ckpt_core.distance import Distance, measure, same_bits, varies
from ckpt_core.errors import CkptError, MismatchError
from ckpt_core.locate import is_training_state
from ckpt_core.tensors import DcpTensors, HfTensors, PlannedTensors, StoredTensors, TensorFacts, open_tensors

if TYPE_CHECKING:
    from ckpt_core.export import Assets
    from ckpt_core.urls import AnyPath, Place

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


def diff(a: AnyPath, b: AnyPath) -> Diff:
    """Compare the tensors of two checkpoints (a step's model), DCP directories or exports, in any combination.

    Of an export and a DCP directory, names are compared without the prefix that a wrapper put before them, and what a
    framework keeps beside the model is left aside. Where that is not enough, the checkpoint is compared as what its
    export would be, if there is a config to tell that. Values that are no tensors are not compared.

    Raises:
        NotACheckpointError: there is neither a checkpoint nor an export at one of them.
        MismatchError: two names of a checkpoint are one without the prefix.
        CheckpointError: one is damaged or hostile.
    """
    with open_tensors(a, "a") as first, open_tensors(b, "b") as second, ExitStack() as opened:
        found = None
        if isinstance(first, HfTensors) == isinstance(second, HfTensors):
            return _Sides(first, second).diff()
        try:
            plain = _Sides(first, second)
        except MismatchError:
            plain = None
        if plain and plain.meet:
            found = plain.diff()
            if found.equal:
                return found
        planned = [_planned(one, other, opened) for one, other in ((first, second), (second, first))]
        if any(each and (each.rearranged or not found) for each in planned):
            return _Sides(planned[0] or first, planned[1] or second).diff()
        return found or (plain or _Sides(first, second)).diff()


def _planned(checkpoint: StoredTensors, export: StoredTensors, opened: ExitStack) -> PlannedTensors | None:
    """Return a checkpoint's tensors as those of its export; None if there is no config to tell that, or of another."""
    if not isinstance(checkpoint, DcpTensors):
        return None
    from ckpt_core.export import plan_export

    here = checkpoint.place
    for place in (export.place, here / "assets", here.parent / "assets"):
        with suppress(CkptError):
            assets = replace(_assets(place), names=tuple(export.facts))
            return opened.enter_context(PlannedTensors(here, plan_export(here, assets)))
    return None


def _assets(place: Place) -> Assets:
    from ckpt_core.export.adapter_config import adapter_assets, find_adapter_config
    from ckpt_core.export.assets import read_assets

    adapter = find_adapter_config(place)
    return adapter_assets(adapter) if adapter else read_assets(place, trust_remote_code=True)  # none is run


class _Sides:
    """Both sides, and the names by which they meet."""

    def __init__(self, first: StoredTensors, second: StoredTensors) -> None:
        self.first, self.second, self.prefix = first, second, ""
        self.mixed = isinstance(first, HfTensors) != isinstance(second, HfTensors)
        planned = next((side for side in (first, second) if isinstance(side, PlannedTensors)), None)
        if planned:
            self.prefix = planned.prefix
        elif self.mixed:
            stored, export = (second, first) if isinstance(first, HfTensors) else (first, second)
            self.prefix = _prefix(stored.facts, export.facts)
        self.first_names, self.second_names = self._names(first), self._names(second)

    @property
    def meet(self) -> bool:
        """Whether both have tensors of the same names."""
        return self.first_names.keys() == self.second_names.keys()

    def diff(self) -> Diff:
        """Compare them."""
        names = sorted(self.first_names.keys() | self.second_names.keys())
        return Diff(str(self.first.place), str(self.second.place), self.prefix, tuple(map(self.compare, names)))

    def _names(self, side: StoredTensors) -> dict[str, str]:
        """Return the names of a side's tensors by those to compare."""
        if not self.mixed or not isinstance(side, DcpTensors):
            return {name: name for name in side.facts}
        return _without_prefix(self.prefix, [n for n in side.facts if not is_training_state(n)], side.place)

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
        if isinstance(side, PlannedTensors) and names[name] in side.ties:
            return "tied" if same_bits(side.blocks(names[name]), side.blocks(side.ties[names[name]])) else otherwise
        matrix = len(facts.shape) > 1 and varies(side.blocks(names[name]))
        if not self.mixed or not isinstance(side, DcpTensors) or not matrix:
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
