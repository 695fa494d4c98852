"""One model repository on disk: commits, branches, tags and blobs. `hub_repos` draws the layout."""

import fcntl
import json
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from ckpt_core.testing import hub_names, hub_trees
from ckpt_core.testing.hub_files import write_atomically
from ckpt_core.testing.hub_names import Refusal
from ckpt_core.testing.hub_trees import Entry


@dataclass(frozen=True)
class Commit:
    """One commit with all its files."""

    id: str
    parent: str | None
    title: str
    message: str
    date: str
    files: dict[str, Entry]


@dataclass(frozen=True)
class Refs:
    """Where branches and tags point."""

    branches: dict[str, str]
    tags: dict[str, str]


@dataclass(frozen=True)
class Put:
    """Add or replace a file."""

    path: str
    entry: Entry


@dataclass(frozen=True)
class Remove:
    """Delete a file, or a folder with all it holds; with `folder`, no file."""

    path: str
    folder: bool = False


@dataclass(frozen=True)
class Copy:
    """Copy a file from a revision, or from the branch itself."""

    path: str
    source: str
    revision: str | None = None


Change = Put | Remove | Copy


class Repo:
    """One repository."""

    def __init__(self, path: Path, repo_id: str, lock_file: Path) -> None:
        self.path = path
        self.id = repo_id
        self._lock_file = lock_file

    @classmethod
    def initialise(cls, path: Path, repo_id: str, lock_file: Path, *, private: bool) -> Self:
        """Lay out a new repository whose first commit holds `.gitattributes`, as on the Hub."""
        repo = cls(path, repo_id, lock_file)
        for folder in ("commits", "objects", "parts"):
            (path / folder).mkdir(parents=True)
        repo._write("repo.json", {"private": private, "created": now()})
        entry = repo.store(hub_trees.DEFAULT_ATTRIBUTES)
        first = repo._save_commit({hub_trees.GIT_ATTRIBUTES: entry}, None, "initial commit", "")
        repo._write("refs.json", asdict(Refs(branches={"main": first}, tags={})))
        return repo

    def require(self) -> None:
        """Refuse with 404 where the repository is not, or is no longer, there."""
        if not (self.path / "repo.json").exists():
            raise hub_names.not_found(self.id)

    @contextmanager
    def locked(self) -> Generator[None]:
        """Hold the repository's lock: one writer at a time, in whatever thread or process."""
        with self._lock_file.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @property
    def settings(self) -> dict[str, Any]:
        """`private` and `created`."""
        return self._read("repo.json")

    def set_private(self, private: bool) -> None:
        """Show the repository to everyone, or not."""
        with self._writing():
            self._write("repo.json", {**self.settings, "private": private})

    def refs(self) -> Refs:
        """Return all branches and tags."""
        known = self._read("refs.json")
        return Refs(known["branches"], known["tags"])

    def resolve(self, revision: str) -> str:
        """Return the commit id of a branch, a tag, or a commit id of which the first digits are enough."""
        refs = self.refs()
        for names in (refs.branches, refs.tags):
            if revision in names:
                return names[revision]
        if hub_names.SHORT_COMMIT.fullmatch(revision):
            found = list((self.path / "commits").glob(f"{revision}*.json"))
            if len(found) == 1:
                return found[0].stem
        raise _unknown(revision)

    def commit(self, revision: str) -> Commit:
        """Read a commit with its files."""
        commit_id = self.resolve(revision)
        data = json.loads(self._commit_file(commit_id).read_bytes())
        files = {path: Entry(**entry) for path, entry in data.pop("files").items()}
        return Commit(id=commit_id, files=files, **data)

    def history(self, revision: str) -> Iterator[Commit]:
        """Yield a commit and its ancestors, newest first."""
        commit = self.commit(revision)
        yield commit
        while commit.parent is not None:
            commit = self.commit(commit.parent)
            yield commit

    def entry(self, revision: str, path: str) -> tuple[str, Entry]:
        """Return the commit id and the entry of a file."""
        commit = self.commit(revision)
        if path not in commit.files:
            raise Refusal(404, f"Entry not found: {path}", code="EntryNotFound", commit=commit.id)
        return commit.id, commit.files[path]

    def object_file(self, sha256: str) -> Path:
        """Return where the bytes with this digest lie, or would lie."""
        if not hub_names.SHA256.fullmatch(sha256):
            raise Refusal(400, "An object's id is a sha256 in 64 lower-case hex digits")
        return self.path / "objects" / sha256

    def store(self, content: bytes) -> Entry:
        """Keep the bytes of a file that git holds."""
        entry = hub_trees.regular_entry(content)
        target = self.object_file(entry.sha256)
        if not target.exists():
            write_atomically(target, content)
        return entry

    def content(self, entry: Entry) -> bytes:
        """Read a small file."""
        return self.object_file(entry.sha256).read_bytes()

    def apply(self, branch: str, changes: Iterable[Change], title: str, message: str, parent: str | None) -> str:
        """Commit all changes at once and return the new id; a `parent` that is not the head is refused with 412."""
        with self._writing():
            refs = self.refs()
            if branch not in refs.branches:
                raise _unknown(branch)
            head = refs.branches[branch]
            if parent is not None and not (hub_names.SHORT_COMMIT.fullmatch(parent) and head.startswith(parent)):
                raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            before = self.commit(head).files
            files = dict(before)
            for change in changes:
                self._change(files, head, change)
            self._track(files, {path for path, entry in files.items() if before.get(path) != entry})
            if clash := hub_trees.clashes(files):
                raise Refusal(400, f"{clash[0]} would be a file and a folder")
            commit_id = self._save_commit(files, head, title, message)
            refs.branches[branch] = commit_id
            self._write("refs.json", asdict(refs))
        return commit_id

    def add_ref(self, kind: str, name: str, revision: str) -> None:
        """Create a branch (`branches`) or a tag (`tags`); 409 where it exists."""
        hub_names.check_ref(name)
        with self._writing():
            refs = asdict(self.refs())
            if name in refs[kind]:
                raise Refusal(409, f"Reference already exists: {name}")
            refs[kind][name] = self.resolve(revision)
            self._write("refs.json", refs)

    def remove_ref(self, kind: str, name: str) -> None:
        """Delete a branch or a tag."""
        with self._writing():
            refs = asdict(self.refs())
            if name not in refs[kind]:
                raise _unknown(name)
            if (kind, name) == ("branches", "main"):
                raise Refusal(403, "Cannot delete refs/heads/main")
            del refs[kind][name]
            self._write("refs.json", refs)

    def _change(self, files: dict[str, Entry], head: str, change: Change) -> None:
        hub_names.check_path(change.path)
        match change:
            case Put(path, entry):
                files[path] = entry
            case Copy(path, source, revision):
                files[path] = self.entry(revision or head, source)[1]
            case Remove(path, folder):
                below = [name for name in files if name.startswith(f"{path}/")]
                gone = [path] if path in files and not folder else below
                if not gone:
                    raise Refusal(404, "A file with this name doesn't exist", code="EntryNotFound", commit=head)
                for name in gone:
                    del files[name]

    def _track(self, files: dict[str, Entry], changed: set[str]) -> None:
        """Name in `.gitattributes` each LFS file of a commit that no pattern there names yet, as the Hub does."""
        known = files.get(hub_trees.GIT_ATTRIBUTES)
        attributes = self.content(known) if known else b""
        lfs_files = sorted(path for path in changed if files[path].lfs)
        untracked = [path for path in lfs_files if not hub_trees.is_tracked_by_lfs(path, attributes)]
        if untracked:
            lines = "".join(hub_trees.lfs_line(path) for path in untracked)
            files[hub_trees.GIT_ATTRIBUTES] = self.store(attributes + lines.encode())

    def _save_commit(self, files: dict[str, Entry], parent: str | None, title: str, message: str) -> str:
        date = now()
        tree = hub_trees.folder_ids(files)[""]
        signature = f"local <local@localhost> {date}"
        content = f"tree {tree}\nparent {parent}\nauthor {signature}\n\n{title}\n\n{message}".encode()
        commit_id = hub_trees.git_id(b"commit", content)
        entries = {path: asdict(files[path]) for path in sorted(files)}
        record = {"parent": parent, "title": title, "message": message, "date": date, "files": entries}
        write_atomically(self._commit_file(commit_id), json.dumps(record).encode())
        return commit_id

    @contextmanager
    def _writing(self) -> Generator[None]:
        with self.locked():
            self.require()
            yield

    def _commit_file(self, commit_id: str) -> Path:
        return self.path / "commits" / f"{commit_id}.json"

    def _read(self, name: str) -> dict[str, Any]:
        return json.loads((self.path / name).read_bytes())

    def _write(self, name: str, value: dict[str, Any]) -> None:
        write_atomically(self.path / name, json.dumps(value, indent=1).encode())


def _unknown(revision: str) -> Refusal:
    return Refusal(404, f"Invalid rev id: {revision}", code="RevisionNotFound")


def now() -> str:
    """Return the time as the Hub writes it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
