"""What a training job remembers of its losses, a few KB however long it runs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

_MOST_POINTS = 128
_RECENT = 10


@dataclass
class Curve:
    """A loss over the steps: each point is the mean of `stride` values, which doubles when there are too many."""

    points: list[list[float]] = field(default_factory=list)
    """[step of the last value, mean]"""
    stride: int = 1
    pending: list[float] = field(default_factory=list)
    """Values since the last point."""

    def add(self, step: int, value: float) -> None:
        """Add the value of a step."""
        self.pending.append(value)
        if len(self.pending) < self.stride:
            return
        self.points.append([step, _mean(self.pending)])
        self.pending = []
        if len(self.points) >= _MOST_POINTS:
            pairs = zip(self.points[::2], self.points[1::2], strict=True)
            self.points = [[later[0], _mean([earlier[1], later[1]])] for earlier, later in pairs]
            self.stride *= 2


@dataclass
class History:
    """The losses of one training job, in nats a token."""

    initial_heldout_loss: float | None = None
    heldout_loss: float | None = None
    """Of the newest evaluation."""
    heldout: Curve = field(default_factory=Curve)
    train: Curve = field(default_factory=Curve)
    recent: list[float] = field(default_factory=list)
    """Training losses of the last steps."""

    @classmethod
    def from_json(cls, state: dict[str, Any]) -> History:
        """Return what `to_json` described."""
        curves = {name: Curve(**state[name]) for name in ("heldout", "train")}
        return cls(**{**state, **curves})

    def to_json(self) -> dict[str, Any]:
        """Return everything in JSON types."""
        return asdict(self)

    def add_step(self, step: int, loss: float) -> None:
        """Record the training loss of a step."""
        self.train.add(step, loss)
        self.recent = [*self.recent, loss][-_RECENT:]

    def add_evaluation(self, step: int, loss: float) -> None:
        """Record a held-out loss; the first one is the initial loss."""
        if self.initial_heldout_loss is None:
            self.initial_heldout_loss = loss
        self.heldout_loss = loss
        self.heldout.add(step, loss)

    def metrics(self) -> dict[str, Any]:
        """Return what a manifest shows; `train_loss` is the mean of the last ten steps."""
        return {
            "train_loss": _mean(self.recent),
            "heldout_loss": self.heldout_loss,
            "initial_heldout_loss": self.initial_heldout_loss,
            "loss_curve": self.train.points,
            "heldout_curve": self.heldout.points,
        }


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
