"""Releases on the Hub: a commit of `main` with a version tag `v1`, `v2`, ..."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from ckpt_core.errors import ArgumentError
from ckpt_core.hub.connection import Connection
from ckpt_core.hub.failures import at_hub

if TYPE_CHECKING:
    from huggingface_hub import RepoFile

_VERSION = re.compile(r"v([1-9][0-9]*)")
_TAG = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,98}[A-Za-z0-9])?")
_REPO_PART = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?")


@dataclass(frozen=True)
class Release:
    """An export on the Hub: its tag and commit, its address, and how much it is.

    `created` is False where it was found, unchanged, and nothing was sent.
    """

    repo_id: str
    endpoint: str
    tag: str
    commit: str
    url: str
    files: int
    bytes: int
    created: bool


def latest_release(repo_id: str, *, endpoint: str | None = None, token: str | None = None) -> Release | None:
    """Return the release with the highest version tag; None without one, or without the repository.

    Raises HubError where the Hub does not answer, HubAuthError where it does not accept the token.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    check_repo_id(repo_id)
    hub = Connection.open(endpoint, token)

    def find() -> Release | None:
        try:
            refs = hub.api.list_repo_refs(repo_id)
        except RepositoryNotFoundError:
            return None
        tags = {tag.name: tag.target_commit for tag in refs.tags}
        tag = newest_version(tags)
        if tag is None:
            return None
        sizes = [file.size for file in tree(hub, repo_id, tags[tag]).values()]
        return release(hub, repo_id, tag, tags[tag], sizes, created=False)

    return at_hub(hub, repo_id, find)


def download(
    repo_id: str,
    revision: str,
    *,
    endpoint: str | None = None,
    token: str | None = None,
    directory: str | PathLike[str],
) -> Path:
    """Copy all files of a revision into `directory` and return it; raises HubError where that cannot be done."""
    from huggingface_hub import snapshot_download  # pyright: ignore[reportUnknownVariableType] a bare dict in it

    check_repo_id(repo_id)
    hub = Connection.open(endpoint, token)

    def fetch() -> Path:
        place = Path(directory)
        snapshot_download(repo_id, revision=revision, local_dir=place, endpoint=hub.endpoint, token=hub.token)
        return place

    return at_hub(hub, repo_id, fetch)


def release(hub: Connection, repo_id: str, tag: str, commit: str, sizes: Iterable[int], *, created: bool) -> Release:
    """Describe a release whose files have these sizes in bytes."""
    sizes = list(sizes)
    url = f"{hub.endpoint}/{repo_id}/tree/{tag}"
    return Release(repo_id, hub.endpoint, tag, commit, url, files=len(sizes), bytes=sum(sizes), created=created)


def tree(hub: Connection, repo_id: str, commit: str) -> dict[str, "RepoFile"]:
    """Return every file of a commit by its path, but for `.gitattributes`, which is the Hub's own."""
    from huggingface_hub import RepoFile

    items = hub.api.list_repo_tree(repo_id, recursive=True, revision=commit)
    return {item.path: item for item in items if isinstance(item, RepoFile) and item.path != ".gitattributes"}


def newest_version(tags: Iterable[str]) -> str | None:
    """Return the tag with the highest version number; other tags do not count."""
    numbers = [int(match[1]) for tag in tags if (match := _VERSION.fullmatch(tag))]
    return f"v{max(numbers)}" if numbers else None


def next_version(tags: Iterable[str]) -> str:
    """Return the version tag that comes after all there are."""
    newest = newest_version(tags)
    return f"v{int(newest[1:]) + 1}" if newest else "v1"


def version_of(commit: str, tags: Mapping[str, str]) -> str | None:
    """Return the newest version tag that points to a commit."""
    return newest_version(tag for tag, target in tags.items() if target == commit)


def check_repo_id(repo_id: str) -> None:
    """Raise ArgumentError for what is not `namespace/name`."""
    parts = repo_id.split("/")
    named = len(parts) == 2 and all(_REPO_PART.fullmatch(part) for part in parts)  # noqa: PLR2004
    if not named or "--" in repo_id or ".." in repo_id or repo_id.endswith(".git"):
        raise ArgumentError(f"{repo_id!r} is not a repository on the Hub; write it like my-team/my-model")


def check_tag(tag: str) -> None:
    """Raise ArgumentError for what cannot be a tag."""
    if not _TAG.fullmatch(tag) or ".." in tag or tag.endswith(".lock"):
        raise ArgumentError(f"{tag!r} cannot be a tag; use letters, digits, '.', '_' and '-'")
