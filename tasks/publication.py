"""The tasks that decide on a release and make it."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

from prefect import task
from prefect.events import emit_event

from ckpt_core.errors import HubAuthError
from ckpt_core.hub import child_environment
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

    with hub_server(local_path(store) / "hub") as server:
        yield server.endpoint


def require_token(settings: HubSettings) -> None:
    """Refuse to begin a retrain that could not be published: a remote Hub needs a token.

    Raises:
        HubAuthError: there is none in the environment, and no stored login.
    """
    if settings.endpoint is None:
        return
    from huggingface_hub import get_token

    if get_token() is None:
        raise HubAuthError(
            f"{settings.endpoint}: no token to publish {settings.repo_id} with; set HF_TOKEN in the environment of the "
            "flow, to a token with write permission."
        )


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
