"""Comparing what a target holds with what it is to hold: by size and digest, or byte for byte."""

from collections.abc import Mapping

from ckpt_core.errors import HubContentError
from ckpt_core.hub.contents import MANIFEST, Content
from ckpt_core.hub.target import Target, Tree


def advance(target: Target, source: str, parent: str | None, message: str, wanted: Tree) -> str:
    """Add the commit to `main` that gives it the tree of `source`, and compare the two."""
    commit = target.promote(source, parent, message)
    found = target.tree(commit)
    for path in sorted(wanted.keys() | found.keys()):
        if wanted.get(path) != found.get(path):
            raise other_bytes(target, commit, path)
    return commit


def holds_model(tree: Tree) -> bool:
    """Whether a tree holds an export, or a model from elsewhere; a card alone is none."""
    return any(path == MANIFEST or path.endswith("config.json") for path in tree)


def differs(tree: Tree, contents: Mapping[str, Content]) -> str | None:
    """Return the first path that a tree does not hold as it should, or None."""
    for path in sorted(tree.keys() | contents.keys()):
        if path not in tree or path not in contents or not tree[path].holds(contents[path]):
            return path
    return None


def other_bytes(target: Target, commit: str, path: str) -> HubContentError:
    """Return the error that a file of a commit is another one than was meant."""
    return HubContentError(
        f"{target.where}: {path} at {commit} is not what was to be published, by its size or digest; no tag was set. If"
        " the file here still has the digest that export.json says, the copy there is damaged, or ignored by a"
        " .gitignore: delete it there and publish again"
    )


def read_back_all(target: Target, commit: str, contents: Mapping[str, Content]) -> None:
    """Read each file of a commit from the target; raises HubContentError at the first that differs."""
    for path in sorted(contents):
        expected = contents[path]
        size, sha256 = target.digest(commit, path)
        if (size, sha256) != (expected.size, expected.sha256):
            raise HubContentError(
                f"{target.where} serves other bytes than were to be published: {path} at {commit} has {size} bytes with"
                f" sha256 {sha256}, expected {expected.size} with {expected.sha256}; no tag was set. If the file here"
                " still has the expected digest, the copy there is damaged: delete it there and publish again"
            )


def read_back_tree(target: Target, commit: str, tree: Tree) -> None:
    """Read each file of a commit that has a sha256; what git holds, small files, it names by their content itself.

    Raises:
        HubContentError: a file is not what the target says.
    """
    for path in sorted(path for path, entry in tree.items() if entry.sha256):
        size, sha256 = target.digest(commit, path)
        if (size, sha256) != (tree[path].size, tree[path].sha256):
            raise HubContentError(
                f"{target.where} serves other bytes than it says: {path} at {commit} has {size} bytes with sha256 "
                f"{sha256}, expected {tree[path].size} with {tree[path].sha256}; main was not moved. Roll back to "
                "another release, or publish that export again"
            )
