"""Which steps of a run stay when it is pruned: a pure function of a few facts about each."""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ckpt_core.errors import ArgumentError
from ckpt_core.metrics import Direction, direction_of

Mode = Literal["min", "max"]
_DIRECTIONS: dict[str, Direction] = {"min": "lower", "max": "higher"}
_SHOWN = 10


@dataclass(frozen=True, kw_only=True)
class Retention:
    """What stays besides the newest step, pinned ones and the champion, which always do.

    Raises:
        ArgumentError: a number is none or too small; only one of `keep_best` and `metric` is given; `mode` is another
            word, is given without a metric, or contradicts it; or it is left out and the metric's name does not say it.
    """

    keep_last: int
    """How many of the newest steps."""

    keep_best: int = 0
    """How many of the best by `metric`; of equal ones the newer."""

    metric: str | None = None
    """Name of the metric. A step without it, or where it is NaN or infinite, is never among the best."""

    mode: Mode | None = None
    """Whether the smallest or the largest `metric` is the best. It may be left out for a metric whose name says it,
    such as `heldout_loss` or `accuracy` (see `ckpt_core.metrics`)."""

    keep_every: int | None = None
    """Every step whose number is a multiple of this."""

    def __post_init__(self) -> None:
        self._check_number("keep_last", 1)
        self._check_number("keep_best", 0)
        if self.keep_every is not None:
            self._check_number("keep_every", 1)
        if self.metric is not None and not (isinstance(self.metric, str) and self.metric):  # pyright: ignore[reportUnnecessaryIsInstance] - callers do not all use a type checker
            raise ArgumentError(f"metric={self.metric!r}: expected a name.")
        if (self.keep_best > 0) != (self.metric is not None):
            raise ArgumentError(f"keep_best={self.keep_best}, metric={self.metric!r}: give both, or neither.")
        if self.mode is not None and self.mode not in _DIRECTIONS:
            raise ArgumentError(f"mode={self.mode!r}: expected 'min' or 'max'.")
        if self.mode is not None and self.metric is None:
            raise ArgumentError(f"mode={self.mode!r}: of what? Give keep_best and metric, too.")
        _ = self.direction  # raises where it is not known

    @property
    def direction(self) -> Direction | None:
        """Which way `metric` is better; None without one."""
        if self.metric is None:
            return None
        try:
            return direction_of(self.metric, _DIRECTIONS[self.mode] if self.mode else None)
        except ArgumentError as error:
            raise ArgumentError(f"mode={self.mode!r}: {error} Expected 'min' or 'max'.") from None

    def _check_number(self, name: str, least: int) -> None:
        """Check that a field is an integer of at least `least`; numpy's become Python's."""
        value = getattr(self, name)
        try:
            number = None if isinstance(value, bool) else operator.index(value)
        except TypeError:
            number = None
        if number is None:
            raise ArgumentError(f"{name}={value!r}: expected an integer.")
        if number < least:
            why = (
                "the newest checkpoint always stays, so at least 1"
                if name == "keep_last"
                else f"expected at least {least}"
            )
            raise ArgumentError(f"{name}={number}: {why}.")
        object.__setattr__(self, name, number)


@dataclass(frozen=True)
class StepFacts:
    """What retention has to know of a step."""

    step: int
    metrics: Mapping[str, Any] = field(default_factory=dict[str, Any])
    valid: bool = True
    """Whether all of it is there; a damaged step is neither counted nor given up."""


def kept(
    steps: Iterable[StepFacts], retention: Retention, *, pinned: Collection[int] = (), champion: int | None = None
) -> set[int]:
    """Return the steps that stay, among those given; their order does not matter."""
    facts = sorted(steps, key=lambda fact: fact.step, reverse=True)
    valid = [fact for fact in facts if fact.valid]
    keep = {fact.step for fact in facts if not fact.valid or fact.step in pinned or fact.step == champion}
    keep.update(fact.step for fact in valid[: retention.keep_last])
    keep.update(_best(valid, retention))
    if retention.keep_every is not None:
        keep.update(fact.step for fact in valid if fact.step % retention.keep_every == 0)
    return keep


def check_metric(steps: Iterable[StepFacts], retention: Retention) -> None:
    """Check that the whole steps of a run can be ranked by the policy's metric.

    Raises:
        ArgumentError: none of them has it as a finite number, or one has something else that is no number under its
            name: which of them is the best is then not known.
    """
    valid = [fact for fact in steps if fact.valid]
    if retention.metric is None or not valid:
        return
    for fact in valid:
        value = fact.metrics.get(retention.metric)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ArgumentError(
                f"metric {retention.metric!r}: step {fact.step} has {str(value)[:40]!r} under that name, which is no "
                "number, so which step is the best is not known; give another metric."
            )
    if not any(_number(fact.metrics.get(retention.metric)) is not None for fact in valid):
        raise ArgumentError(
            f"metric {retention.metric!r}: no step has a finite one, so which is the best is not known; the steps have "
            f"{_names(valid) or 'no metrics'}."
        )


def _names(facts: Sequence[StepFacts]) -> str:
    """Return the names under which steps have numbers, as text."""
    found = sorted({name for fact in facts for name, value in fact.metrics.items() if _number(value) is not None})
    return ", ".join(found[:_SHOWN]) + (", ..." if len(found) > _SHOWN else "")


def _best(newest_first: list[StepFacts], retention: Retention) -> list[int]:
    if retention.metric is None:
        return []
    sign = 1 if retention.direction == "lower" else -1
    values = [(_number(fact.metrics.get(retention.metric)), fact.step) for fact in newest_first]
    ranked = sorted((sign * value, -step) for value, step in values if value is not None)
    return [-negative for _, negative in ranked[: retention.keep_best]]


def _number(value: Any) -> float | None:
    """Return `value` if it is a finite number, which `True` is not."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None
