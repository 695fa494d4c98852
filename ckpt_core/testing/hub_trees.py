"""The files of one commit: entries, git object ids, folder listings, and which files go to LFS.

Object ids are git's own, so what the Hub client computes locally compares equal.
"""

import fnmatch
import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

LFS_FROM_BYTES = 10 * 2**20  # the Hub takes no larger file into git itself
GIT_ATTRIBUTES = ".gitattributes"
LFS_ATTRIBUTES = "filter=lfs diff=lfs merge=lfs -text"
_WEIGHTS = (
    "*.arrow *.bin *.gz *.h5 *.msgpack *.npy *.npz *.onnx *.parquet *.pickle *.pkl *.pt *.pth *.safetensors *.zip"
)
DEFAULT_ATTRIBUTES = "".join(f"{pattern} {LFS_ATTRIBUTES}\n" for pattern in _WEIGHTS.split()).encode()


@dataclass(frozen=True)
class Entry:
    """One file: sha256 and size in bytes of its content, git's id of its blob, and whether LFS holds it."""

    sha256: str
    size: int
    oid: str
    lfs: bool

    @property
    def etag(self) -> str:
        """What the client compares and names its cached copy by."""
        return self.sha256 if self.lfs else self.oid

    def to_json(self, path: str) -> dict[str, Any]:
        """Return the entry as the Hub's tree endpoint shows it."""
        item: dict[str, Any] = {"type": "file", "path": path, "size": self.size, "oid": self.oid}
        if self.lfs:
            pointer_size = len(_lfs_pointer(self.sha256, self.size))
            item["lfs"] = {"oid": self.sha256, "size": self.size, "pointerSize": pointer_size}
        return item


def lfs_entry(sha256: str, size: int) -> Entry:
    """Describe a file that LFS holds; git itself only sees a pointer to it."""
    return Entry(sha256=sha256, size=size, oid=git_id(b"blob", _lfs_pointer(sha256, size)), lfs=True)


def regular_entry(content: bytes) -> Entry:
    """Describe a file that git holds."""
    sha256 = hashlib.sha256(content).hexdigest()
    return Entry(sha256=sha256, size=len(content), oid=git_id(b"blob", content), lfs=False)


def git_id(kind: bytes, content: bytes) -> str:
    """Return git's object id of a blob, tree or commit."""
    return hashlib.sha1(b"%s %d\0%s" % (kind, len(content), content), usedforsecurity=False).hexdigest()


def folder_ids(files: Mapping[str, Entry]) -> dict[str, str]:
    """Return the git tree id of every folder; the root is the empty string."""
    children: dict[str, dict[str, str]] = {"": {}}
    for path, entry in files.items():
        folder, name = _split(path)
        children.setdefault(folder, {})[name] = entry.oid
        for ancestor in _ancestors(path):
            children.setdefault(ancestor, {})
    ids: dict[str, str] = {}
    for folder in sorted(children, key=_depth, reverse=True):
        subfolders = {_split(path)[1]: oid for path, oid in ids.items() if path and _split(path)[0] == folder}
        ids[folder] = _tree_id(children[folder], subfolders)
    return ids


def listing(files: Mapping[str, Entry], folder: str = "", *, recursive: bool = False) -> list[dict[str, Any]]:
    """List the files and folders below `folder`, sorted by path; empty where there is no such folder."""
    prefix = f"{folder}/" if folder else ""
    items = [entry.to_json(path) for path, entry in files.items() if path.startswith(prefix)]
    items += [folder_json(path, oid) for path, oid in folder_ids(files).items() if path.startswith(prefix) and path]
    if not recursive:
        items = [item for item in items if "/" not in item["path"][len(prefix) :]]
    return sorted(items, key=lambda item: item["path"])


def folder_json(path: str, oid: str) -> dict[str, Any]:
    """Return a folder as the Hub's tree endpoint shows it."""
    return {"type": "directory", "path": path, "size": 0, "oid": oid}


def clashes(files: Iterable[str]) -> list[str]:
    """Return the paths that are both a file and a folder: no checkout could hold them."""
    paths = set(files)
    return sorted({ancestor for path in paths for ancestor in _ancestors(path) if ancestor in paths})


def goes_to_lfs(path: str, size: int, sample: bytes, attributes: bytes) -> bool:
    """Decide as the Hub does: by `.gitattributes`, by size, and by looking at the first bytes."""
    return size >= LFS_FROM_BYTES or b"\0" in sample or is_tracked_by_lfs(path, attributes)


def is_tracked_by_lfs(path: str, attributes: bytes) -> bool:
    """Whether a line of `.gitattributes` sends this path to LFS."""
    name = _split(path)[1]
    for line in attributes.decode("utf-8", errors="replace").splitlines():
        pattern, _, values = line.strip().partition(" ")
        if "filter=lfs" in values.split() and pattern:
            target = path if "/" in pattern else name
            if fnmatch.fnmatchcase(target, pattern):
                return True
    return False


def lfs_line(path: str) -> str:
    """Return the line of `.gitattributes` that sends this one path to LFS."""
    pattern = re.sub(r"[\s*?\[\]]", "?", path)  # a pattern has no other way to say a space
    return f"{pattern} {LFS_ATTRIBUTES}\n"


def _lfs_pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def _tree_id(files: Mapping[str, str], folders: Mapping[str, str]) -> str:
    # git sorts a folder as if its name ended in a slash
    rows = [(name.encode(), b"100644", name, oid) for name, oid in files.items()]
    rows += [(f"{name}/".encode(), b"40000", name, oid) for name, oid in folders.items()]
    content = b"".join(b"%s %s\0%s" % (mode, name.encode(), bytes.fromhex(oid)) for _, mode, name, oid in sorted(rows))
    return git_id(b"tree", content)


def _split(path: str) -> tuple[str, str]:
    folder, _, name = path.rpartition("/")
    return folder, name


def _ancestors(path: str) -> list[str]:
    parts = path.split("/")[:-1]
    return ["/".join(parts[: count + 1]) for count in range(len(parts))]


def _depth(folder: str) -> int:
    return folder.count("/") + 1 if folder else 0
