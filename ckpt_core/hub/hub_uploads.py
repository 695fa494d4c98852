"""Uploads to the Hub: what is missing, large files one at a time, none sent twice."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from ckpt_core.hub.contents import LARGE_BYTES, Content
from ckpt_core.hub.target import Progress, Tree

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete


def difference(contents: Mapping[str, Content], remote: Tree) -> "list[CommitOperationAdd | CommitOperationDelete]":
    """Return what turns the remote tree into the contents; nothing where they are equal."""
    from huggingface_hub import CommitOperationDelete

    stale = sorted(remote.keys() - contents.keys())
    changed = [path for path in sorted(contents) if path not in remote or not remote[path].holds(contents[path])]
    deletions = [CommitOperationDelete(path_in_repo=path, is_folder=False) for path in stale]
    return [*deletions, *(_addition(path, contents[path]) for path in changed)]


def upload(
    additions: "Sequence[CommitOperationAdd]",
    send: "Callable[[list[CommitOperationAdd], int], None]",
    progress: Progress | None,
) -> None:
    """Have `send` take files and their size in bytes: each large one alone, then all small ones.

    A file that the Hub has already is not sent again, so what was done before a stop need not be known here.
    """
    large = [[addition] for addition in additions if addition.upload_info.size > LARGE_BYTES]
    small = [addition for addition in additions if addition.upload_info.size <= LARGE_BYTES]
    total, done = sum(addition.upload_info.size for addition in additions), 0
    for batch in [*large, small] if small else large:
        size = sum(addition.upload_info.size for addition in batch)
        send(batch, size)
        done += size
        if progress is not None:
            progress(done, total)


def _addition(path: str, content: Content) -> "CommitOperationAdd":
    from huggingface_hub import CommitOperationAdd

    addition = CommitOperationAdd(path_in_repo=path, path_or_fileobj=content.source)
    addition.upload_info.sha256 = bytes.fromhex(content.sha256)  # it is checked before sending
    return addition
