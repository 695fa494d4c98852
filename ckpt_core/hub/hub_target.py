"""A repository on the Hub as a target: a candidate is a branch, and promotion is one commit of copies.

The client tries uploads and listings again by itself, so they are not tried again here; every other request is. A
commit is not sent twice blindly: after each lost answer the branch is read first.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ckpt_core.errors import HubConflictError, HubContentError, HubError
from ckpt_core.hub.connection import Connection
from ckpt_core.hub.contents import Content, check_all
from ckpt_core.hub.failures import CONFLICT, STALE, asked_wait, at_hub, passes, status_of
from ckpt_core.hub.hub_uploads import difference, upload
from ckpt_core.hub.retries import persist
from ckpt_core.hub.target import Entry, Progress, State, Tree
from ckpt_core.hub.verification import differs
from ckpt_core.hub.xet import xet_deadline

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete

    Operation = CommitOperationAdd | CommitOperationCopy | CommitOperationDelete

T = TypeVar("T")

CANDIDATES = "candidate/"
_ATTRIBUTES = ".gitattributes"
_CHUNK_BYTES = 2**20


class HubTarget:
    """A model repository. `private` is how it is made where it is missing."""

    def __init__(self, hub: Connection, repo_id: str, *, private: bool = False) -> None:
        self._hub = hub
        self._private = private
        self._trees: dict[str, dict[str, Entry]] = {}
        self.repo_id = repo_id
        self.endpoint: str | None = hub.endpoint
        self.where = f"{hub.endpoint}/{repo_id}"

    def url(self, tag: str | None, commit: str) -> str:
        """Return the page of a tag, or of a commit without one."""
        return f"{self.where}/tree/{tag or commit}"

    def prepare(self) -> State:
        """Make the repository where there is none, and return its refs."""
        state = self.read()
        if state.head is None:
            self._request(lambda: self._hub.api.create_repo(self.repo_id, private=self._private, exist_ok=True))
            return self.read()
        if self._private and not self._request(lambda: self._hub.api.model_info(self.repo_id)).private:
            raise HubConflictError(
                f"{self.where} exists and is public, and private was asked for; nothing was sent. Make it private in"
                " its settings, or publish to another repository"
            )
        return state

    def read(self) -> State:
        """Return the repository's refs; no head where there is none, or where the token may not see it."""
        from huggingface_hub.errors import RepositoryNotFoundError

        def ask() -> State:
            try:
                refs = self._hub.api.list_repo_refs(self.repo_id)
            except RepositoryNotFoundError:
                return State(None, {})
            branches = {branch.name: branch.target_commit for branch in refs.branches}
            if "main" not in branches:
                raise HubError(f"{self.where} has no branch main, which releases are published on; create it")
            named = {name.removeprefix(CANDIDATES): at for name, at in branches.items() if name.startswith(CANDIDATES)}
            return State(branches["main"], {tag.name: tag.target_commit for tag in refs.tags}, named)

        return self._request(ask)

    def tree(self, commit: str) -> Tree:
        """Return every file of a commit but for `.gitattributes`, which is the Hub's own."""
        return {path: entry for path, entry in self._files(commit).items() if path != _ATTRIBUTES}

    def stage(self, name: str, contents: Mapping[str, Content], head: str | None, progress: Progress | None) -> str:
        """Send what a candidate's branch lacks, and commit it there; return that commit."""
        from huggingface_hub import CommitOperationAdd

        branch = CANDIDATES + name
        self._request(lambda: self._hub.api.create_branch(self.repo_id, branch=branch, revision=head, exist_ok=True))
        start = self._head(branch)
        operations = difference(contents, self.tree(start))
        additions = [each for each in operations if isinstance(each, CommitOperationAdd)]
        there = contents.keys() - {addition.path_in_repo for addition in additions}
        check_all(contents[path] for path in sorted(there))  # what the Hub has already is claimed by its digest alone
        if not operations:
            return start

        def send(batch: list[CommitOperationAdd], size: int) -> None:
            with ExitStack() as checks, xet_deadline(size):
                for addition in batch:
                    checks.enter_context(contents[addition.path_in_repo].verified())
                self._hub.api.preupload_lfs_files(self.repo_id, batch, revision=branch, free_memory=False)

        at_hub(self._hub, self.where, lambda: upload(additions, send, progress))
        return self._commit(
            branch, operations, start, f"Candidate {name}", lambda tree: differs(tree, contents) is None
        )

    def check(self, commit: str) -> None:
        """Read nothing: the tree's digests are what the Hub stores the files by."""

    def promote(self, commit: str, parent: str | None, message: str) -> str:
        """Commit copies of a commit's files to `main`: no large file is sent, small ones travel there and back."""
        from huggingface_hub import CommitOperationCopy, CommitOperationDelete

        if parent is None:
            raise HubError(f"{self.where} has no commit on main to promote onto; publish again")
        source, present = self._files(commit), self._files(parent)
        stale = sorted(present.keys() - source.keys() - {_ATTRIBUTES})
        changed = [path for path in sorted(source) if source[path] != present.get(path)]
        operations: list[Operation] = [CommitOperationDelete(path_in_repo=path, is_folder=False) for path in stale]
        operations += [CommitOperationCopy(path, path, src_revision=commit) for path in changed]
        wanted = self.tree(commit)
        return self._commit("main", operations, parent, message, lambda tree: tree == wanted)

    def tag(self, name: str, commit: str) -> None:
        """Set a tag, once; finding it on that commit is fine."""

        def ask() -> None:
            from huggingface_hub.errors import HfHubHTTPError

            try:
                self._hub.api.create_tag(self.repo_id, tag=name, revision=commit)
            except HfHubHTTPError as problem:
                if status_of(problem) != CONFLICT:
                    raise
                found = self.read().tags.get(name)
                if found != commit:
                    raise HubConflictError(
                        f"{self.where}: somebody else set the tag {name}, on commit {found}, while this release was"
                        f" made; main is at {commit}. Run it again without a tag, for the next version"
                    ) from None

        self._request(ask)

    def discard(self, name: str) -> None:
        """Delete a candidate's branch."""
        from huggingface_hub.errors import RevisionNotFoundError

        def ask() -> None:
            try:
                self._hub.api.delete_branch(self.repo_id, branch=CANDIDATES + name)
            except RevisionNotFoundError:  # an answer was lost, or somebody else ended the same publication
                return

        self._request(ask)

    def digest(self, commit: str, path: str) -> tuple[int, str]:
        """Stream a file as users would get it; a broken transfer starts again."""
        from huggingface_hub.errors import EntryNotFoundError

        def ask() -> tuple[int, str] | None:
            try:
                return self._stream(commit, path)
            except EntryNotFoundError:
                return None

        found = self._request(ask)
        if found is None:
            raise HubContentError(f"{self.where}: {path} is not in commit {commit} though it was sent; publish again")
        return found

    def download(self, commit: str, directory: Path) -> None:
        """Copy all files of a commit into a directory; files that are there and right are not sent again."""
        from huggingface_hub import snapshot_download  # pyright: ignore[reportUnknownVariableType] a bare dict in it

        hub, size = self._hub, sum(entry.size for entry in self.tree(commit).values())

        def ask() -> None:
            with xet_deadline(size):
                snapshot_download(
                    self.repo_id, revision=commit, local_dir=directory, endpoint=hub.endpoint, token=hub.token
                )

        self._request(ask)

    def _request(self, ask: Callable[[], T]) -> T:
        """Send what may be sent again, and again while that can help."""
        return at_hub(self._hub, self.where, lambda: persist(ask, passes=passes, asked=asked_wait))

    def _files(self, commit: str) -> dict[str, Entry]:
        """Return every file of a commit, which never changes; the client tries listings again by itself."""
        from huggingface_hub import RepoFile

        def ask() -> dict[str, Entry]:
            items = self._hub.api.list_repo_tree(self.repo_id, recursive=True, revision=commit)
            return {item.path: _entry(item) for item in items if isinstance(item, RepoFile)}

        def _entry(file: RepoFile) -> Entry:
            if file.lfs is not None:
                return Entry(file.size, sha256=file.lfs.sha256)
            return Entry(file.size, git_id=file.blob_id)

        if commit not in self._trees:
            self._trees[commit] = at_hub(self._hub, self.where, ask)
        return self._trees[commit]

    def _head(self, branch: str) -> str:
        state = self.read()
        found = state.head if branch == "main" else state.candidates.get(branch.removeprefix(CANDIDATES))
        if found is None:
            raise HubConflictError(
                f"{self.where}: somebody else deleted the branch {branch} while it was used; run it again"
            )
        return found

    def _commit(
        self,
        branch: str,
        operations: "Sequence[Operation]",
        parent: str,
        message: str,
        wanted: Callable[[Tree], bool],
    ) -> str:
        """Commit on top of `parent` and nothing else; a commit that landed though its answer was lost is recognised."""
        from huggingface_hub.errors import HfHubHTTPError

        tried = False

        def ask() -> str:
            nonlocal tried
            if tried and (landed := self._landed(branch, parent, wanted)):
                return landed
            tried = True
            try:
                return self._hub.api.create_commit(
                    self.repo_id, operations, commit_message=message, parent_commit=parent, revision=branch
                ).oid
            except HfHubHTTPError as problem:
                if status_of(problem) not in (CONFLICT, STALE):
                    raise
                if landed := self._landed(branch, parent, wanted):
                    return landed
                raise

        return self._request(ask)

    def _landed(self, branch: str, parent: str, wanted: Callable[[Tree], bool]) -> str | None:
        """Return the commit that a branch is at now, if it is the wanted one; None if the branch did not move.

        Raises:
            HubConflictError: it moved elsewhere.
        """
        head = self._head(branch)
        if head == parent:
            return None
        if wanted(self.tree(head)):
            return head
        newest = self._hub.api.list_repo_commits(self.repo_id, revision=head)[0]
        raise HubConflictError(
            f"{self.where}: somebody else moved {branch} from {parent} to {head} ({newest.title!r} by"
            f" {', '.join(newest.authors) or 'nobody named'}); nothing was overwritten. Look at that commit, then run"
            " it again to go on from there"
        )

    def _stream(self, commit: str, path: str) -> tuple[int, str]:
        from huggingface_hub import get_session, hf_hub_url, hf_raise_for_status
        from huggingface_hub.utils import build_hf_headers  # pyright: ignore[reportUnknownVariableType] a bare dict

        url = hf_hub_url(self.repo_id, path, revision=commit, endpoint=self._hub.endpoint)
        # No compression: the digest is of the file's bytes. No cache: they are to come from where readers get them.
        headers = {
            **build_hf_headers(token=self._hub.token),
            "Accept-Encoding": "identity",
            "Cache-Control": "no-cache",
        }
        size, digest = 0, hashlib.sha256()
        with get_session().stream("GET", url, headers=headers, follow_redirects=True) as response:
            hf_raise_for_status(response)
            for chunk in response.iter_bytes(_CHUNK_BYTES):
                size += len(chunk)
                digest.update(chunk)
        return size, digest.hexdigest()
