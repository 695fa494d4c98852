"""What a person sees of a store's maintenance: a summary, and a table with a line for each run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tasks.cards import Card, key
from tasks.maintenance import Tidied


@dataclass(frozen=True)
class Maintained:
    """What was found in a store, and what was done."""

    store: str
    """Its URL."""

    checkpoints: Sequence[Mapping[str, Any]]
    """All that there were: see `tasks.maintenance_jobs.verify_runs`."""

    tidied: Sequence[Tidied]
    """What was done, by run."""

    @property
    def damaged(self) -> list[str]:
        """What is wrong with which checkpoint, in sentences."""
        return [
            f"run {found['run']}, step {found['step']}: {' '.join(found['problems'])}"
            for found in self.checkpoints
            if found["problems"]
        ]

    @property
    def errors(self) -> list[str]:
        """What could not be done, in sentences."""
        return [f"run {each.run}: {error}" for each in self.tidied for error in each.errors]

    def facts(self) -> dict[str, Any]:
        """Return the figures in JSON types: the payload of the event, and the flow's result."""
        return {
            "store": self.store,
            "runs": len(self.tidied),
            "checkpoints": len(self.checkpoints),
            "verified": sum(found["read"] for found in self.checkpoints),
            "damaged": self.damaged,
            "deleted": {each.run: list(each.deleted) for each in self.tidied if each.deleted},
            "left": {each.run: each.left for each in self.tidied if each.left},
            "errors": self.errors,
        }

    def rows(self) -> list[dict[str, str | int]]:
        """Return a line of the table for each run, of plain text and numbers."""
        return [self._row(each) for each in self.tidied]

    def card(self) -> Card:
        """Return the summary."""
        facts, done = self.facts(), [sentence for each in self.tidied for sentence in each.done]
        deleted = sum(len(each.deleted) for each in self.tidied)
        parts = [
            f"## {'Damaged checkpoints' if self.damaged else 'Maintained'}: {self.store}",
            f"{facts['checkpoints']} checkpoints of {facts['runs']} runs, {facts['verified']} of them read by sample: "
            f"{len(self.damaged)} damaged, {deleted} deleted.",
            _section("Damaged, and left as they are", self.damaged),
            _section("Could not be done", self.errors),
            _section("Left alone until the next time", [f"run {run}: {why}" for run, why in facts["left"].items()]),
            _section("Set right", done),
        ]
        found = f"{len(self.damaged)} damaged" if self.damaged else "no damage found"
        path = self.store.partition("://")[2]
        return Card(key("maintenance", path), found, "\n\n".join(filter(None, parts)) + "\n")

    def _row(self, each: Tidied) -> dict[str, str | int]:
        own = [found for found in self.checkpoints if found["run"] == each.run]
        return {
            "run": each.run,
            "checkpoints": len(own),
            "read": _steps([found["step"] for found in own if found["read"]]),
            "damaged": _steps([found["step"] for found in own if found["problems"]]),
            "deleted": each.left or _steps(each.deleted),
            "being read": _steps(each.leased),
            "set right": len(each.done),
            "errors": len(each.errors),
        }


def _steps(steps: Sequence[int]) -> str:
    return " ".join(map(str, steps)) or "none"


def _section(title: str, sentences: Sequence[str]) -> str:
    return "\n".join([f"### {title}", "", *(f"- {sentence}" for sentence in sentences)]) if sentences else ""
