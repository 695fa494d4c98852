"""What a retrain tells: a short summary for people, and the same as JSON for tools.

It is the result of the flow, and stays as `<store>/<run>/retrains/<step>.json`; `json_schema` describes it.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from prefect.runtime import flow_run
from pydantic import ConfigDict, TypeAdapter
from typing_extensions import TypedDict

from ckpt_core import PyTorchCheckpoint, durable, open_checkpoint
from ckpt_core.store import local_path, step_name
from flows.trained import DESCRIBED, TrainedCheckpoint, trained_checkpoint
from flows.verdict import Verdict
from tasks.publication import Destination

LOCAL_PORT = 8765
DIRECTORY = "retrains"
FORMAT_VERSION = 1


class ExportedFile(TypedDict):
    """A file of the export."""

    bytes: int
    sha256: str | None


@dataclass(frozen=True)
class Summary:
    """What came of one retrain. Losses are held-out, in nats a token."""

    __pydantic_config__: ClassVar[ConfigDict] = DESCRIBED

    run: str
    """The lineage that it continued."""

    flow_run: str | None
    """The id of the flow run that ended it."""

    checkpoints: list[TrainedCheckpoint]
    """One for each training step, in order; the last is what was exported."""

    checkpoint: str
    """The URL of the last one."""

    step: int
    """Its step."""

    initial_loss: float | None
    """Of the weights that training started from; a trainer of the user's own may not have measured it."""

    loss: float
    """Of the export."""

    untrained_loss: float
    """Of the model before any training."""

    unigram_loss: float
    """Of guessing each token by its frequency in the training text."""

    champion: dict[str, Any] | None
    """What was served before: its `tag`, `commit` and `loss`."""

    checks: list[dict[str, Any]]
    """Of the checkpoint and of the export: `name`, `passed` and `detail`."""

    export: str
    """The directory of the export."""

    files: dict[str, ExportedFile]
    """The export's files, by name."""

    decision: dict[str, Any] | None
    """Champion or challenger, by which figures and why: the fields of `ckpt_core.policy.Decision`, and `approval` where
    a person was asked."""

    release: dict[str, Any] | None
    """The fields of `ckpt_core.hub.Release`, if it was released; its `url` is the link."""

    candidate: dict[str, Any] | None
    """What was uploaded and is not served."""

    hub_directory: str | None
    """Where a local Hub keeps its repositories; None for a remote one."""

    format_version: int = FORMAT_VERSION
    """Of what is described here."""

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
        trained = [trained_checkpoint(str(checkpoint.url)) for checkpoint in checkpoints]
        first = open_checkpoint(trained[0]["url"]).manifest
        return cls(
            run=first.run,
            flow_run=flow_run.id,
            checkpoints=trained,
            checkpoint=trained[-1]["url"],
            step=trained[-1]["step"],
            initial_loss=first.metrics.get("initial_heldout_loss"),
            loss=(compared["challenger"] or {}).get("heldout_loss") or losses["validated"],
            untrained_loss=compared["untrained"]["heldout_loss"],
            unigram_loss=losses["unigram"],
            champion=_champion(compared),
            checks=[dict(check) for check in checks],
            export=export["path"],
            files=export["files"],
            decision=verdict.decision,
            release=verdict.release,
            candidate=verdict.candidate,
            hub_directory=at.hub_directory,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return it in JSON types; `Summary(**...)` is the inverse."""
        return asdict(self)

    def keep(self, store: str) -> Path:
        """Write it to `<store>/<run>/retrains/<step>.json`, and return that; a rerun of the retrain writes it anew."""
        path = local_path(store) / self.run / DIRECTORY / f"{step_name(self.step)}.json"
        durable.make_directory(path.parent)
        durable.replace(path, (json.dumps(self.to_dict(), indent=1) + "\n").encode())
        return path

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


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of what `Summary.keep` writes."""
    return TypeAdapter(Summary).json_schema()


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
