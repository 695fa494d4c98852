"""What became a release: a record beside the steps, written once, and the pins that follow it.

    <store>/<run>/releases/<address>/<tag>.json   one release; `address`, quoted, is where it was published
    <store>/<run>/pins/champion                   the step that `main` serves
    <store>/<run>/pins/released-<step>            a step that became a release, and that `main` may go back to

A run that is published in two places has records for both: each counts its versions from v1.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from ckpt_core import durable, locks, open_store
from ckpt_core.errors import DamagedError, HubConflictError, StepExistsError
from ckpt_core.store import CHAMPION, objects
from ckpt_core.urls import place_of

if TYPE_CHECKING:
    from ckpt_core.urls import Place

DIRECTORY = "releases"
_PIN = re.compile(r"released-([0-9]+)")


@dataclass(frozen=True)
class ReleaseRecord:
    """Which checkpoint a release was made of, and why it became one."""

    step: int
    digest: str
    """Of the checkpoint's manifest."""

    repo: str
    """The repository, directory or bucket."""

    tag: str
    commit: str
    url: str
    decision: dict[str, Any] | None
    """What `ckpt_core.policy.decide` said, with both figures; None where it was published without an evaluation."""

    def names_the_same(self, other: ReleaseRecord) -> bool:
        """Whether both tell of one release of one checkpoint."""
        return (self.step, self.digest, self.tag, self.commit) == (other.step, other.digest, other.tag, other.commit)


@contextmanager
def moving(store: str, run: str) -> Generator[None]:
    """Hold a run's releases while `main` and the champion's pin move, so that they end up at the same model.

    An object store has no locks: there, who publishes and who rolls back at the same moment may leave the pin behind.
    """
    directory = _directory(store, run)
    if not isinstance(directory, Path):
        yield
        return
    durable.make_directory(directory)
    with locks.lock_file(directory / ".lock"):
        yield


def keep(store: str, run: str, address: str, record: ReleaseRecord) -> ReleaseRecord:
    """Write a release's record, unless it has one; return the one that it has.

    Raises:
        HubConflictError: there is one of another release with that tag: the repository was made anew.
    """
    place = _place(store, run, address, record.tag)
    try:
        _create(place, (json.dumps(asdict(record), indent=1, sort_keys=True) + "\n").encode())
    except StepExistsError:
        found = _parse(place)
        if not found.names_the_same(record):
            raise HubConflictError(
                f"{place}: tells that {found.tag} is step {found.step}, commit {found.commit}; but it is step "
                f"{record.step}, commit {record.commit}. If {record.repo} was deleted and made again, delete the "
                "records of the old one."
            ) from None
        return found
    return record


def find(store: str, run: str, address: str, tag: str) -> ReleaseRecord | None:
    """Return the record of a release; None where it was made of no checkpoint of this run.

    Raises:
        DamagedError: it is no record.
    """
    try:
        return _parse(_place(store, run, address, tag))
    except FileNotFoundError:
        return None


def crown(store: str, run: str, step: int) -> None:
    """Have a step be the champion, which the next retrain starts from, and keep it as a release.

    Raises:
        NotACheckpointError: the step was deleted.
    """
    opened = open_store(store)
    opened.pin(run, CHAMPION, step)
    opened.pin(run, f"released-{step}", step)


def let_go(store: str, run: str, newest: int) -> None:
    """Take the pins of all releases but the `newest` ones; the champion's is another one."""
    opened = open_store(store)
    released = sorted(((step, name) for name, step in opened.pins(run).items() if _PIN.fullmatch(name)), reverse=True)
    for _, name in released[newest:]:
        opened.unpin(run, name)


def _directory(store: str, run: str) -> Place:
    return place_of(store) / run / DIRECTORY


def _place(store: str, run: str, address: str, tag: str) -> Place:
    return _directory(store, run) / quote(address, safe="") / f"{tag}.json"


def _create(place: Place, data: bytes) -> None:
    """Write a file that is whole from the first moment, and that must not exist yet."""
    if not isinstance(place, Path):
        objects.create(place, data)
        return
    durable.make_directory(place.parent)
    temporary = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        durable.create_whole(place, data, temporary)
    except FileExistsError:
        raise StepExistsError(f"{place}: exists.") from None


def _parse(place: Place) -> ReleaseRecord:
    data = place.read_bytes() if isinstance(place, Path) else objects.read(place)
    try:
        fields: Mapping[str, Any] = json.loads(data)
        return ReleaseRecord(**fields)
    except (ValueError, TypeError) as error:
        raise DamagedError(f"{place}: not the record of a release ({error}); restore a copy, or delete it.") from None
