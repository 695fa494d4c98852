"""What a card says of where a model comes from: arguments of `render_card`, read from what was recorded."""

from collections.abc import Mapping
from typing import Any, cast

from ckpt_core.format.manifest import Manifest

_LINEAGE = {
    "parent": "parent",
    "training_step": "training step",
    "code_revision": "code revision",
    "data": "training data",
    "flow_run": "flow run",
}
"""What a trainer records of a step, by the names that a card has for it."""


def export_facts(record: Mapping[str, Any]) -> dict[str, dict[str, object]]:
    """Return `lineage` and `libraries` of what `export.json` says; what it does not say is left out."""
    source, lineage = _mapping(record.get("source")), dict[str, object]()
    for name, shown in (("digest", "checkpoint"), ("run", "run"), ("step", "step")):
        if name in source:
            lineage[shown] = source[name]
    return {"lineage": lineage, "libraries": _mapping(record.get("libraries"))}


def checkpoint_facts(manifest: Manifest) -> dict[str, dict[str, object]]:
    """Return `lineage`, `libraries` and `hardware` of what a step's manifest says."""
    recorded = dict(manifest.lineage)
    hardware, libraries = _mapping(recorded.get("hardware")), _mapping(recorded.get("libraries"))
    parent = _mapping(recorded.get("parent"))
    recorded["parent"] = f"step {parent['step']}" if "step" in parent else "none"
    lineage: dict[str, object] = {"checkpoint": manifest.digest(), "run": manifest.run, "step": manifest.step}
    lineage |= {shown: recorded[name] for name, shown in _LINEAGE.items() if name in recorded}
    return {"lineage": lineage, "libraries": libraries, "hardware": dict(sorted(hardware.items()))}


def _mapping(value: object) -> dict[str, Any]:
    return dict(cast("Mapping[str, Any]", value)) if isinstance(value, Mapping) else {}
