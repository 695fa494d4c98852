"""What lies below a directory: its DCP directories, and all files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ckpt_core.errors import NotACheckpointError
from ckpt_core.format.index import METADATA_NAME
from ckpt_core.format.manifest import MANIFEST_NAME
from ckpt_core.store.names import parse_step

if TYPE_CHECKING:
    from ckpt_core.urls import Place

_MAX_DEPTH = 8
_MAX_ENTRIES = 200_000
_PICKLED = (".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth")
_RANK_0 = f"__0{METADATA_NAME}"


@dataclass
class Tree:
    """A directory, without what is hidden in it: that is no checkpoint, but one that is made or deleted."""

    place: Place
    dcp: dict[str, Place] = field(default_factory=dict[str, "Place"])
    """DCP directories, by their path below `place`; empty for `place` itself."""

    files: dict[str, Place] = field(default_factory=dict[str, "Place"])
    """Regular files, by their path below `place`."""

    entries: int = 0
    seen: set[Path] = field(default_factory=set[Path])
    """Directories that need not be looked into again: links lead to one by several names, or to one above."""

    def unchecked(self, checked: Iterable[str]) -> tuple[str, ...]:
        """Return the files that are not among those `checked`: first pickles, which loading would run."""
        left = self.files.keys() - set(checked)
        return tuple(sorted(left, key=lambda name: (not name.endswith(_PICKLED), name)))


def read_tree(place: Place) -> Tree:
    """Look at what lies below a directory.

    Raises:
        NotACheckpointError: there are too many files, or committed steps, which are verified one by one.
    """
    tree = Tree(place)
    if isinstance(place, Path):
        tree.seen.update(place.resolve().parents)
    _read(place, "", tree, 0)
    return tree


def _read(directory: Place, path: str, tree: Tree, depth: int) -> None:
    if isinstance(directory, Path):
        if directory.resolve() in tree.seen:
            return
        tree.seen.add(directory.resolve())
    names: Mapping[str, Place] = {entry.name: entry for entry in directory.iterdir()}
    if METADATA_NAME in names or _RANK_0 in names:
        tree.dcp[path.removesuffix("/")] = directory
    if path and MANIFEST_NAME in names and parse_step(directory.name) is not None:
        raise NotACheckpointError(
            f"{tree.place}: committed steps below it, such as {directory}; verify them one by one."
        )
    tree.entries += len(names)
    if tree.entries > _MAX_ENTRIES:
        raise NotACheckpointError(f"{tree.place}: more than {_MAX_ENTRIES} files; give the checkpoint's own directory.")
    # Links last, so that a directory is found by its own name.
    for name, entry in sorted(names.items(), key=lambda item: (_is_link(item[1]), item[0])):
        if name.startswith("."):
            continue
        if not entry.is_dir():
            tree.files[path + name] = entry
        elif depth < _MAX_DEPTH:
            _read(entry, f"{path}{name}/", tree, depth + 1)


def _is_link(entry: Place) -> bool:
    return isinstance(entry, Path) and entry.is_symlink()
