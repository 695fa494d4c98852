"""Publishing an export: one commit, read back, then a version tag.

The tag comes last, so a tag means that the Hub was seen to hold the right bytes. A rerun after a stop at any moment
finds what is done, does the rest, and ends with the same release.
"""

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from ckpt_core.errors import HubConflictError, HubError
from ckpt_core.hub.card import render_card
from ckpt_core.hub.connection import Connection
from ckpt_core.hub.contents import Content, read_contents
from ckpt_core.hub.failures import at_hub
from ckpt_core.hub.readback import read_back
from ckpt_core.hub.releases import Release, check_repo_id, check_tag, next_version, release, tree, version_of

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, RepoFile


def publish(
    export: str | PathLike[str],
    repo_id: str,
    *,
    tag: str | None = None,
    private: bool = False,
    endpoint: str | None = None,
    token: str | None = None,
    card: str | None = None,
) -> Release:
    """Make `main` of a repository hold exactly this export, verify it from the Hub, and tag it.

    `export` is a directory with `export.json`; `repo_id` is `namespace/name`, created (private or not) where it is
    missing. `tag` defaults to the next of `v1`, `v2`, ...; `card` is the text of README.md (see `render_card`), by
    default a minimal one. Endpoint and token default to `HF_ENDPOINT` and `HF_TOKEN`, or a stored login.

    Publishing what is published already sends nothing and returns the release that there is. An unchanged release
    needs an unchanged card: leave times and the tag out of it.

    Raises ArgumentError for a wrong argument; DamagedError where the export is not what `export.json` says;
    HubAuthError, HubConflictError (another commit or tag came first) and HubContentError (the Hub serves other bytes,
    and no tag was set); HubError for all else that keeps a release from being there and verified.
    """
    check_repo_id(repo_id)
    if tag is not None:
        check_tag(tag)
    contents = read_contents(Path(export), card, _default_card(repo_id))
    hub = Connection.open(endpoint, token, write=True)
    return at_hub(hub, repo_id, lambda: _publish(hub, repo_id, contents, tag, private=private))


def _publish(
    hub: Connection, repo_id: str, contents: Mapping[str, Content], tag: str | None, *, private: bool
) -> Release:
    _open_repo(hub, repo_id, private=private)
    head, tags = _refs(hub, repo_id)
    operations = _difference(contents, tree(hub, repo_id, head))
    sizes = [content.size for content in contents.values()]
    if not operations:
        existing = version_of(head, tags) if tag is None else tag
        if existing is not None and tags.get(existing) == head:
            return release(hub, repo_id, existing, head, sizes, created=False)
    name = next_version(tags) if tag is None else tag
    if name in tags:
        raise HubConflictError(
            f"{hub.endpoint}/{repo_id}: the tag {name} is on commit {tags[name]}, and a release never changes;"
            " publish under another tag, or leave the tag out for the next version"
        )
    commit = _commit(hub, repo_id, operations, head, name) if operations else head
    read_back(hub, repo_id, commit, contents)
    hub.api.create_tag(repo_id, tag=name, revision=commit)
    return release(hub, repo_id, name, commit, sizes, created=True)


def _open_repo(hub: Connection, repo_id: str, *, private: bool) -> None:
    hub.api.create_repo(repo_id, private=private, exist_ok=True)
    if private and not hub.api.model_info(repo_id).private:  # it was there before, and public
        raise HubConflictError(
            f"{hub.endpoint}/{repo_id} exists and is public, and private was asked for; nothing was sent. Make it"
            " private in its settings, or publish to another repository"
        )


def _refs(hub: Connection, repo_id: str) -> tuple[str, dict[str, str]]:
    refs = hub.api.list_repo_refs(repo_id)
    heads = [branch.target_commit for branch in refs.branches if branch.name == "main"]
    if not heads:
        raise HubError(f"{hub.endpoint}/{repo_id} has no branch main, which releases are published on; create it")
    return heads[0], {tag.name: tag.target_commit for tag in refs.tags}


def _difference(
    contents: Mapping[str, Content], remote: Mapping[str, "RepoFile"]
) -> "list[CommitOperationAdd | CommitOperationDelete]":
    """Return what turns the remote tree into the release; nothing where they are equal."""
    from huggingface_hub import CommitOperationDelete

    changed = [path for path in sorted(contents) if not _same(contents[path], remote.get(path))]
    stale = sorted(remote.keys() - contents.keys())
    deletions = [CommitOperationDelete(path_in_repo=path, is_folder=False) for path in stale]
    return [*deletions, *(_addition(path, contents[path]) for path in changed)]


def _same(content: Content, remote: "RepoFile | None") -> bool:
    if remote is None or remote.size != content.size:
        return False
    if remote.lfs is not None:
        return remote.lfs.sha256 == content.sha256
    return remote.blob_id == content.git_id()


def _addition(path: str, content: Content) -> "CommitOperationAdd":
    from huggingface_hub import CommitOperationAdd

    addition = CommitOperationAdd(path_in_repo=path, path_or_fileobj=content.source)
    addition.upload_info.sha256 = bytes.fromhex(content.sha256)  # or the client reads every file again to hash it
    return addition


def _commit(
    hub: Connection,
    repo_id: str,
    operations: "list[CommitOperationAdd | CommitOperationDelete]",
    head: str,
    name: str,
) -> str:
    info = hub.api.create_commit(
        repo_id, operations, commit_message=f"Publish {name}", parent_commit=head, revision="main"
    )
    return info.oid


def _default_card(repo_id: str) -> str:
    summary = "A transformers model, converted to safetensors from a PyTorch distributed checkpoint."
    return render_card(title=repo_id.split("/")[1], summary=summary, repo_id=repo_id)
