"""The facts of a release's model card: arguments of `ckpt_core.hub.render_card`, and the curves of its picture."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ckpt_core.errors import DamagedError
from ckpt_core.hub.card_facts import checkpoint_facts, export_facts
from ckpt_core.store import Checkpoint

_HUB_SOURCE = "hf:"
_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)


def model_card(
    export: str, checkpoint: Checkpoint | None, compared: Mapping[str, Any] | None, *, data: str | None
) -> dict[str, Any]:
    """Return what a card says of an export; equal facts, whichever flow run asks.

    Args:
        export: the export's directory.
        checkpoint: what it was made of, if that is at hand.
        compared: what `tasks.publication.compare` returned; None says that it was not evaluated.
        data: what the held-out data is called.

    Raises:
        DamagedError: the export has no sound `export.json`.
    """
    record = _record(Path(export) / "export.json")
    name = record["source"].get("run") or Path(export).name
    step = record["source"].get("step")
    facts: dict[str, Any] = {
        "title": str(name) if step is None else f"Run {name}, step {step}",
        "summary": "A transformers model, converted to safetensors from a PyTorch distributed checkpoint. Each file "
        "was compared with its digest before it was served.",
        **export_facts(record),
    }
    if checkpoint is not None:
        facts |= {name: fact for name, fact in checkpoint_facts(checkpoint.manifest).items() if fact}
        facts |= _origins(checkpoint)
    return facts | (_evaluation(compared, data) if compared else {})


def curves(checkpoint: Checkpoint | None) -> dict[str, Any] | None:
    """Return the `train` and `heldout` losses that a trainer recorded, as pairs of step and loss; None without any."""
    metrics: Mapping[str, Any] = checkpoint.manifest.metrics if checkpoint else {}
    train = metrics.get("loss_curve")
    return {"train": train, "heldout": metrics.get("heldout_curve") or []} if train else None


def _record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_bytes())
        if isinstance(record["source"], dict):
            return record
        found = "its source is no object"
    except (OSError, ValueError, LookupError, TypeError) as error:
        found = f"{type(error).__name__}: {error}"
    raise DamagedError(f"{path}: no record of a conversion ({found}); convert again.")


def _origins(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return which of the Hub's models and data sets a model was made of, as far as a trainer recorded it."""
    hyperparameters, lineage = dict(checkpoint.manifest.hyperparameters or {}), checkpoint.manifest.lineage
    pretrained, source = hyperparameters.get("pretrained"), lineage.get("data_source")
    origins: dict[str, Any] = {}
    if isinstance(pretrained, str) and _HUB_ID.fullmatch(pretrained) and not Path(pretrained).exists():
        origins["base_model"] = pretrained
    if (
        isinstance(source, str)
        and _HUB_ID.fullmatch(source.removeprefix(_HUB_SOURCE))
        and source.startswith(_HUB_SOURCE)
    ):
        origins["datasets"] = [source.removeprefix(_HUB_SOURCE)]
    return origins


def _evaluation(compared: Mapping[str, Any], data: str | None) -> dict[str, Any]:
    served, others = compared["served"], dict[str, Any]()
    if served:
        others[f"Served before ({served['tag'] or served['commit'][:12]})"] = compared["champion"]
    if compared["untrained"]:
        others["Untrained"] = compared["untrained"]
    return {
        "metrics": compared["challenger"],
        "compared": others,
        "evaluated_on": {"name": data or "held-out data", "type": "held-out", "fingerprint": compared["data"]},
        "decision": compared["decision"]["reason"],
    }
