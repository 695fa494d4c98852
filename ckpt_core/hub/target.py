"""Where releases go: what a target can do, and which one an address names.

A target keeps trees of files. `main` is the tree that is served; each commit on it stays, and a tag names one for ever.
A candidate is a tree that is there, whole, and that nobody is served yet. Every method may be run again after it failed
at any moment, and then finds what was done. Errors are `ckpt_core.errors.HubError` and its kinds.
"""

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Protocol

from ckpt_core.durable import file_size
from ckpt_core.hub.contents import Content

Progress = Callable[[int, int], None]
"""Takes the bytes that were sent so far, and those to send."""

_ADDRESS = re.compile(r"[./]|[A-Za-z][A-Za-z0-9+.-]*://")


@dataclass(frozen=True)
class Entry:
    """One file as a target holds it: its size in bytes, and its sha256 or, where git holds it, git's id, in hex."""

    size: int
    sha256: str | None = None
    git_id: str | None = None

    def holds(self, content: Content) -> bool:
        """Whether this is that content; reads a small file where git holds one of its size."""
        if self.size != content.size:
            return False
        return self.sha256 == content.sha256 if self.sha256 else self.git_id == content.git_id()

    def holds_file(self, path: Path) -> bool:
        """Whether a local file is what this is; reads it whole where it has the size."""
        if file_size(path) != self.size:
            return False
        begin = (
            hashlib.sha256 if self.sha256 else partial(hashlib.sha1, b"blob %d\0" % self.size, usedforsecurity=False)
        )
        with path.open("rb") as file:
            return hashlib.file_digest(file, begin).hexdigest() == (self.sha256 or self.git_id)


Tree = Mapping[str, Entry]
"""Every file of a commit, by its path."""


@dataclass(frozen=True)
class State:
    """What a target has: the commit that `main` is at (None before there is one), tags, and candidates, by name."""

    head: str | None
    tags: Mapping[str, str]
    candidates: Mapping[str, str] = field(default_factory=dict[str, str])


class Target(Protocol):
    """A repository on the Hub, a directory, or a bucket."""

    @property
    def where(self) -> str:
        """Its address, for messages."""
        ...

    @property
    def repo_id(self) -> str:
        """Its name on its Hub; the address, where there is none."""
        ...

    @property
    def endpoint(self) -> str | None:
        """The address of its Hub, if it is on one."""
        ...

    def url(self, tag: str | None, commit: str) -> str:
        """Return the address of a release, for people."""
        ...

    def prepare(self) -> State:
        """Make the target where there is none, and read it.

        Raises:
            HubConflictError: it is there and public, and was to be private.
        """
        ...

    def read(self) -> State:
        """Return its refs; no head and nothing else where there is no such target."""
        ...

    def tree(self, commit: str) -> Tree:
        """Return every file of a commit."""
        ...

    def stage(self, name: str, contents: Mapping[str, Content], head: str | None, progress: Progress | None) -> str:
        """Send what is missing of a tree under a candidate's name, file by file; return the candidate's commit."""
        ...

    def check(self, commit: str) -> None:
        """Read every file of a commit where only that tells whether it still is what was published.

        A Hub names each file by its digest, and answers for it: there nothing is read.

        Raises:
            HubContentError: a file is damaged.
        """
        ...

    def promote(self, commit: str, parent: str | None, message: str) -> str:
        """Add one commit to `main` whose tree is the given one's, by reference, and return it.

        Raises:
            HubConflictError: `main` is not at `parent`, and holds another tree; nothing was changed.
        """
        ...

    def tag(self, name: str, commit: str) -> None:
        """Give a commit of `main` a name that never moves.

        Raises:
            HubConflictError: the name is taken by another commit.
        """
        ...

    def discard(self, name: str) -> None:
        """Take a candidate away; what `main` or a tag holds stays. One that is gone is fine."""
        ...

    def digest(self, commit: str, path: str) -> tuple[int, str]:
        """Read a file of a commit to its end; return its size in bytes and its sha256 in hex.

        Raises:
            HubContentError: it is not there.
        """
        ...

    def download(self, commit: str, directory: Path) -> None:
        """Copy all files of a commit into a directory."""
        ...


def open_target(
    where: str | PathLike[str],
    *,
    endpoint: str | None = None,
    token: str | None = None,
    private: bool = False,
    write: bool = False,
) -> Target:
    """Return the target that `where` names: a path, a URL that fsspec knows, or `namespace/name` on the Hub.

    A path begins with `/` or `.`. `endpoint`, `token` and `private` are for the Hub; endpoint and token default to
    `HF_ENDPOINT` and `HF_TOKEN`, or a stored login. `write` asks for a token where one is needed to write.

    Raises:
        ArgumentError: it names none.
        HubAuthError: there is no token, or it would travel in the clear.
    """
    if is_address(where):
        from ckpt_core.hub.bucket_target import open_bucket

        return open_bucket(where, private=private, write=write)
    from ckpt_core.hub.connection import Connection
    from ckpt_core.hub.hub_target import HubTarget
    from ckpt_core.hub.releases import check_repo_id

    check_repo_id(str(where))
    return HubTarget(Connection.open(endpoint, token, write=write), str(where), private=private)


def is_address(where: str | PathLike[str]) -> bool:
    """Whether this names a directory or a bucket, not a repository on the Hub."""
    return not isinstance(where, str) or _ADDRESS.match(where) is not None
