"""Releases: commits of `main` with a version tag `v1`, `v2`, ... or a tag of one's own."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ckpt_core.errors import ArgumentError
from ckpt_core.hub.target import Target, Tree

_VERSION = re.compile(r"v([1-9][0-9]*)")
_TAG = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,98}[A-Za-z0-9])?")
_REPO_PART = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Release:
    """An export that a target serves: its tag and commit, its address, and how much it is.

    `repo_id` and `endpoint` name a repository and its Hub; for a directory or bucket they are its address and None.
    `tag` is None only for what `served` found: a publication that ended before its tag, or a model from elsewhere.
    `created` is False where nothing had to be done. `replaced` names the files that `main` had until then and that no
    release has, such as a card that was edited by hand; they stay in its history.
    """

    repo_id: str
    endpoint: str | None
    tag: str | None
    commit: str
    url: str
    files: int
    bytes: int
    created: bool
    replaced: tuple[str, ...] = ()


def describe(target: Target, tag: str | None, commit: str, tree: Tree, *, created: bool) -> Release:
    """Return the release of a tree at a commit."""
    size = sum(entry.size for entry in tree.values())
    url = target.url(tag, commit)
    return Release(target.repo_id, target.endpoint, tag, commit, url, files=len(tree), bytes=size, created=created)


def tag_of(target: Target, tags: Mapping[str, str], commit: str, tree: Tree) -> str | None:
    """Return the newest tag on a commit, else the newest whose tree is equal; None without one."""
    newest_first = sorted(tags, key=_age, reverse=True)
    for tag in newest_first:
        if tags[tag] == commit:
            return tag
    seen: dict[str, bool] = {}
    for tag in newest_first:
        other = tags[tag]
        if other not in seen:
            seen[other] = target.tree(other) == tree
        if seen[other]:
            return tag
    return None


def next_version(tags: Iterable[str]) -> str:
    """Return the version tag that comes after all there are; other tags do not count."""
    return f"v{max((_version(tag) for tag in tags), default=0) + 1}"


def check_repo_id(repo_id: str) -> None:
    """Raise ArgumentError for what is not `namespace/name`."""
    parts = repo_id.split("/")
    named = len(parts) == 2 and all(_REPO_PART.fullmatch(part) for part in parts)  # noqa: PLR2004
    if not named or "--" in repo_id or ".." in repo_id or repo_id.endswith(".git"):
        raise ArgumentError(
            f"{repo_id!r} is not a repository on the Hub; write it like my-team/my-model, and a directory like ./models"
        )


def check_tag(tag: str) -> None:
    """Raise ArgumentError for what cannot be a tag, or looks like a commit."""
    if not _TAG.fullmatch(tag) or ".." in tag or tag.endswith(".lock") or _COMMIT.fullmatch(tag):
        raise ArgumentError(f"{tag!r} cannot be a tag; use letters, digits, '.', '_' and '-'")


def _age(tag: str) -> tuple[int, str]:
    return _version(tag), tag


def _version(tag: str) -> int:
    match = _VERSION.fullmatch(tag)
    return int(match[1]) if match else 0
