"""`publish`: an export becomes the release, if it is better. Also `python -m flows.publish EXPORT REPO [DATA]`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.runtime import flow_run

from ckpt_core import open_checkpoint
from ckpt_core.errors import ArgumentError
from ckpt_core.store import local_path
from flows.verdict import Origin, publish_or_keep
from tasks import artifacts, sentinel
from tasks.config import HubSettings
from tasks.publication import check_hub, compare, destination
from tasks.results import ReferenceSerializer


def _run_name() -> str:
    """Name a flow run after its export's directory."""
    return "publish " + Path(flow_run.parameters["export"]).name


@flow(name="publish", flow_run_name=_run_name, persist_result=False, result_serializer=ReferenceSerializer())
def publish(
    export: str,
    hub: HubSettings = HubSettings(),
    data: str | None = None,
    checkpoint: str | None = None,
    store: str = "runs",
) -> dict[str, Any]:
    """Publish an export: staged, verified by digest, promoted in one commit and tagged.

    With data it is compared with what is served, and published only if it is better; without, it always is, and its
    card says that it was not evaluated.

    Args:
        export: a directory that `convert` wrote.
        hub: where the release goes, and what decides.
        data: held-out text (a file, directory or glob) or token rows (a `.npy` file, or a directory of them).
        checkpoint: URL or path of the step that the export was made of; it becomes its run's champion.
        store: the directory of the local Hub, where `hub` names no other; with a checkpoint, that of its store.
    """
    check_hub(hub)
    export = str(local_path(export))
    origin = None if checkpoint is None else _origin(checkpoint, export)
    with sentinel.posted(), destination(origin.store if origin else store, hub) as at:
        compared = compare(at, hub, export, data) if data else None
        verdict = publish_or_keep(at, hub, export, origin, compared, Path(data).name if data else None)
    artifacts.release_card(origin.run if origin else Path(export).name, at, asdict(verdict), compared)
    return asdict(verdict)


def _origin(checkpoint: str, export: str) -> Origin:
    """Return the checkpoint of an export.

    Raises:
        ArgumentError: the export was made of another one.
    """
    found, path = open_checkpoint(checkpoint), Path(export) / "export.json"
    try:
        digest = json.loads(path.read_bytes())["source"]["digest"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ArgumentError(f"{path}: does not say which checkpoint it was made of ({error}); convert again.") from None
    if digest != found.manifest.digest():
        raise ArgumentError(f"{export}: made of {digest}, not of {found.url}, which is {found.manifest.digest()}.")
    return Origin(found.path.parent.parent.as_uri(), found)


if __name__ == "__main__":
    if len(sys.argv) not in {3, 4}:
        sys.exit("usage: python -m flows.publish EXPORT REPO [DATA]")
    made = publish(sys.argv[1], HubSettings(repo_id=sys.argv[2]), sys.argv[3] if sys.argv[3:] else None)
    print(made["release"]["url"] if made["release"] else made["decision"]["reason"])  # noqa: T201
