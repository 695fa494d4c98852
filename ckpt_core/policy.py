"""Which of two models is to be served: the rule, and the decision with its reason."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ckpt_core.errors import ArgumentError
from ckpt_core.metrics import Direction, direction_of

Figures = Mapping[str, float | None]
"""What was measured of a model, by the metric's name; None or no entry where it was not."""


@dataclass(frozen=True)
class Policy:
    """The metric that decides, which way is better, and by how much a challenger must be better, in its unit.

    The direction may be left out for a metric whose name says it (see `ckpt_core.metrics`).

    Raises ArgumentError for a direction that is none, that is not known, or that is not that of one of this library's
    own metrics, and for a margin that is negative or no finite number.
    """

    metric: str = "heldout_loss"
    direction: Direction | None = None
    margin: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "direction", direction_of(self.metric, self.direction))
        if not (math.isfinite(self.margin) and self.margin >= 0):
            raise ArgumentError(f"margin {self.margin!r}: expected 0 or more, in the unit of {self.metric}")


@dataclass(frozen=True)
class Decision:
    """Whether the challenger is to be promoted, why in one sentence, and the figures that decided."""

    promote: bool
    reason: str
    metric: str
    challenger: float | None
    champion: float | None
    """None where there is no champion, or it was not measured."""


def decide(policy: Policy, challenger: Figures, champion: Figures | None, *, same: bool = False) -> Decision:
    """Decide between what may be served and what is, None where nothing is.

    A challenger is promoted if it is better, and by no less than the margin; without a champion if its figure is
    finite. A missing figure, NaN or infinity never wins, and an equal one only where both are the `same` content.
    """
    new, old = challenger.get(policy.metric), (champion or {}).get(policy.metric)
    promote, reason = _verdict(policy, new, old, served=champion is not None, same=same)
    return Decision(promote, reason, policy.metric, new, old)


def _verdict(policy: Policy, new: float | None, old: float | None, *, served: bool, same: bool) -> tuple[bool, str]:
    found = f"The challenger's {policy.metric} is {_text(new)}"
    both = f"{found}, the champion's {_text(old)}" if served else f"{found}, and there is no champion"
    if new is None or not math.isfinite(new):
        return False, f"{both}; what has no finite figure cannot win."
    if not served:
        return True, f"{both}."
    if same:
        return True, f"{both}; both are the same content."
    if old is None or not math.isfinite(old):
        return True, f"{both}, which cannot win."
    gain = old - new if policy.direction == "lower" else new - old
    promote, how = _compare(gain, policy.margin)
    return promote, f"{both}; {how}."


def _compare(gain: float, margin: float) -> tuple[bool, str]:
    if gain == 0:
        return False, "equal is not better"
    if gain < 0:
        return False, f"it is worse by {_text(-gain)}"
    if gain < margin:
        return False, f"it is better by {_text(gain)}, less than the margin of {_text(margin)}"
    return True, f"it is better by {_text(gain)}"


def _text(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.6g}"
