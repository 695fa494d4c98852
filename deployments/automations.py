"""The automations that a server of one's own needs: Prefect's cloud does this by itself."""

from __future__ import annotations

from typing import Any

from prefect.events.schemas.automations import AutomationCore

_HEARTBEAT = "prefect.flow-run.heartbeat"
_ENDS = ["Completed", "Failed", "Crashed", "Cancelled", "Suspended"]


def lost_heartbeats(after_s: int) -> AutomationCore:
    """Have a flow run that said nothing for `after_s` seconds be crashed: its process, its worker or its machine died.

    A server that was down for so long may take a live one for dead; that one's end corrects it.
    """
    return _automation(
        name="ckptflow: crashed without a word",
        description=f"A flow run that sent no heartbeat for {after_s} seconds is crashed, so that it blocks no other.",
        after=_HEARTBEAT,
        expect=[_HEARTBEAT, *(f"prefect.flow-run.{end}" for end in _ENDS)],
        within_s=after_s,
        state="CRASHED",
        message=f"No heartbeat for {after_s} s: its process, its worker or its machine died. "
        "Retry the run, and it goes on from the last committed step.",
    )


def late_runs(after_s: int) -> AutomationCore:
    """Have a flow run that nobody began within `after_s` seconds be cancelled, so that missed nights do not pile up."""
    hours = f"{after_s / 3600:g} hours"
    return _automation(
        name="ckptflow: too late",
        description=f"A flow run that no worker began within {hours} is cancelled, so that they do not pile up.",
        after="prefect.flow-run.Late",
        expect=["prefect.flow-run.*"],
        within_s=after_s,
        state="CANCELLED",
        message=f"No worker began it within {hours}: is one running for its work pool?",
    )


def _automation(
    *, name: str, description: str, after: str, expect: list[str], within_s: int, state: str, message: str
) -> AutomationCore:
    """Return what changes a flow run's state when, after one event of it, none that is expected comes in time."""
    trigger: dict[str, Any] = {
        "type": "event",
        "posture": "Proactive",
        "match": {"prefect.resource.id": "prefect.flow-run.*"},
        "for_each": ["prefect.resource.id"],
        "after": [after],
        "expect": expect,
        "threshold": 1,
        "within": within_s,
    }
    action = {"type": "change-flow-run-state", "state": state, "message": message}
    return AutomationCore.model_validate(
        {"name": name, "description": description, "trigger": trigger, "actions": [action]}
    )
