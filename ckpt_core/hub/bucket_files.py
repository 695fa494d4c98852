"""Files below a directory or a URL, as `bucket_target` needs them: each appears whole, and some only once."""

from __future__ import annotations

import hashlib
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ckpt_core import durable
from ckpt_core.errors import StepExistsError
from ckpt_core.hub.contents import Content
from ckpt_core.store import objects

if TYPE_CHECKING:
    from upath import UPath

    from ckpt_core.durable import Sink

_CHUNK_BYTES = 2**20
_INCOMING = ".incoming"


class Files(Protocol):
    """Files by their path below a root. What is missing is a FileNotFoundError, all else an OSError."""

    def names(self, directory: str) -> list[str]:
        """Return the names in a directory, sorted; none where there is none."""
        ...

    def sizes(self, directory: str) -> Mapping[str, int]:
        """Return the size in bytes of each file below a directory, by its path relative to it."""
        ...

    def read(self, path: str) -> bytes:
        """Return a small file."""
        ...

    def blocks(self, path: str) -> Iterator[bytes]:
        """Yield a file block by block."""
        ...

    def create(self, path: str, data: bytes) -> bool:
        """Write a small file that must not exist yet; False where it exists and holds something else."""
        ...

    def copy(self, source: str, target: str) -> bool:
        """Link a file to a second path; False where there are no links."""
        ...

    def send(self, content: Content, path: str, scratch: str) -> None:
        """Write a file while its sha256 is made; `scratch` names who writes.

        Raises:
            DamagedError: it is not the content's; nothing was written.
        """
        ...

    def delete(self, path: str) -> None:
        """Delete a file, or a directory with all below; one that is gone is fine."""
        ...

    def serve(self, directory: str) -> None:
        """Show a directory under the name `main`, where there are links."""
        ...

    def forget(self, scratch: str) -> None:
        """Delete what a writer that died left half written."""
        ...


class LocalFiles:
    """Below a directory. Files of trees are read-only, since equal ones are one file with several names."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def names(self, directory: str) -> list[str]:
        """List a directory."""
        try:
            return sorted(entry.name for entry in (self._root / directory).iterdir())
        except FileNotFoundError:
            return []

    def sizes(self, directory: str) -> Mapping[str, int]:
        """Look at each file below a directory."""
        root = self._root / directory
        return {name: path.lstat().st_size for name, path in durable.files_below(root)} if root.is_dir() else {}

    def read(self, path: str) -> bytes:
        """Read a file."""
        return (self._root / path).read_bytes()

    def blocks(self, path: str) -> Iterator[bytes]:
        """Read a file in blocks."""
        with (self._root / path).open("rb") as file:
            while block := file.read(_CHUNK_BYTES):
                yield block

    def create(self, path: str, data: bytes) -> bool:
        """Write the file apart, and give it its name, if that is free."""
        try:
            durable.create_whole(self._root / path, data, self._apart("records"))
        except FileExistsError:
            return self.read(path) == data
        return True

    def copy(self, source: str, target: str) -> bool:
        """Link a file."""
        try:
            return durable.link_new(self._root / source, self._root / target)
        except FileExistsError:
            return True

    def send(self, content: Content, path: str, scratch: str) -> None:
        """Write the file apart, flush it to the device, and give it its name."""
        apart = self._apart(scratch)
        try:
            _write_checked(durable.create(apart), content)
            apart.chmod(0o444)
            target = self._root / path
            durable.make_directory(target.parent)
            apart.replace(target)
            durable.sync_directory(target.parent)
        finally:
            apart.unlink(missing_ok=True)

    def delete(self, path: str) -> None:
        """Delete a file or a tree."""
        place = self._root / path
        if place.is_dir() and not place.is_symlink():
            durable.remove_tree(place)
        else:
            place.unlink(missing_ok=True)

    def serve(self, directory: str) -> None:
        """Make `main` a link to the directory, at once."""
        main = self._root / "main"
        if main.is_symlink() and main.readlink() == Path(directory):
            return
        apart = self._root / f".main-{uuid.uuid4().hex}"
        try:
            apart.symlink_to(directory)
        except OSError as problem:
            if problem.errno in durable.NO_LINKS:
                return
            raise
        apart.replace(main)
        durable.sync_directory(self._root)

    def forget(self, scratch: str) -> None:
        """Delete what lies apart."""
        shutil.rmtree(self._root / _INCOMING / scratch, ignore_errors=True)

    def _apart(self, scratch: str) -> Path:
        place = self._root / _INCOMING / scratch / uuid.uuid4().hex
        durable.make_directory(place.parent)
        return place


class RemoteFiles:
    """Below a URL that fsspec knows. An object appears whole by itself; requests have the deadlines of the plugin."""

    def __init__(self, root: UPath) -> None:
        self._root = root

    def names(self, directory: str) -> list[str]:
        """List a prefix."""
        return objects.names_in(self._root / directory)

    def sizes(self, directory: str) -> Mapping[str, int]:
        """List all below a prefix."""
        try:
            return objects.sizes_below(self._root / directory)
        except FileNotFoundError:
            return {}

    def read(self, path: str) -> bytes:
        """Read an object."""
        return objects.read(self._root / path)

    def blocks(self, path: str) -> Iterator[bytes]:
        """Read an object in blocks."""
        file: Any
        place = self._root / path
        with objects.plain_errors(place), durable.file_system(place).open(place.path, "rb") as file:
            while block := file.read(_CHUNK_BYTES):
                yield block

    def create(self, path: str, data: bytes) -> bool:
        """Put an object on condition that there is none."""
        try:
            objects.create(self._root / path, data)
        except StepExistsError:
            return False
        return True

    def copy(self, source: str, target: str) -> bool:  # noqa: ARG002  see below
        """Copy nothing: an object would have to be read here to know what is copied, which costs as much as sending."""
        return False

    def send(self, content: Content, path: str, scratch: str) -> None:  # noqa: ARG002  nothing lies apart
        """Put an object part by part; it is there when the last one is."""
        place = self._root / path
        with objects.plain_errors(place):
            _write_checked(durable.RemoteSink(place, replace=True), content)

    def delete(self, path: str) -> None:
        """Delete an object, and all below its name."""
        objects.delete_all(self._root / path, self.sizes(path))
        objects.delete(self._root / path)

    def serve(self, directory: str) -> None:
        """Leave it to the newest commit to say what is served."""

    def forget(self, scratch: str) -> None:
        """Leave it to the store to forget uploads that did not end."""


def _write_checked(sink: Sink, content: Content) -> None:
    """Write a content whole, or not at all where its bytes are not those of its digest."""
    try:
        found = hashlib.sha256()
        for block in content.blocks():
            found.update(block)
            sink.write(memoryview(block))
        content.check_digest(found.hexdigest())
        sink.seal()
    finally:
        sink.close()
