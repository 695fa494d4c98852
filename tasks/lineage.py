"""Where a release comes from, as a diagram: data, training steps, checkpoints, export, release."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tasks import cards

_PLAIN = re.compile(r"[^A-Za-z0-9 _.,:/+=()\-]")
_LONGEST = 48


def card(run: str, summary: Mapping[str, Any], kept: str) -> cards.Card:
    """Return the lineage of what a retrain made; see `tasks.artifacts.lineage_card`."""
    release = summary["release"]
    end = f"released as {release['tag']}" if release else "not released"
    told = f"The same facts for tools: {cards.code(kept)}"
    text = f"## Lineage of run {run}, step {summary['step']}\n\n```mermaid\n{diagram(summary)}\n```\n\n{told}\n"
    return cards.Card(cards.key("lineage", run), f"step {summary['step']}, {end}", text)


def diagram(summary: Mapping[str, Any]) -> str:
    """Return the lineage as a mermaid flowchart; texts in it are escaped, whatever they hold."""
    made = summary["checkpoints"]
    lines = ["flowchart TD", *_texts(made), *_origin(made[0]["parent"])]
    for number, checkpoint in enumerate(made):
        lines += _training(number, checkpoint)
    lines += [_export(summary["files"]), f"c{len(made) - 1} -->|convert| export", *_end(summary)]
    return "\n  ".join(lines)


def _texts(made: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the texts that were trained on, each once, and which training step took which."""
    texts = list(dict.fromkeys((step["data_source"], step["data"]) for step in made))
    nodes = [
        _node(f"data{number}", [source or "data", cards.short(digest or "not recorded")], "[(", ")]")
        for number, (source, digest) in enumerate(texts)
    ]
    edges: list[str] = []
    for number, step in enumerate(made):
        text = texts.index((step["data_source"], step["data"]))
        edges.append(f"data{text} -->|{_label(step['training_step'] or 'train')}| c{number}")
    return [*nodes, *edges]


def _origin(parent: Mapping[str, Any] | None) -> list[str]:
    """Return the checkpoint whose weights the retrain started from."""
    if parent is None:
        return []
    facts = [f"checkpoint, step {parent['step']}", *([cards.short(parent["digest"])] if parent["digest"] else [])]
    return [_node("parent", facts, "([", "])"), "parent -->|weights| c0"]


def _training(number: int, made: Mapping[str, Any]) -> list[str]:
    """Return the checkpoint that a training step ended with, and the one before it."""
    loss = [] if made["heldout_loss"] is None else [f"held-out loss {made['heldout_loss']:.4f}"]
    facts = [f"checkpoint, step {made['step']}", cards.short(made["digest"]), *loss]
    node = _node(f"c{number}", facts, "([", "])")
    return [node, f"c{number - 1} -->|weights| c{number}"] if number else [node]


def _export(files: Mapping[str, Mapping[str, Any]]) -> str:
    weights = [file["sha256"] for name, file in sorted(files.items()) if name.endswith(".safetensors")]
    digest = [f"sha256:{weights[0][:12]}"] if weights and weights[0] else []
    more = [f"and {len(weights) - 1} more files"] if len(weights) > 1 else []
    return _node("export", ["export, safetensors", *digest, *more], "[", "]")


def _end(summary: Mapping[str, Any]) -> list[str]:
    """Return what became of the export, and beside it what was served before."""
    release, champion = summary["release"], summary["champion"]
    lines, name = list[str](), "nothing"
    if champion is not None:
        name = champion["tag"] or champion["commit"][:12]
        lines.append(_node("champion", [f"served before: {name}", f"held-out loss {champion['loss']:.4f}"], "[[", "]]"))
    if release is None:
        kept = "champion" if champion else _node("none", ["not released"], "[[", "]]")
        return [*lines, f'export -.->|"not released"| {kept}']
    facts = [f"release {release['tag']}", release["repo_id"], f"commit {release['commit'][:12]}"]
    lines += [_node("release", facts, "[[", "]]"), "export ==>|published| release"]
    return [*lines, "champion -.->|replaced by| release"] if champion else lines


def _node(name: str, texts: Sequence[str], begin: str, end: str) -> str:
    return f"{name}{begin}{_label(*texts)}{end}"


def _label(*texts: str) -> str:
    """Return texts as the lines of one label, each of which a diagram can hold only if it is short and plain."""
    return '"' + "<br/>".join(_PLAIN.sub(_entity, _shortened(text)) for text in texts) + '"'


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST else f"…{text[1 - _LONGEST :]}"


def _entity(character: re.Match[str]) -> str:
    return f"#{ord(character[0])};"
