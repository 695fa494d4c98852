"""What a retrain tells people: a short summary."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ckpt_core import PyTorchCheckpoint, open_checkpoint
from ckpt_core.store import local_path
from flows.verdict import Verdict
from tasks.publication import Destination

LOCAL_PORT = 8765


@dataclass(frozen=True)
class Summary:
    """What came of one retrain. Losses are held-out, in nats a token."""

    checkpoint: str
    step: int
    initial_loss: float | None
    """Of the weights that training started from; a trainer of the user's own may not have measured it."""

    loss: float
    untrained_loss: float
    unigram_loss: float
    champion: dict[str, Any] | None
    """What was served before: its `tag`, `commit` and `loss`."""

    checks: list[dict[str, Any]]
    export: str
    decision: dict[str, Any] | None
    release: dict[str, Any] | None
    candidate: dict[str, Any] | None
    """What was uploaded and is not served."""

    hub_directory: str | None
    """Where a local Hub keeps its repositories; None for a remote one."""

    @classmethod
    def of(
        cls,
        checkpoints: Sequence[PyTorchCheckpoint],
        checks: Sequence[Mapping[str, Any]],
        export: Mapping[str, Any],
        compared: Mapping[str, Any],
        verdict: Verdict,
        losses: Mapping[str, float],
        at: Destination,
    ) -> Summary:
        """Gather it from what the tasks returned; `checkpoints` are those of the training steps, in order."""
        first, checkpoint = checkpoints[0], checkpoints[-1]
        metrics = open_checkpoint(str(first.url)).manifest.metrics
        return cls(
            checkpoint=str(checkpoint.url),
            step=checkpoint.step or 0,
            initial_loss=metrics.get("initial_heldout_loss"),
            loss=(compared["challenger"] or {}).get("heldout_loss") or losses["validated"],
            untrained_loss=compared["untrained"]["heldout_loss"],
            unigram_loss=losses["unigram"],
            champion=_champion(compared),
            checks=[dict(check) for check in checks],
            export=export["path"],
            decision=verdict.decision,
            release=verdict.release,
            candidate=verdict.candidate,
            hub_directory=at.hub_directory,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return it in JSON types; `Summary(**...)` is the inverse."""
        return asdict(self)

    def outcome(self) -> dict[str, Any]:
        """Return what the run's record keeps."""
        served = self.release or self.champion or {}
        return {
            "decision": "published" if self.release else "kept",
            "version": served.get("tag"),
            "step": self.step,
            "loss": self.loss,
            "export": self.export,
            "why": self.decision,
            "candidate": self.candidate,
        }

    def text(self, here: Path) -> str:
        """Return it for a person who stands in the directory `here`."""
        lines = ["", *self._results(), "", *(self._check(check) for check in self.checks), "", *self._decision(), ""]
        return "\n".join([*lines, *self._loading(here)])

    def _results(self) -> list[str]:
        before = "not measured" if self.initial_loss is None else f"{self.initial_loss:.3f}"
        return [
            f"loss        {before} before, {self.loss:.3f} after (held-out, nats a token)",
            f"            {self.untrained_loss:.3f} untrained, {self.unigram_loss:.3f} unigram baseline",
            f"checkpoint  {local_path(self.checkpoint)}",
        ]

    def _check(self, check: Mapping[str, Any]) -> str:
        return f"{'pass' if check['passed'] else 'FAIL'}        {check['name']}: {check['detail']}"

    def _decision(self) -> list[str]:
        if self.release is None:
            champion = self.champion or {}
            kept = champion.get("tag") or str(champion.get("commit", "nothing"))[:12]
            lines = [f"kept {kept}  {(self.decision or {})['reason']}"]
            if self.candidate is not None:
                lines.append(f"candidate   candidate/{self.candidate['name']}, uploaded and not served")
            return lines
        state = "published" if self.release["created"] else "published before, unchanged:"
        return [
            f"release     {state} {self.release['repo_id']} {self.release['tag']}, commit {self.release['commit'][:12]}"
        ]

    def _loading(self, here: Path) -> list[str]:
        lines = [
            "load it from the export:",
            "  from transformers import AutoModelForCausalLM",
            f"  model = AutoModelForCausalLM.from_pretrained({_quoted(self.export)})",
        ]
        if self.release is None:
            return lines
        repo, tag = self.release["repo_id"], self.release["tag"]
        if self.hub_directory is not None:
            programs, hub = Path(sys.executable).parent, Path(self.hub_directory)
            lines += [
                "or from the Hub, by name:",
                f"  {_typed(programs / 'ckpt', here)} hub serve {_typed(hub, here)} --port {LOCAL_PORT}",
                f"  HF_ENDPOINT=http://127.0.0.1:{LOCAL_PORT} {_typed(programs / 'python', here)}",
            ]
        else:
            lines.append("or from the Hub, by name:")
        return [
            *lines,
            "  from transformers import AutoModelForCausalLM",
            f'  model = AutoModelForCausalLM.from_pretrained("{repo}", revision="{tag}")',
        ]


def _champion(compared: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what a summary says of what was served before, if that was another model."""
    served = compared["served"]
    if served is None or compared["same"]:
        return None
    return {"tag": served["tag"], "commit": served["commit"], "loss": compared["champion"]["heldout_loss"]}


def _typed(path: Path, here: Path) -> str:
    """Return a path as a person in `here` types it into a shell."""
    return shlex.quote(str(path.relative_to(here) if path.is_relative_to(here) else path))


def _quoted(text: str) -> str:
    """Return a Python string literal."""
    return json.dumps(text, ensure_ascii=False)
