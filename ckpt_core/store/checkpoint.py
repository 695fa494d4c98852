"""`Checkpoint`: one committed step, wherever it lies."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ckpt_core import durable, locks
from ckpt_core.errors import DamagedError, NotACheckpointError
from ckpt_core.format.manifest import MANIFEST_NAME, Manifest, read_manifest
from ckpt_core.store.names import DAMAGED, STAGING, TRASH, parse_step


@dataclass(frozen=True)
class Checkpoint:
    """One committed step."""

    path: Path
    manifest: Manifest = field(repr=False)

    @property
    def run(self) -> str:
        """The run that it belongs to."""
        return self.manifest.run

    @property
    def step(self) -> int:
        """Its step."""
        return self.manifest.step

    @property
    def url(self) -> str:
        """Where it lies, as a URL that `open_checkpoint` takes."""
        return self.path.as_uri()

    @property
    def root(self) -> Path:
        """The directory that the manifest's files lie below."""
        return self.path

    def component(self, name: str) -> Path | None:
        """Return the directory of `model`, `optimizer`, `trainer` or `assets`; None if it has none."""
        path = self.root / name
        return path if path.is_dir() else None

    @contextmanager
    def lease(self) -> Generator[None]:
        """Hold the checkpoint while reading it: a pruner leaves it alone meanwhile.

        Raises:
            NotACheckpointError: a pruner deleted it before.
        """
        with locks.locked(self.path / MANIFEST_NAME, locks.SHARED) as held:
            if not held:
                raise NotACheckpointError(f"{self.path}: deleted by a pruner before it could be read.")
            yield


def open_local(path: Path) -> Checkpoint:
    """Return the committed step in a directory; see `open_checkpoint`."""
    if path.name.startswith((STAGING, TRASH, DAMAGED)):
        raise NotACheckpointError(f"{path}: never committed, deleted, or set aside; see `ckpt list` of the store.")
    try:
        manifest = read_manifest(path)
    except (FileNotFoundError, NotADirectoryError):
        raise NotACheckpointError(
            f"{path}: no {MANIFEST_NAME}, so no committed step; see `ckpt list` of the store."
        ) from None
    checkpoint = Checkpoint(path, manifest)
    check_whole(checkpoint, {name: durable.file_size(checkpoint.root / name) for name in manifest.files})
    return checkpoint


def check_whole(checkpoint: Checkpoint, sizes: dict[str, int | None]) -> None:
    """Compare the manifest with the directory's name, and with the sizes of its files in bytes, None for missing ones.

    Raises:
        DamagedError: they differ.
    """
    path, manifest = checkpoint.path, checkpoint.manifest
    if parse_step(path.name) not in {None, manifest.step}:
        raise DamagedError(f"{path}: its manifest is that of step {manifest.step}; give the directory its name back.")
    for name, record in manifest.files.items():
        found = sizes.get(name)
        if found != record.bytes:
            raise DamagedError(
                f"{checkpoint.root / name}: {'missing' if found is None else f'{found} bytes'}, the manifest says "
                f"{record.bytes} bytes; restore a copy, or set the step aside with `ckpt repair`."
            )
