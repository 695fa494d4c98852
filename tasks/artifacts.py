"""What a person sees in the Prefect UI: cards and tables of what a run made."""

from __future__ import annotations

import base64
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from prefect.artifacts import create_markdown_artifact, create_table_artifact

from ckpt_core import open_checkpoint
from ckpt_core.evaluation import METRICS
from ckpt_core.hub import picture

if TYPE_CHECKING:
    from tasks.publication import Destination


def checkpoint_card(url: str) -> None:
    """Show a checkpoint: what it is, where, how good, what it came from, and its loss curve."""
    manifest = open_checkpoint(url).manifest
    metrics, lineage, hardware = manifest.metrics, manifest.lineage, manifest.lineage.get("hardware", {})
    parent = lineage.get("parent") or {}
    rows = {
        "Step": manifest.step,
        "Where": f"`{url}`",
        "Size": f"{manifest.nbytes:,} bytes in {len(manifest.files)} files",
        "Digest": f"`{manifest.digest()[:23]}…`",
        "Committed": manifest.time,
        "Train loss": _loss(metrics.get("train_loss")),
        "Held-out loss": _loss(metrics.get("heldout_loss")),
        "Parent": f"step {parent['step']}" if parent else "none: trained from scratch or from pretrained weights",
        "Hardware": f"{hardware.get('device', '?')}, {hardware.get('backend', '?')}, {manifest.world_size} ranks",
    }
    curve = loss_curve(metrics.get("loss_curve") or [], metrics.get("heldout_curve") or [])
    text = f"## Checkpoint: run {manifest.run}, step {manifest.step}\n\n{_table(rows)}\n\n{curve}\n"
    create_markdown_artifact(text, key=_key("checkpoint", manifest.run), description=f"step {manifest.step}")


def report_table(kind: str, run: str, checks: Sequence[Mapping[str, Any]]) -> None:
    """Show the checks of a validation or gate, one a row."""
    rows = [
        {"check": check["name"], "verdict": "pass" if check["passed"] else "FAIL", "found": check["detail"]}
        for check in checks
    ]
    passed = all(check["passed"] for check in checks)
    create_table_artifact(rows, key=_key(kind, run), description="all passed" if passed else "a check failed")


def export_card(run: str, export: Mapping[str, Any]) -> None:
    """Show an export: its files with sizes and digests, and the rules that were applied."""
    head = "| file | bytes | sha256 |\n|---|---:|---|\n"
    files = "\n".join(
        f"| {name} | {f['bytes']:,} | `{(f['sha256'] or 'none')[:16]}…` |" for name, f in export["files"].items()
    )
    rules = "\n".join(f"- {rule}" for rule in export["rules"])
    text = f"## Export: {export['architecture']}\n\n`{export['path']}`\n\n{head}{files}\n\n{rules}\n"
    create_markdown_artifact(text, key=_key("export", run), description=f"{len(export['files'])} files")


def release_card(run: str, at: Destination, verdict: Mapping[str, Any], compared: Mapping[str, Any] | None) -> None:
    """Show what became of an export, why, and how good it is beside what was served.

    Args:
        run: names the artifact.
        at: where the release went, or would have.
        verdict: `decision`, `release` and `candidate`, as `flows.verdict.Verdict` has them.
        compared: what `tasks.publication.compare` returned; None without an evaluation.
    """
    release, candidate, decision = verdict["release"], verdict["candidate"], verdict["decision"]
    if release is not None:
        title = f"Published {release['tag']}"
        rows = {**_where(at), "Commit": f"`{release['commit']}`", "Files": release["files"]}
    else:
        title, rows = f"Kept {_served(compared)}", _where(at)
    if candidate is not None:
        rows["Candidate"] = f"`candidate/{candidate['name']}`, uploaded and not served"
    if decision and "approval" in decision:
        approval = decision["approval"]
        rows["Asked"] = f"{'approved' if approval['approved'] else 'not approved'}: {_line(approval['comment'])}"
    parts = [f"## {title}", _table(rows), _reason(decision, compared), _figures(compared)]
    create_markdown_artifact("\n\n".join(filter(None, parts)) + "\n", key=_key("release", run), description=title)


def rollback_card(run: str, at: Destination, release: Mapping[str, Any], step: int | None) -> None:
    """Show what is served after a roll back, and which step the run's next retrain starts from."""
    rows = {
        **_where(at),
        "Commit": f"`{release['commit']}`",
        "Champion": "none" if step is None else f"step {step}",
    }
    title = f"Rolled back to {release['tag']}"
    create_markdown_artifact(f"## {title}\n\n{_table(rows)}\n", key=_key("release", run), description=title)


def loss_curve(train: Sequence[Sequence[float]], heldout: Sequence[Sequence[float]]) -> str:
    """Return a picture of the curves, each of [step, loss] pairs, as Markdown that needs no other file."""
    if not train:
        return ""
    data = base64.b64encode(picture.loss_curve(train, heldout, "svg")).decode()
    return f"![loss curve](data:image/svg+xml;base64,{data})"


def _table(rows: Mapping[str, object]) -> str:
    """Return a Markdown table of two columns; a bar in a value, as a path may hold one, stays in its cell."""
    lines = [f"| {name} | {str(value).replace('|', chr(92) + '|')} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def _where(at: Destination) -> dict[str, object]:
    """Return the rows that say where releases are: the address of a store's own Hub was good for the run only."""
    if at.hub_directory is None:
        return {"Where": at.address}
    return {"Repository": at.where, "Where": f"`ckpt hub serve {shlex.quote(at.hub_directory)}`"}


def _reason(decision: Mapping[str, Any] | None, compared: Mapping[str, Any] | None) -> str:
    if compared is None:
        return "Not evaluated."
    found = "It is what was served before: nothing was sent." if compared["same"] else ""
    return " ".join(filter(None, [found, decision["reason"] if decision else ""]))


def _served(compared: Mapping[str, Any] | None) -> str:
    served = compared["served"] if compared else None
    return (served["tag"] or served["commit"][:12]) if served else "nothing"


def _figures(compared: Mapping[str, Any] | None) -> str:
    """Return the figures of all models that were measured, a column for each."""
    if compared is None or compared["challenger"] is None:
        return ""
    columns = {"New model": compared["challenger"]}
    if compared["champion"]:
        columns[f"Served before ({_served(compared)})"] = compared["champion"]
    if compared["untrained"]:
        columns["Untrained"] = compared["untrained"]
    head = [f"| | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    rows = [
        f"| {METRICS[name].label} | {' | '.join(_figure(figures.get(name)) for figures in columns.values())} |"
        for name in compared["challenger"]
    ]
    return "\n".join([*head, *rows])


def _figure(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.6g}"


def _line(text: str) -> str:
    """Return what a person wrote as one line."""
    return " ".join(text.split()) or "no comment"


def _loss(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4f}"


def _key(kind: str, run: str) -> str:
    """Return an artifact's key: lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", f"{kind}-{run}".lower()).strip("-")
