"""The tasks that decide on a release and make it."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

from prefect import task
from prefect.events import emit_event

from ckpt_core.hub import child_environment
from ckpt_core.hub.connection import Connection, check_endpoint, is_loopback
from ckpt_core.hub.releases import check_repo_id
from ckpt_core.store import local_path
from tasks.config import HubSettings
from tasks.launch import run_job


@contextmanager
def hub_endpoint(store: str, settings: HubSettings) -> Generator[str]:
    """Yield the Hub's URL; without one in the settings, of a local Hub server that runs meanwhile."""
    if settings.endpoint is not None:
        yield settings.endpoint
        return
    from ckpt_core.testing.hub_server import hub_server

    with hub_server(local_hub(store)) as server:
        yield server.endpoint


def local_hub(store: str) -> str:
    """Return the directory in which a store's own Hub server keeps its repositories."""
    return str(local_path(store) / "hub")


def check_hub(settings: HubSettings) -> None:
    """Refuse to begin a retrain that could not be published. Sends nothing.

    Raises:
        ArgumentError: repository or endpoint is no name or address of one.
        HubAuthError: a remote Hub, and no token in the environment and no stored login; or no https.
    """
    check_repo_id(settings.repo_id)
    if settings.endpoint is not None and not is_loopback(check_endpoint(settings.endpoint)):
        Connection.open(settings.endpoint, None, write=True)


@task(task_run_name="compare with the release of {settings.repo_id}")
def compare(
    endpoint: str, settings: HubSettings, export: str, heldout: str, untrained: Mapping[str, Any]
) -> dict[str, Any]:
    """Evaluate the export, the Hub's newest release and an untrained model on the same held-out text.

    Args:
        endpoint: the Hub's URL.
        settings: names the repository.
        export: the export's directory.
        heldout: directory of prepared tokens.
        untrained: `model` (settings), `tokenizer` and `seed` of the model before training.

    Returns:
        See `tasks.jobs.compare`.
    """
    request = {"endpoint": endpoint, "repo_id": settings.repo_id, "export": export, "heldout": heldout, **untrained}
    return run_job("compare", request, env=child_environment(endpoint))


@task(task_run_name="publish {settings.repo_id}")
def publish(endpoint: str, settings: HubSettings, export: str, card: Mapping[str, Any]) -> dict[str, Any]:
    """Publish an export in one commit, read it back, tag it; an unchanged one is found and left alone.

    Returns:
        The fields of `ckpt_core.hub.Release`.
    """
    request = {
        "export": export,
        "repo_id": settings.repo_id,
        "endpoint": endpoint,
        "private": settings.private,
        "card": {**card, "license": settings.license},
    }
    release = run_job("publish", request, env=child_environment(endpoint))
    emit_event("ckpt.release.published", resource={"prefect.resource.id": release["url"]}, payload=release)
    return release
