"""Which steps of a run stay when it is pruned: a pure function of a few facts about each."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from ckpt_core.errors import ArgumentError

Mode = Literal["min", "max"]


@dataclass(frozen=True, kw_only=True)
class Retention:
    """What stays besides the newest step, pinned ones and the champion, which always do.

    Raises:
        ArgumentError: a number is too small, `mode` is another word, or only one of `keep_best` and `metric` is given.
    """

    keep_last: int
    """How many of the newest steps."""

    keep_best: int = 0
    """How many of the best by `metric`; of equal ones the newer."""

    metric: str | None = None
    """Name of the metric. A step without it, or where it is no finite number, is never among the best."""

    mode: Mode = "min"
    """Whether the smallest or the largest `metric` is the best."""

    keep_every: int | None = None
    """Every step whose number is a multiple of this."""

    def __post_init__(self) -> None:
        if self.keep_last < 1:
            raise ArgumentError(f"keep_last={self.keep_last}: the newest checkpoint always stays, so at least 1.")
        if self.keep_best < 0:
            raise ArgumentError(f"keep_best={self.keep_best}: expected 0 or more.")
        if (self.keep_best > 0) != (self.metric is not None):
            raise ArgumentError(f"keep_best={self.keep_best}, metric={self.metric!r}: give both, or neither.")
        if self.mode not in get_args(Mode):
            raise ArgumentError(f"mode={self.mode!r}: expected 'min' or 'max'.")
        if self.keep_every is not None and self.keep_every < 1:
            raise ArgumentError(f"keep_every={self.keep_every}: expected at least 1.")


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


def _best(newest_first: list[StepFacts], retention: Retention) -> list[int]:
    if retention.metric is None:
        return []
    sign = 1 if retention.mode == "min" else -1
    values = [(_number(fact.metrics.get(retention.metric)), fact.step) for fact in newest_first]
    ranked = sorted((sign * value, -step) for value, step in values if value is not None)
    return [-negative for _, negative in ranked[: retention.keep_best]]


def _number(value: Any) -> float | None:
    """Return `value` if it is a finite number, which `True` is not."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None
