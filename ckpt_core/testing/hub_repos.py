"""Model repositories on disk: commits, branches, tags and content-addressed blobs.

    DIR/<namespace>/<name>/
      repo.json             private or not, when it was created
      refs.json             branches and tags, each a commit id
      commits/<id>.json     parent, title, message, date, and every file of the commit
      objects/<sha256>      the bytes of a file, once each
      parts/                uploads that are not complete yet
    DIR/.xet/               what was uploaded through Xet: `hub_cas` draws it
    DIR/.locks/             one lock a repository, for threads and processes alike

Paths in a repository are never paths on disk, and every name that is one was matched against a pattern first.
"""

import tempfile
from pathlib import Path

from ckpt_core.testing import hub_names
from ckpt_core.testing.hub_files import sync_directory
from ckpt_core.testing.hub_names import Refusal
from ckpt_core.testing.hub_repo import Repo


class Repos:
    """All repositories of one directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        (directory / ".locks").mkdir(parents=True, exist_ok=True)

    def get(self, repo_id: str) -> Repo:
        """Open a repository, whose name may be in upper or lower case; a missing one is refused with 404."""
        try:
            hub_names.check_repo_id(repo_id)
        except Refusal:
            raise hub_names.not_found(repo_id) from None
        known = self._known_id(repo_id)
        repo = Repo(self.directory / known, known, self._lock_file(known))
        repo.require()
        return repo

    def create(self, repo_id: str, *, private: bool) -> Repo:
        """Create a repository with an initial commit; an existing one, in whatever case, is refused with 409."""
        hub_names.check_repo_id(repo_id)
        place = self.directory / repo_id
        repo = Repo(place, repo_id, self._lock_file(repo_id))
        with repo.locked():
            if (self.directory / self._known_id(repo_id) / "repo.json").exists():
                raise Refusal(409, "You already created this model repo")
            place.parent.mkdir(exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.directory, prefix=".new-") as scratch:
                new = Path(scratch) / "repo"
                Repo.initialise(new, repo_id, self._lock_file(repo_id), private=private)
                new.rename(place)
            sync_directory(place.parent)
        return repo

    def delete(self, repo_id: str) -> None:
        """Delete a repository; it is gone whole at once."""
        repo = self.get(repo_id)
        with repo.locked(), tempfile.TemporaryDirectory(dir=self.directory, prefix=".trash-") as scratch:
            repo.require()
            repo.path.rename(Path(scratch) / "repo")

    def _known_id(self, repo_id: str) -> str:
        """Return the id as it was created, if it was in some case; else as it is."""
        if (self.directory / repo_id / "repo.json").exists():
            return repo_id
        namespace, name = repo_id.lower().split("/")
        for owner in self.directory.iterdir():
            if owner.name.lower() == namespace:
                for place in owner.iterdir():
                    if place.name.lower() == name:
                        return f"{owner.name}/{place.name}"
        return repo_id

    def _lock_file(self, repo_id: str) -> Path:
        """Return the lock of an id in any case; a name cannot hold '--'."""
        return self.directory / ".locks" / repo_id.lower().replace("/", "--")
