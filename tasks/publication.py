"""The tasks of a release: compare it with what is served, stage it, promote it, roll it back."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import task
from prefect.events import emit_event

from ckpt_core.errors import ArgumentError, HubAuthError
from ckpt_core.evaluation import METRICS
from ckpt_core.hub import child_environment
from ckpt_core.hub.connection import Connection, check_endpoint, is_loopback
from ckpt_core.hub.releases import check_repo_id
from ckpt_core.hub.target import is_address
from ckpt_core.policy import Policy
from ckpt_core.store import local_path
from tasks.config import HubSettings, PolicySettings
from tasks.launch import run_job

LOCAL_HUB = "hub"
"""The directory of a store's own Hub, and the beginning of its repositories' lasting addresses."""


@dataclass(frozen=True)
class Destination:
    """Where releases go, while a flow works on it."""

    where: str
    """A repository's name on its Hub, or the path or URL of a directory or bucket."""

    endpoint: str | None
    """The address of the Hub; None for a directory or bucket."""

    address: str
    """What stays the same from one flow run to the next: the port of a store's own Hub does not."""

    hub_directory: str | None = None
    """Where a store's own Hub keeps its repositories; None for another target."""

    token_block: str | None = None

    def link(self, release: Mapping[str, Any]) -> str:
        """Return a release's address for a record that stays."""
        if self.hub_directory is None:
            return release["url"]
        return f"{local_path(self.hub_directory).as_uri()}/{self.where}"


@contextmanager
def destination(store: str, settings: HubSettings) -> Generator[Destination]:
    """Yield where releases go; without an endpoint in the settings, a local Hub server over the store runs meanwhile.

    Args:
        store: the directory that holds the local Hub's repositories.
        settings: of the Hub.
    """
    where, block = settings.repo_id, settings.token_block
    if is_address(where):
        address = where if "://" in where else str(Path(where).expanduser().absolute())
        yield Destination(address, None, address, token_block=block)
    elif settings.endpoint is not None:
        endpoint = check_endpoint(settings.endpoint)
        yield Destination(where, endpoint, f"{endpoint}/{where}", token_block=block)
    else:
        from ckpt_core.testing.hub_server import hub_server

        directory = str(local_path(store) / LOCAL_HUB)
        with hub_server(directory) as server:
            yield Destination(where, server.endpoint, f"{LOCAL_HUB}/{where}", directory, block)


@task(task_run_name="check the way to {settings.repo_id}", persist_result=False)
def check_hub(settings: HubSettings, tokens: bool = False) -> None:
    """Refuse to begin what could not be published. Sends nothing.

    Args:
        settings: of the Hub.
        tokens: whether models will be compared on prepared tokens.

    Raises:
        ArgumentError: target, endpoint or policy is none; or there is no such template, or no such Secret block.
        HubAuthError: a remote Hub, and no token; or no https.
    """
    _check_policy(settings.policy, tokens=tokens)
    if settings.card_template is not None and not Path(settings.card_template).is_file():
        raise ArgumentError(f"hub.card_template {settings.card_template!r}: no such file (from {Path.cwd()}).")
    token = None if settings.token_block is None else _read_block(settings.token_block)
    if is_address(settings.repo_id):
        return
    check_repo_id(settings.repo_id)
    if settings.endpoint is not None and not is_loopback(check_endpoint(settings.endpoint)):
        Connection.open(settings.endpoint, token, write=True)


@task(task_run_name="compare with {at.address}", persist_result=False)
def compare(
    at: Destination,
    settings: HubSettings,
    export: str,
    data: str,
    untrained: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Evaluate an export, what is served and an untrained model on the same held-out data, and decide.

    Args:
        at: where the release would go.
        settings: have the policy.
        export: the export's directory.
        data: prepared tokens, or text.
        untrained: `model` (settings), `tokenizer` and `seed` of the model before training, if it is to be measured.
        trust_remote_code: whether a model may bring code of its own.

    Returns:
        What `tasks.release_jobs.compare` does; and as `untrained` what `evaluate_untrained` does, or None.
    """
    common = {"data": data, "trust_remote_code": trust_remote_code}
    found = _run("compare", at, {**common, "export": export, "policy": settings.policy.model_dump()})
    # Not at the destination: pretrained weights come from where training took them.
    return {**found, "untrained": run_job("evaluate_untrained", {**common, **untrained}) if untrained else None}


@task(task_run_name="stage at {at.address}", persist_result=False)
def stage(
    at: Destination,
    settings: HubSettings,
    export: str,
    card: Mapping[str, Any],
    curves: Mapping[str, Any] | None,
    parent: str | None,
) -> dict[str, Any]:
    """Send an export to where nobody is served it yet, and compare what arrived by digest.

    Args:
        at: where to.
        settings: of the Hub.
        export: the export's directory.
        card: arguments of `ckpt_core.hub.render_card`, but for those that the settings give.
        curves: `train` and `heldout` losses as pairs of step and loss, for a picture on the card.
        parent: the commit of `main` that the export was compared with, empty for one without a model; None for
            whichever it is.

    Returns:
        The fields of `ckpt_core.hub.Candidate`.
    """
    request = {
        "export": export,
        "private": settings.private,
        "parent": parent,
        "card": {**card, "license": settings.license, "template": settings.card_template},
        "curves": curves,
    }
    return _run("stage", at, request)


@task(task_run_name="promote at {at.address}", persist_result=False)
def promote(at: Destination, candidate: Mapping[str, Any]) -> dict[str, Any]:
    """Have `main` serve a candidate, in one commit, and tag it; one that it serves already is found and left alone.

    Returns:
        The fields of `ckpt_core.hub.Release`.
    """
    release = _run("promote", at, {"candidate": dict(candidate)})
    return _told("ckpt.release.published", at, release)


@task(task_run_name="discard at {at.address}", persist_result=False)
def discard(at: Destination, candidate: Mapping[str, Any]) -> None:
    """Take away a candidate that was rejected."""
    _run("discard", at, {"candidate": dict(candidate)})


@task(task_run_name="roll {at.address} back to {to}", persist_result=False)
def roll_back(at: Destination, to: str) -> dict[str, Any]:
    """Have `main` serve an earlier release again, by a new commit that holds its files.

    Returns:
        The fields of `ckpt_core.hub.Release`.
    """
    release = _run("roll_back", at, {"to": to})
    return _told("ckpt.release.rolled_back", at, release)


def _run(name: str, at: Destination, request: Mapping[str, Any]) -> dict[str, Any]:
    """Run a job at a destination, in a child process that alone is given the token."""
    token = None if at.token_block is None else _read_block(at.token_block)
    environment = child_environment(at.endpoint) if at.endpoint else None
    return run_job(name, {**request, "where": at.where, "endpoint": at.endpoint}, env=environment, token=token)


def _check_policy(settings: PolicySettings, *, tokens: bool) -> None:
    metric = settings.metric or "heldout_loss"
    if tokens and metric == "bits_per_byte":
        raise ArgumentError(
            "hub.policy.metric 'bits_per_byte': of tokens it is not known how many bytes they were; take the loss"
        )
    Policy(metric, settings.direction or METRICS[metric].direction, settings.margin)


def _told(event: str, at: Destination, release: dict[str, Any]) -> dict[str, Any]:
    """Emit an event about a release; return the release with the address that lasts."""
    lasting = {**release, "url": at.link(release)}
    resource = {"prefect.resource.id": lasting["url"], "prefect.resource.name": f"{at.where} {lasting['tag']}"}
    emit_event(event, resource=resource, payload=lasting)
    return lasting


def _read_block(name: str) -> str:
    """Return the token that a Secret block holds.

    Raises:
        ArgumentError: there is no such block.
        HubAuthError: it holds no text.
    """
    from prefect.blocks.system import Secret

    try:
        block = Secret.load(name)
    except ValueError as error:
        raise ArgumentError(
            f"hub.token_block {name!r}: no Secret block of that name; make one in Prefect, under Blocks ({error})"
        ) from None
    assert isinstance(block, Secret)  # a coroutine only where a loop runs
    token = block.get()
    if not isinstance(token, str) or not token.strip():
        raise HubAuthError(f"hub.token_block {name!r}: holds no text; put the Hub's token into it")
    return token.strip()
