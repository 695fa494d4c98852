"""`rollback`: serve an earlier release again. Also `python -m flows.rollback STORE RUN REPO TAG [ENDPOINT]`."""

from __future__ import annotations

import sys
from typing import Any

from prefect import flow
from prefect.logging import get_run_logger

from ckpt_core import open_store
from ckpt_core.errors import ArgumentError, NotACheckpointError
from ckpt_core.store import CHAMPION
from tasks import artifacts, releases, sentinel
from tasks.config import HubSettings, Name, Repository
from tasks.publication import check_hub, destination, roll_back
from tasks.results import ReferenceSerializer


@flow(
    name="rollback",
    flow_run_name="roll {repo} back to {to}",
    persist_result=False,
    result_serializer=ReferenceSerializer(),
)
def rollback(
    store: str, run: Name, repo: Repository, to: str, endpoint: str | None = None, token_block: str | None = None
) -> dict[str, Any]:
    """Have `main` serve an earlier release again, by a new commit; the run's champion, and its next retrain, follow.

    Args:
        store: the directory or URL that holds the run.
        run: the run whose checkpoints were published there.
        repo: `owner/name` on the Hub; or a directory or bucket of releases, as an absolute path or a URL.
        to: the tag of the release to serve, such as v3.
        endpoint: the Hub's URL, say https://huggingface.co; empty means a local Hub server over `<store>/hub`.
        token_block: name of a Prefect Secret block that holds the Hub's token; empty means `HF_TOKEN`.
    """
    hub = HubSettings(repo_id=repo, endpoint=endpoint, token_block=token_block)
    check_hub(hub)
    _check_run(store, run)
    with sentinel.posted(), destination(store, hub) as at, releases.moving(store, run):
        release = roll_back(at, to)
        step = _follow(store, run, releases.find(store, run, at.address, to), release["tag"])
    artifacts.rollback_card(run, at, release, step)
    return {"release": release, "champion": step}


def _check_run(store: str, run: str) -> None:
    runs = open_store(store).runs()
    if run not in runs:
        raise ArgumentError(
            f"{store}: has no run {run!r}; it has {', '.join(runs) or 'none'}. Nothing was rolled back."
        )


def _follow(store: str, run: str, record: releases.ReleaseRecord | None, tag: str) -> int | None:
    """Have the champion's pin follow a release's record; return the step that it is at."""
    logger = get_run_logger()
    if record is None:
        logger.warning("run %s has no record of %s, so its champion stays what it is", run, tag)
    else:
        try:
            releases.crown(store, run, record.step)
        except NotACheckpointError as error:
            logger.warning("the champion of run %s stays what it is: the checkpoint of %s is gone: %s", run, tag, error)
    return open_store(store).pins(run).get(CHAMPION)


if __name__ == "__main__":
    if len(sys.argv) not in {5, 6}:
        sys.exit("usage: python -m flows.rollback STORE RUN REPO TAG [ENDPOINT]")
    print(rollback(*sys.argv[1:])["release"]["url"])  # noqa: T201
