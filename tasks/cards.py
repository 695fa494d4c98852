"""What cards say: the Markdown of artifacts, which says nothing of how it gets to the Prefect server."""

from __future__ import annotations

import base64
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckpt_core import open_checkpoint
from ckpt_core.evaluation import METRICS
from ckpt_core.hub import picture
from ckpt_core.store import Checkpoint
from tasks.worker import step_log

if TYPE_CHECKING:
    from tasks.progress import JobProgress
    from tasks.publication import Destination

_MEGA = 1_000_000


@dataclass(frozen=True)
class Card:
    """One artifact."""

    key: str
    """Lower-case letters, digits and dashes; artifacts of one key are one artifact's history."""

    description: str
    """A line for lists."""

    text: str
    """Markdown."""


def key(*names: str) -> str:
    """Return an artifact's key."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(names).lower()).strip("-")


def checkpoint(url: str) -> Card:
    """Return what a checkpoint is, where, how good, what its save cost, what it came from, and its loss curve.

    Raises:
        NotACheckpointError, DamagedError: there is none.
    """
    found = open_checkpoint(url)
    manifest = found.manifest
    metrics, lineage, hardware = manifest.metrics, manifest.lineage, manifest.lineage.get("hardware", {})
    ranks = "1 rank" if manifest.world_size == 1 else f"{manifest.world_size} ranks"
    rows = {
        "Training step": _line(lineage.get("training_step", "not recorded")),
        "Held-out loss": _loss(metrics.get("heldout_loss")),
        "Train loss": _loss(metrics.get("train_loss")),
        "Where": code(url),
        "Size": f"{megabytes(manifest.nbytes)} in {len(manifest.files)} files",
        "Digest": code(short(manifest.digest())),
        "Committed": manifest.time,
        "Training stood still": _stood_still(found),
        "Parent": _parent(lineage.get("parent")),
        "Hardware": f"{hardware.get('device', '?')}, {hardware.get('backend', '?')}, {ranks}",
        **_restarts(lineage.get("restarts", ())),
    }
    curve = loss_curve(metrics.get("loss_curve") or [], metrics.get("heldout_curve") or [])
    text = f"## Checkpoint: run {manifest.run}, step {manifest.step}\n\n{_table(rows)}\n\n{curve}\n"
    loss = f"held-out loss {_loss(metrics.get('heldout_loss'))}"
    return Card(key("checkpoint", manifest.run), f"step {manifest.step}, {loss}", text)


def training(run: str, seen: JobProgress, outcome: str) -> Card:
    """Return how far a training job is, and its loss curve so far."""
    line = seen.line(outcome)
    train = [] if seen.loss is None else [*seen.train.points, [seen.step, seen.loss]]
    curve = loss_curve(train, seen.heldout.points)
    text = f"## Training {seen.name} of run {run}\n\n{line}\n\n{curve}\n"
    return Card(key("training", run, seen.name), line, text)


def export(run: str, made: Mapping[str, Any]) -> Card:
    """Return an export's files with sizes and digests, and the rules that were applied."""
    files = made["files"]
    head = "| File | Size | sha256 |\n|---|---:|---|\n"
    rows = "\n".join(f"| {name} | {f['bytes']:,} | `{(f['sha256'] or 'none')[:16]}…` |" for name, f in files.items())
    rules = "\n".join(f"- {rule}" for rule in made["rules"])
    text = f"## Export: {made['architecture']}\n\n{code(made['path'])}\n\n{head}{rows}\n\n{rules}\n"
    size = megabytes(sum(f["bytes"] for f in files.values()))
    return Card(key("export", run), f"{len(files)} files, {size}", text)


def release(run: str, at: Destination, verdict: Mapping[str, Any], compared: Mapping[str, Any] | None) -> Card:
    """Return what became of an export, why, and how good it is beside what was served; see `artifacts.release_card`."""
    made, candidate, decision = verdict["release"], verdict["candidate"], verdict["decision"]
    if made is not None:
        title = f"Published {made['tag']}"
        rows = {**_where(at), "Link": _link(made), "Commit": code(made["commit"]), "Files": made["files"]}
    else:
        title, rows = f"Kept {_served(compared)}", _where(at)
    if candidate is not None:
        rows["Candidate"] = f"`candidate/{candidate['name']}`, uploaded and not served"
    if decision and "approval" in decision:
        approval = decision["approval"]
        rows["Asked"] = (
            f"{'approved' if approval['approved'] else 'not approved'}: {_line(approval['comment']) or 'no comment'}"
        )
    parts = [f"## {title}", _reason(decision, compared), _figures(compared), _table(rows)]
    return Card(key("release", run), title, "\n\n".join(filter(None, parts)) + "\n")


def rollback(run: str, at: Destination, made: Mapping[str, Any], step: int | None) -> Card:
    """Return what is served after a roll back, and which step the run's next retrain starts from."""
    rows = {
        **_where(at),
        "Commit": code(made["commit"]),
        "Champion": "none" if step is None else f"step {step}",
    }
    title = f"Rolled back to {made['tag']}"
    return Card(key("release", run), title, f"## {title}\n\n{_table(rows)}\n")


def loss_curve(train: Sequence[Sequence[float]], heldout: Sequence[Sequence[float]]) -> str:
    """Return a picture of the curves, each of [step, loss] pairs, as Markdown that needs no other file."""
    if not train:
        return ""
    data = base64.b64encode(picture.loss_curve(train, heldout, "svg")).decode()
    return f"![loss curve](data:image/svg+xml;base64,{data})"


def code(text: object) -> str:
    """Return a text that Markdown shows as it is, in a table too."""
    return "`" + _line(str(text)).replace("`", "'").replace("|", "\\|") + "`"


def short(digest: str) -> str:
    """Return the beginning of a digest, as `algorithm:hex`, that a person tells others apart by."""
    algorithm, _, value = digest.rpartition(":")
    return f"{algorithm}:{value[:12]}" if algorithm else value[:12]


def megabytes(count: int) -> str:
    """Return a number of bytes for people."""
    return f"{count / _MEGA:,.1f} MB"


def _table(rows: Mapping[str, object]) -> str:
    """Return a Markdown table of two columns; a bar in a value, as a path may hold one, stays in its cell."""
    lines = [f"| {name} | {_escaped_bars(str(value))} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def _escaped_bars(text: str) -> str:
    return re.sub(r"(?<!\\)\|", r"\\|", text)


def _parent(parent: Mapping[str, Any] | None) -> str:
    return f"step {parent['step']}" if parent else "none: trained from scratch or from pretrained weights"


def _restarts(restarts: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return what tells that training went on by itself after ranks died, if it did; see `tasks.elastic`."""
    told = [f"after step {each['after_step']}: {_line(each['reason'])}" for each in restarts]
    return {"Restarts": "; ".join(told)} if told else {}


def _stood_still(found: Checkpoint) -> str:
    """Return how long a save kept training from going on."""
    record = found.path.parent / step_log.FILE_NAME
    times = step_log.save_times(record, found.step) if isinstance(record, Path) else None
    if times is None:
        return "not recorded"
    waited = f", and {times['waited_s']:.3f} s for the save before it" if times.get("waited_s") else ""
    return f"{times['blocked_s']:.3f} s for this save{waited}"


def _where(at: Destination) -> dict[str, object]:
    """Return the rows that say where releases are: the address of a store's own Hub was good for the run only."""
    if at.hub_directory is None:
        return {"Where": at.address}
    return {"Repository": at.where, "Where": f"`ckpt hub serve {shlex.quote(at.hub_directory)}`"}


def _link(made: Mapping[str, Any]) -> str:
    """Return a release's address; a browser opens those of the web only."""
    url = str(made["url"])
    return f"[{made['repo_id']} {made['tag']}]({url})" if url.startswith(("https://", "http://")) else code(url)


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
    """Return a text as one line."""
    return " ".join(text.split())


def _loss(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4f}"
