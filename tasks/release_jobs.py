"""What a release needs torch or the Hub's client for: jobs of `tasks.jobs`, each in a child process of its own."""

from __future__ import annotations

import math
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.config import ModelSettings

if TYPE_CHECKING:
    from ckpt_core.evaluation import Evaluation

Request = dict[str, Any]
_SECONDS_BETWEEN_LINES = 5.0


def compare(request: Request) -> dict[str, Any]:
    """Evaluate an export, what is served, and an untrained model if one is named, on the same data; then decide.

    Args:
        request: `export`; `where` and `endpoint` of the target; `data` (token rows or text); `policy`, the fields of
            `ckpt_core.policy.Policy`; `untrained`: null, or its `model` (settings), `tokenizer` and `seed`;
            `trust_remote_code`.

    Returns:
        `challenger` and `untrained` (or null): figures by metric, null for one that is not finite; `champion`: null, or
        the `release` that is served, its `figures`, and whether it is the `same` as the export; `decision`: the fields
        of `ckpt_core.policy.Decision`; `tokens`: how many were predicted; `data`: their fingerprint.
    """
    from ckpt_core.policy import Policy, decide

    policy = Policy(**request["policy"])
    challenger = _evaluate(request["export"], request)
    champion, measured = _champion(request)
    decision = decide(
        policy,
        challenger.metrics,
        measured.metrics if measured else None,
        same=champion is not None and champion["same"],
    )
    untrained = _untrained(request)
    return {
        "challenger": _figures(challenger.metrics),
        "champion": champion,
        "untrained": _figures(untrained.metrics) if untrained else None,
        "decision": _figures(asdict(decision)),
        "tokens": challenger.tokens,
        "data": challenger.fingerprint,
    }


def stage(request: Request) -> dict[str, Any]:
    """Send an export with its card to a target as a candidate that nobody is served.

    Args:
        request: `export`; `where`, `endpoint` and `private` of the target; `parent`, the commit that `main` is to be
            at, or null; `card`: arguments of `ckpt_core.hub.render_card`; `curves`: arguments of
            `ckpt_core.hub.picture.loss_curve`, or null.

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


JOBS = (compare, stage, promote, discard, roll_back)


def _evaluate(model: Any, request: Request, tokenizer: Any = None) -> Evaluation:
    from ckpt_core.evaluation import evaluate

    return evaluate(model, request["data"], tokenizer=tokenizer, trust_remote_code=request["trust_remote_code"])


def _champion(request: Request) -> tuple[dict[str, Any] | None, Evaluation | None]:
    """Return what the target serves, and what it reaches."""
    from ckpt_core import hub

    place = {"endpoint": request["endpoint"]}
    release = hub.served(request["where"], **place)
    if release is None:
        return None, None
    with tempfile.TemporaryDirectory() as directory:
        path = hub.download(request["where"], release.commit, directory=directory, **place)
        same = (path / "export.json").read_bytes() == (Path(request["export"]) / "export.json").read_bytes()
        measured = _evaluate(path, request)
    return {"release": asdict(release), "figures": _figures(measured.metrics), "same": same}, measured


def _untrained(request: Request) -> Evaluation | None:
    """Return what the model reached before any training, if the request names it."""
    named = request["untrained"]
    if named is None:
        return None
    import torch

    from tasks.worker.model import build_model
    from tasks.worker.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(named["tokenizer"], trust_remote_code=request["trust_remote_code"])
    model = build_model(ModelSettings.model_validate(named["model"]), tokenizer, seed=named["seed"])
    return _evaluate(model.to("cuda" if torch.cuda.is_available() else "cpu"), request, tokenizer)


def _figures(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values with null for what is no finite number, which JSON has no word for."""
    return {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in values.items()}


def _progress() -> Callable[[int, int], None]:
    """Return a function that says how much of an upload is done, a line every few seconds."""
    said = time.monotonic()

    def say(sent: int, total: int) -> None:
        nonlocal said
        if time.monotonic() - said >= _SECONDS_BETWEEN_LINES:
            said = time.monotonic()
            sys.stdout.write(f"sent {sent / 1e6:,.0f} of {total / 1e6:,.0f} MB\n")

    return say
