"""What a target serves: finding it, going back to an earlier release, and getting its files."""

from os import PathLike
from pathlib import Path

from ckpt_core.errors import ArgumentError, HubContentError, HubError
from ckpt_core.hub.releases import Release, describe, tag_of
from ckpt_core.hub.target import open_target
from ckpt_core.hub.verification import advance, holds_model, read_back_tree
from ckpt_core.urls import local_path


def roll_back(
    where: str | PathLike[str],
    to: str,
    *,
    endpoint: str | None = None,
    token: str | None = None,
    read_back: bool = False,
) -> Release:
    """Make `main` serve an earlier release again, by a new commit with that tag's tree; all history stays.

    In a directory or bucket every file of the release is read first, and its sha256 compared with the recorded one. A
    Hub stores files by their digests and answers for them, so nothing is read there, unless `read_back` asks for it.
    Where `main` serves the release already, nothing else is done.

    Raises:
        ArgumentError: there is no such tag; the message lists those there are.
        HubConflictError: somebody else moved `main` at the same time.
        HubContentError: a file of the release is damaged, or `main` holds another tree than the tag.
        HubAuthError, HubError: as for `stage`.
    """
    target = open_target(where, endpoint=endpoint, token=token, write=True)
    state = target.read()
    if state.head is None:
        raise HubError(f"{target.where}: there is nothing here, or the token may not see it")
    if to not in state.tags:
        known = ", ".join(sorted(state.tags)) or "none"
        raise ArgumentError(f"{target.where} has no tag {to!r} to roll back to; it has {known}")
    wanted = target.tree(state.tags[to])
    target.check(state.tags[to])
    if read_back:
        read_back_tree(target, state.tags[to], wanted)
    if target.tree(state.head) == wanted:
        return describe(target, to, state.head, wanted, created=False)
    commit = advance(target, state.tags[to], state.head, f"Roll back to {to}", wanted)
    return describe(target, to, commit, wanted, created=True)


def served(where: str | PathLike[str], *, endpoint: str | None = None, token: str | None = None) -> Release | None:
    """Return the release that `main` serves: its commit, and the tag of that commit or, after a roll back, of its tree.

    None without a repository, or where `main` holds no model; one that this library did not publish has no tag. Raises
    HubError where the target does not answer, HubAuthError where it does not accept the token.
    """
    target = open_target(where, endpoint=endpoint, token=token)
    state = target.read()
    if state.head is None:
        return None
    tree = target.tree(state.head)
    if not holds_model(tree):
        return None
    return describe(target, tag_of(target, state.tags, state.head, tree), state.head, tree, created=False)


def download(
    where: str | PathLike[str],
    revision: str,
    *,
    endpoint: str | None = None,
    token: str | None = None,
    directory: str | PathLike[str],
) -> Path:
    """Copy all files of a commit or tag into `directory`, check them against the target's digests, and return it.

    Raises HubContentError for a file that is missing or not what the target says; HubError where it cannot be read.
    """
    target, place = open_target(where, endpoint=endpoint, token=token), local_path(directory, "directory")
    commit = target.read().tags.get(revision, revision)
    tree = target.tree(commit)
    target.download(commit, place)
    for path, entry in tree.items():
        if not entry.holds_file(place / path):
            raise HubContentError(f"{target.where}: {path} of {revision} arrived damaged in {place}; download it again")
    return place
