"""What a release needs torch or the Hub's client for: jobs of `tasks.jobs`, each in a child process of its own."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from tasks.config import ModelSettings

if TYPE_CHECKING:
    from ckpt_core.policy import Policy

Request = dict[str, Any]
_SECONDS_BETWEEN_LINES = 5.0


def compare(request: Request) -> dict[str, Any]:
    """Evaluate an export and what is served on the same data; then decide.

    Args:
        request: `export`; `where` and `endpoint` of the target; `data` (token rows or text); `policy`, the fields of
            `tasks.config.PolicySettings`; `trust_remote_code`.

    Returns:
        `challenger` and `champion`: figures by metric, each null where it was not measured; `served`: the fields of
        `ckpt_core.hub.Release`, or null; `same`: whether that is the export, and then there is no `challenger`,
        `champion` or `decision`; `decision`: the fields of `ckpt_core.policy.Decision`; `data`: a fingerprint, or null.
    """
    from ckpt_core.hub.comparison import compare as compare_with_served

    found = compare_with_served(
        request["export"],
        request["where"],
        request["data"],
        _policy(request),
        endpoint=request["endpoint"],
        trust_remote_code=request["trust_remote_code"],
    )
    return {
        **found.figures,
        "served": asdict(found.served) if found.served else None,
        "same": found.same,
        "data": found.challenger.fingerprint if found.challenger else None,
    }


def evaluate_untrained(request: Request) -> dict[str, Any]:
    """Return the figures that a model had before any training, by metric, each null where it is not finite.

    Args:
        request: its `model` (settings), `tokenizer` and `seed`; `data` (token rows or text); `trust_remote_code`.
    """
    import torch

    from ckpt_core.evaluation import evaluate
    from tasks.worker.model import build_model
    from tasks.worker.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(request["tokenizer"], trust_remote_code=request["trust_remote_code"])
    model = build_model(ModelSettings.model_validate(request["model"]), tokenizer, seed=request["seed"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    figures = evaluate(model.to(device), request["data"], tokenizer=tokenizer).metrics
    return {name: value if math.isfinite(value) else None for name, value in figures.items()}


def stage(request: Request) -> dict[str, Any]:
    """Send an export with its card to a target as a candidate that nobody is served.

    Args:
        request: `export`; `where`, `endpoint` and `private` of the target; `parent`, the commit that `main` is to be
            at, empty for one without a model, or null; `card`: arguments of `ckpt_core.hub.render_card`; `curves`:
            arguments of `ckpt_core.hub.picture.loss_curve`, or null.

    Returns:
        The fields of `ckpt_core.hub.Candidate`.
    """
    from ckpt_core import hub
    from ckpt_core.hub.picture import CURVE_NAME, loss_curve

    card, curves, pictures = request["card"], request["curves"], dict[str, bytes]()
    if curves is not None:
        pictures[CURVE_NAME], card = loss_curve(**curves), {**card, "curve": CURVE_NAME}
    candidate = hub.stage(
        request["export"],
        request["where"],
        endpoint=request["endpoint"],
        private=request["private"],
        parent=request["parent"],
        card=hub.render_card(repo_id=request["where"], **card),
        pictures=pictures,
        progress=_progress(),
    )
    return asdict(candidate)


def promote(request: Request) -> dict[str, Any]:
    """Have `main` serve a candidate.

    Args:
        request: `where` and `endpoint` of the target, and the `candidate` that `stage` returned.

    Returns:
        The fields of `ckpt_core.hub.Release`.
    """
    from ckpt_core import hub

    candidate = hub.Candidate(**request["candidate"])
    return asdict(hub.promote(request["where"], candidate, endpoint=request["endpoint"]))


def discard(request: Request) -> dict[str, Any]:
    """Take away a candidate that was rejected; the request is that of `promote`."""
    from ckpt_core import hub

    hub.discard(request["where"], hub.Candidate(**request["candidate"]), endpoint=request["endpoint"])
    return {}


def roll_back(request: Request) -> dict[str, Any]:
    """Have `main` serve an earlier release again.

    Args:
        request: `where` and `endpoint` of the target, and the release's tag as `to`.

    Returns:
        The fields of `ckpt_core.hub.Release`.
    """
    from ckpt_core import hub

    return asdict(hub.roll_back(request["where"], request["to"], endpoint=request["endpoint"]))


JOBS = (compare, evaluate_untrained, stage, promote, discard, roll_back)


def _policy(request: Request) -> Policy:
    """Return the policy of a request; where it names no metric or direction, those that suit the data."""
    from ckpt_core.hub.comparison import policy_for

    settings = request["policy"]
    policy = policy_for(request["data"], settings["metric"], settings["margin"])
    return replace(policy, direction=settings["direction"] or policy.direction)


def _progress() -> Callable[[int, int], None]:
    """Return a function that says how much of an upload is done, a line every few seconds."""
    said = time.monotonic()

    def say(sent: int, total: int) -> None:
        nonlocal said
        if time.monotonic() - said >= _SECONDS_BETWEEN_LINES:
            said = time.monotonic()
            sys.stdout.write(f"sent {sent / 1e6:,.0f} of {total / 1e6:,.0f} MB\n")

    return say
