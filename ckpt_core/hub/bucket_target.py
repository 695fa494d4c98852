"""A directory or bucket as a target: the same versions and pointer as on the Hub, in plain files.

    trees/<name>/<files>     a tree, named by its content; trees/<name>.json, written last, lists its digests
    candidates/<name>        a publication of that tree is under way
    commits/<10 digits>.json each commit of `main`: tree, parent, message; the highest number is what is served
    versions/<tag>.json      the commit that a tag is on
    main                     in a directory: a link to the tree that is served

Commits and versions are written only where there is none, which is what makes a release happen once. A file that the
tree before has too is linked where there are links, after it was read: the digest of its list is of an earlier day.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Generator, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import repeat
from os import PathLike
from pathlib import Path, PurePosixPath
from typing import Any, cast

from ckpt_core.errors import (
    ArgumentError,
    CkptError,
    CommitError,
    HubAuthError,
    HubConflictError,
    HubContentError,
    HubError,
)
from ckpt_core.hub.bucket_files import Files, LocalFiles, RemoteFiles
from ckpt_core.hub.contents import Content, check_all, name_of
from ckpt_core.hub.target import Entry, Progress, State, Tree
from ckpt_core.urls import place_of, writable_place

_COMMIT = re.compile(r"[0-9]{10}")
_NAME = re.compile(r"[0-9a-f]{16}")
_SUFFIX = ".json"
_FORMAT_VERSION = 1
_THREADS = 8


def open_bucket(where: str | PathLike[str], *, private: bool = False, write: bool = False) -> BucketTarget:
    """Return the target at a path or URL; raises ArgumentError where none can be, or where it is to be private."""
    if private:
        raise ArgumentError(f"{where}: who may read a directory or bucket is set where it is kept, not by --private")
    place = writable_place(where, "where") if write else place_of(where, "where")
    if isinstance(place, Path):
        return BucketTarget(str(place), LocalFiles(place))
    return BucketTarget(place.as_uri(), RemoteFiles(place))


class BucketTarget:
    """Trees, commits and versions below one root."""

    def __init__(self, where: str, files: Files) -> None:
        self._files = files
        self.where = where
        self.repo_id = where
        self.endpoint: str | None = None

    def url(self, tag: str | None, commit: str) -> str:  # noqa: ARG002  a tree is what can be loaded
        """Return where the files of a commit are."""
        return f"{self.where}/{self._place(commit)}"

    def prepare(self) -> State:
        """Read it; a directory is made with its first file."""
        return self.read()

    def read(self) -> State:
        """Return the newest commit, the versions, and the candidates."""
        with self._plainly():
            head = self._head()
            versions = [name for name in self._files.names("versions") if name.endswith(_SUFFIX)]
            with ThreadPoolExecutor(_THREADS) as pool:
                commits = pool.map(self._field, [f"versions/{name}" for name in versions], repeat("commit"))
                tags = {name.removesuffix(_SUFFIX): str(commit) for name, commit in zip(versions, commits, strict=True)}
            candidates = [name for name in self._files.names("candidates") if _NAME.fullmatch(name)]
            return State(head, tags, {name: name for name in candidates})

    def tree(self, commit: str) -> Tree:
        """Return the digests of a commit's files as they were when they were written, and the sizes they have."""
        with self._plainly():
            place = self._place(commit)
            listed, sizes = self._listed(place), self._files.sizes(place)
            self._check_names(place, sizes)
            digests = {path: entry.sha256 for path, entry in listed.items()}
            return {path: Entry(size, sha256=digests.get(path)) for path, size in sizes.items()}

    def stage(self, name: str, contents: Mapping[str, Content], head: str | None, progress: Progress | None) -> str:
        """Write the files that a tree lacks or that are damaged in it, then the list of them."""
        with self._plainly():
            self._files.create(f"candidates/{name}", b"")
            place = f"trees/{name}"
            sizes, known = self._files.sizes(place), self._known(head)
            present = {path: f"{place}/{path}" for path in contents if sizes.get(path) == contents[path].size}
            kept = self._sound(present, contents)
            missing = sorted(contents.keys() - kept)
            links = {path: known[contents[path].sha256] for path in missing if contents[path].sha256 in known}
            linked = self._sound(links, contents)
            check_all(contents[path] for path in sorted(kept | linked))
            total, done = sum(contents[path].size for path in missing), 0
            for path in missing:
                self._write(contents[path], f"{place}/{path}", links[path] if path in linked else None, name)
                done += contents[path].size
                if progress is not None:
                    progress(done, total)
            entries = {path: {"bytes": each.size, "sha256": each.sha256} for path, each in sorted(contents.items())}
            if not self._create(f"{place}{_SUFFIX}", {"files": entries}):
                self._files.delete(f"{place}{_SUFFIX}")  # equal trees have equal lists, so the one there is damaged
                self._create(f"{place}{_SUFFIX}", {"files": entries})
            return name

    def check(self, commit: str) -> None:
        """Read each file of a commit, and compare it with the digest in its tree's list."""
        with self._plainly():
            place = self._place(commit)
            listed = self._listed(place)
            if name_of({path: (each.size, str(each.sha256)) for path, each in listed.items()}) != Path(place).name:
                raise HubContentError(
                    f"{self.where}/{place}{_SUFFIX} is not the list of the files that this tree was named by; restore a"
                    " copy of it, or publish that release's export again"
                )
            sound = self._sound({path: f"{place}/{path}" for path in listed}, listed)
            if damaged := sorted(listed.keys() - sound):
                raise HubContentError(
                    f"{self.where}/{place}/{damaged[0]} is damaged: its bytes are not those that were published; main"
                    " and the tags stay as they are. Publish that release's export again, which mends it, or choose"
                    " another release"
                )

    def promote(self, commit: str, parent: str | None, message: str) -> str:
        """Write the commit that follows `parent`, where there is none."""
        with self._plainly():
            tree = self._tree_name(commit)
            number = f"{int(parent or 0) + 1:010d}"
            record = {"tree": tree, "parent": parent, "message": message}
            if not self._create(f"commits/{number}{_SUFFIX}", record):
                head = self.read().head or number
                if self._tree_name(head) != tree:
                    said = self._field(f"commits/{head}{_SUFFIX}", "message")
                    raise HubConflictError(
                        f"{self.where}: somebody else moved main from {parent} to {head} ({said!r});"
                        " nothing was overwritten. Look at that commit, then run it again to go on from there"
                    )
                number = head
            self._serve()
            return number

    def tag(self, name: str, commit: str) -> None:
        """Write a version, where there is none."""
        with self._plainly():
            if not self._create(f"versions/{name}{_SUFFIX}", {"commit": commit}):
                raise HubConflictError(
                    f"{self.where}: somebody else set the tag {name}, while this release was made; main is at {commit}."
                    " Run it again without a tag, for the next version"
                )

    def discard(self, name: str) -> None:
        """End a publication; its tree goes where no commit holds it."""
        with self._plainly():
            self._files.forget(name)
            commits = self._files.names("commits")
            if not any(self._field(f"commits/{commit}", "tree") == name for commit in commits):
                self._files.delete(f"trees/{name}{_SUFFIX}")
                self._files.delete(f"trees/{name}")
            self._serve()
            self._files.delete(f"candidates/{name}")

    def digest(self, commit: str, path: str) -> tuple[int, str]:
        """Read a file to its end."""
        size, digest = 0, hashlib.sha256()
        with self._plainly():
            for block in self._files.blocks(f"{self._place(commit)}/{path}"):
                size += len(block)
                digest.update(block)
        return size, digest.hexdigest()

    def download(self, commit: str, directory: Path) -> None:
        """Copy the files of a commit, block by block."""
        for path in self.tree(commit):
            target = directory / path
            target.parent.mkdir(parents=True, exist_ok=True)
            with self._plainly(), target.open("wb") as file:
                for block in self._files.blocks(f"{self._place(commit)}/{path}"):
                    file.write(block)

    def _write(self, content: Content, path: str, source: str | None, scratch: str) -> None:
        """Give a tree a file: a link to `source`, which is the same, or what the export has."""
        if source is not None:
            self._files.delete(path)
            if self._files.copy(source, path):
                return
        self._files.send(content, path, scratch)

    def _sound(self, places: Mapping[str, str], expected: Mapping[str, Content] | Mapping[str, Entry]) -> set[str]:
        """Read a file for each path, several at the same time; return the paths of those that are as expected."""

        def is_sound(path: str) -> bool:
            size, digest = 0, hashlib.sha256()
            try:
                for block in self._files.blocks(places[path]):
                    size += len(block)
                    digest.update(block)
            except FileNotFoundError:
                return False
            return (size, digest.hexdigest()) == (expected[path].size, expected[path].sha256)

        with ThreadPoolExecutor(_THREADS) as pool:
            return {path for path, sound in zip(places, pool.map(is_sound, places), strict=True) if sound}

    def _known(self, head: str | None) -> dict[str, str]:
        """Return where files of a commit are that could be linked, by their recorded digest; sizes are compared."""
        if head is None:
            return {}
        place, tree = self._place(head), self.tree(head)
        sound = (path for path, entry in self._listed(place).items() if tree.get(path) == entry)
        return {str(tree[path].sha256): f"{place}/{path}" for path in sound}

    def _serve(self) -> None:
        """Show the newest commit's tree under the name `main`, also where another was made meanwhile."""
        shown = None
        while (head := self._head()) is not None and head != shown:
            self._files.serve(self._place(head))
            shown = head

    def _head(self) -> str | None:
        commits = (name.removesuffix(_SUFFIX) for name in self._files.names("commits"))
        return max(filter(_COMMIT.fullmatch, commits), default=None)

    def _place(self, commit: str) -> str:
        return f"trees/{self._tree_name(commit)}"

    def _tree_name(self, commit: str) -> str:
        """Return the tree of a commit; a candidate's commit is its tree."""
        name = str(self._field(f"commits/{commit}{_SUFFIX}", "tree")) if _COMMIT.fullmatch(commit) else commit
        if not _NAME.fullmatch(name):
            raise HubError(f"{self.where}: {commit!r} is neither a commit nor a tag here")
        return name

    def _listed(self, place: str) -> dict[str, Entry]:
        """Return the files of a tree as they were when they were written."""
        where = f"{place}{_SUFFIX}"
        files = cast("Mapping[str, Mapping[str, Any]]", self._field(where, "files"))
        self._check_names(where, files)
        with self._readable(where):
            return {path: Entry(int(entry["bytes"]), sha256=str(entry["sha256"])) for path, entry in files.items()}

    def _check_names(self, where: str, paths: Iterable[str]) -> None:
        for path in paths:
            if ".." in PurePosixPath(path).parts or PurePosixPath(path).is_absolute():
                raise HubContentError(f"{self.where}/{where}: {path!r} is not a path in a tree; publish again")

    def _create(self, path: str, record: Mapping[str, object]) -> bool:
        data = json.dumps({"format_version": _FORMAT_VERSION, **record}, indent=1).encode() + b"\n"
        return self._files.create(path, data)

    def _field(self, path: str, name: str) -> Any:
        """Return a field of a record, in the one version that is known."""
        with self._readable(path):
            record: Any = json.loads(self._files.read(path))
            version = record["format_version"]
        if version != _FORMAT_VERSION:
            raise HubError(
                f"{self.where}/{path}: format_version is {version}, expected {_FORMAT_VERSION}; use a newer ckptflow"
            )
        with self._readable(path):
            return record[name]

    @contextmanager
    def _readable(self, path: str) -> Generator[None]:
        """Make an error that names a record of what comes of reading it."""
        try:
            yield
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as problem:
            raise HubContentError(
                f"{self.where}/{path} is damaged ({type(problem).__name__}: {problem}); restore a copy of it"
            ) from None

    @contextmanager
    def _plainly(self) -> Generator[None]:
        """Make a HubError of what a file system or a store raises."""
        try:
            yield
        except CommitError as problem:
            raise HubError(f"{self.where}: {problem}") from None
        except CkptError:
            raise
        except FileNotFoundError as problem:
            raise HubContentError(f"{self.where}: {problem.filename or problem} is missing; publish again") from problem
        except PermissionError as problem:
            raise HubAuthError(
                f"{self.where}: no permission ({problem}); use credentials that may write there"
            ) from problem
        except OSError as problem:
            raise HubError(
                f"{self.where}: {problem}; run it again: what arrived is found and not sent twice"
            ) from problem
