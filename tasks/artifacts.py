"""What a person sees in the Prefect UI: cards and tables of what a run made."""

from __future__ import annotations

import base64
import io
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from prefect.artifacts import create_markdown_artifact, create_table_artifact

from ckpt_core import open_checkpoint


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


def release_card(
    run: str, comparison: Mapping[str, Any], release: Mapping[str, Any] | None, hub_directory: str | None
) -> None:
    """Show what was decided about the release, and why; `hub_directory` is that of a local Hub, if it is one."""
    champion = comparison["champion"]
    losses = {
        "New model": _loss(comparison["challenger"]),
        "Release before": f"{_loss(champion['loss'])} ({champion['tag']})" if champion else "none",
        "Untrained": _loss(comparison["untrained"]),
        "Unigram baseline": _loss(comparison["unigram"]),
    }
    if release is None:
        decision = f"kept {champion['tag']}"
        text = f"## Kept {champion['tag']}: the new model is not better\n\n"
    else:
        decision = f"published {release['tag']}"
        # A local Hub's address was good for the time of the run only.
        where = release["url"] if hub_directory is None else f"`ckpt hub serve {shlex.quote(hub_directory)}`"
        rows = {"Repository": release["repo_id"], "Commit": f"`{release['commit']}`", "Where": where}
        text = f"## Published {release['tag']}\n\n{_table(rows)}\n\n"
    text += f"Held-out loss, nats a token:\n\n{_table(losses)}\n"
    create_markdown_artifact(text, key=_key("release", run), description=decision)


def loss_curve(train: Sequence[Sequence[float]], heldout: Sequence[Sequence[float]]) -> str:
    """Return a picture of the curves, each of [step, loss] pairs, as Markdown that needs no other file."""
    if not train:
        return ""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*train, strict=True), label="train", color="#4c78a8", linewidth=1.2)
    if heldout:
        axes.plot(*zip(*heldout, strict=True), label="held-out", color="#e45756", marker="o", markersize=4)
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats a token")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, format="svg")
    data = base64.b64encode(picture.getvalue()).decode()
    return f"![loss curve](data:image/svg+xml;base64,{data})"


def _table(rows: Mapping[str, object]) -> str:
    """Return a Markdown table of two columns; a bar in a value, as a path may hold one, stays in its cell."""
    lines = [f"| {name} | {str(value).replace('|', chr(92) + '|')} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def _loss(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4f}"


def _key(kind: str, run: str) -> str:
    """Return an artifact's key: lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", f"{kind}-{run}".lower()).strip("-")
