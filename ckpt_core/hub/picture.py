"""The picture of a training's losses."""

import io
from collections.abc import Sequence
from typing import Any, Literal

CURVE_NAME = "loss_curve.png"
"""What a release calls it: the Hub shows PNG in a card, and not every SVG."""

Curve = Sequence[Sequence[float]]
"""Pairs of step and loss, in nats a token."""


def loss_curve(train: Curve, heldout: Curve, kind: Literal["png", "svg"] = "png") -> bytes:
    """Draw the losses over the steps; equal curves give equal bytes, whatever the user's settings of matplotlib."""
    from matplotlib import style
    from matplotlib.figure import Figure

    with style.context(["default", {"svg.hashsalt": CURVE_NAME}]):
        figure: Any = Figure(figsize=(7, 3), dpi=150, layout="constrained")
        axes = figure.subplots()
        axes.plot([p[0] for p in train], [p[1] for p in train], label="train", color="#4c78a8", linewidth=1.2)
        if heldout:
            steps, losses = [p[0] for p in heldout], [p[1] for p in heldout]
            axes.plot(steps, losses, label="held-out", color="#e45756", marker="o", markersize=4)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel("step")
        axes.set_ylabel("loss, nats a token")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        picture = io.BytesIO()
        figure.savefig(picture, format=kind, metadata={"Date": None} if kind == "svg" else {"Software": None})
    return picture.getvalue()
