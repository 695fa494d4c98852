"""What becomes of an export: published, kept back, put on a branch, or shown to a person who decides."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from prefect.exceptions import FlowPauseTimeout
from prefect.flow_runs import pause_flow_run
from prefect.input import RunInput
from pydantic import Field

from ckpt_core.store import Checkpoint
from flows.card import curves, model_card
from tasks import releases
from tasks.config import HubSettings
from tasks.publication import Destination, discard, promote, stage

_SECONDS_BETWEEN_LOOKS = 2


class Approval(RunInput):
    """What a person says of a model that the policy did not promote."""

    approve: bool = Field(default=False, description="Publish it all the same; else it is rejected.")
    comment: str = Field(default="", description="Why; kept with the release.")


@dataclass(frozen=True)
class Verdict:
    """What became of an export."""

    decision: dict[str, Any] | None
    """The fields of `ckpt_core.policy.Decision`, and `approval` where a person was asked; None if none was made."""

    release: dict[str, Any] | None = None
    """The fields of `ckpt_core.hub.Release`, where it is served now."""

    candidate: dict[str, Any] | None = None
    """The fields of `ckpt_core.hub.Candidate`, where it was uploaded and is not served."""


@dataclass(frozen=True)
class Origin:
    """The checkpoint that an export was made of, and the store that it lies in."""

    store: str
    checkpoint: Checkpoint

    @property
    def run(self) -> str:
        """The run."""
        return self.checkpoint.run


def publish_or_keep(
    at: Destination,
    settings: HubSettings,
    export: str,
    origin: Origin | None,
    compared: Mapping[str, Any] | None,
    data: str | None,
) -> Verdict:
    """Publish an export if it was decided so, else do what `settings.on_worse` says; what diverged is kept here.

    Args:
        at: where to.
        settings: of the Hub.
        export: the export's directory.
        origin: the checkpoint that becomes the champion, if it is known.
        compared: what `tasks.publication.compare` returned, for what is served already with the decision that was made
            then, if that is known; None publishes without an evaluation.
        data: what the held-out data is called on the card.
    """
    decision = compared["decision"] if compared else None
    parent = None
    if compared:
        parent = compared["served"]["commit"] if compared["served"] else ""
    if compared and compared["same"]:  # an earlier flow run did it, or was killed before it had set the tag
        served = {"where": at.where, "name": "", "commit": parent, "parent": parent}
        return Verdict(decision, _promoted(at, served, decision, origin))
    worse = decision if decision and not decision["promote"] else None
    if worse and (settings.on_worse == "stop" or worse["challenger"] is None):  # nobody can approve a NaN
        return Verdict(decision)
    checkpoint = origin.checkpoint if origin else None
    card = model_card(export, checkpoint, compared, data=data)
    candidate = stage(at, settings, export, card, curves(checkpoint), parent)
    if worse is None:
        return Verdict(decision, _promoted(at, candidate, decision, origin))
    if settings.on_worse == "branch":
        return Verdict(decision, candidate=candidate)
    return _as_a_person_says(at, candidate, worse, origin, settings.approval_hours)


def _as_a_person_says(
    at: Destination, candidate: dict[str, Any], decision: dict[str, Any], origin: Origin | None, hours: float
) -> Verdict:
    """Have a person decide; a candidate that is rejected is taken away, one that nobody looked at stays."""
    answer = _ask(at, decision, candidate, hours)
    if answer is None:
        unanswered = {"approved": False, "comment": f"nobody answered within {hours:g} hours"}
        return Verdict({**decision, "approval": unanswered}, candidate=candidate)
    decision = {**decision, "approval": {"approved": answer.approve, "comment": answer.comment}}
    if answer.approve:
        return Verdict(decision, _promoted(at, candidate, decision, origin))
    discard(at, candidate)
    return Verdict(decision)


def _promoted(
    at: Destination, candidate: Mapping[str, Any], decision: dict[str, Any] | None, origin: Origin | None
) -> dict[str, Any]:
    """Have `main` serve a candidate, and the store's champion and records follow; return the release."""
    with releases.moving(origin.store, origin.run) if origin else nullcontext():
        release = promote(at, candidate)
        if origin:
            step, digest = origin.checkpoint.step, origin.checkpoint.manifest.digest()
            releases.crown(origin.store, origin.run, step)
            record = releases.ReleaseRecord(
                step, digest, at.where, release["tag"], release["commit"], release["url"], decision
            )
            releases.keep(origin.store, origin.run, at.address, record)
    return release


def _ask(at: Destination, decision: Mapping[str, Any], candidate: Mapping[str, Any], hours: float) -> Approval | None:
    """Pause the flow run until a person has answered on its page; None if nobody does in time."""
    text = (
        f"## Publish to {at.address}?\n\n{decision['reason']}\n\n"
        f"It is uploaded and verified as `candidate/{candidate['name']}`, and is not served yet."
    )
    form = Approval.with_initial_data(description=text)
    try:
        return pause_flow_run(form, timeout=max(1, round(hours * 3600)), poll_interval=_SECONDS_BETWEEN_LOOKS)
    except FlowPauseTimeout:
        return None
