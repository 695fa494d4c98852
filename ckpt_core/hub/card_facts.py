"""What a card says of where a model comes from, read from what was recorded."""

from collections.abc import Mapping
from typing import Any, cast

from ckpt_core.format.manifest import Manifest
from ckpt_core.hub.card import render_card

_LINEAGE = {
    "parent": "parent",
    "training_step": "training step",
    "code_revision": "code revision",
    "data": "training data",
    "flow_run": "flow run",
}
"""What a trainer records of a step, by the names that a card has for it."""


def export_card(where: str, record: Mapping[str, Any], **facts: Any) -> str:
    """Return a card that says what `export.json` does, and more `facts` of `render_card`."""
    origin = export_facts(record)
    return render_card(
        title=where.rstrip("/").rsplit("/", 1)[-1],
        summary="A transformers model, converted to safetensors from a PyTorch distributed checkpoint.",
        repo_id=where,
        lineage=origin["lineage"],
        libraries=origin["libraries"],
        **facts,
    )


def export_facts(record: Mapping[str, Any]) -> dict[str, dict[str, object]]:
    """Return `lineage` and `libraries`, arguments of `render_card`, as far as `export.json` says them."""
    source, lineage = _mapping(record.get("source")), dict[str, object]()
    for name, shown in (("digest", "checkpoint"), ("run", "run"), ("step", "step")):
        if name in source:
            lineage[shown] = source[name]
    return {"lineage": lineage, "libraries": _mapping(record.get("libraries"))}


def checkpoint_facts(manifest: Manifest) -> dict[str, dict[str, object]]:
    """Return `lineage`, `libraries` and `hardware`, arguments of `render_card`, of what a step's manifest says."""
    recorded = dict(manifest.lineage)
    hardware, libraries = _mapping(recorded.get("hardware")), _mapping(recorded.get("libraries"))
    parent = _mapping(recorded.get("parent"))
    recorded["parent"] = f"step {parent['step']}" if "step" in parent else "none"
    lineage: dict[str, object] = {"checkpoint": manifest.digest(), "run": manifest.run, "step": manifest.step}
    lineage |= {shown: recorded[name] for name, shown in _LINEAGE.items() if name in recorded}
    return {"lineage": lineage, "libraries": libraries, "hardware": dict(sorted(hardware.items()))}


def _mapping(value: object) -> dict[str, Any]:
    return dict(cast("Mapping[str, Any]", value)) if isinstance(value, Mapping) else {}
