"""What a release holds: the files of an export, checked against its `export.json`, the card and its pictures."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path, PurePosixPath
from typing import Any, cast

from ckpt_core.durable import file_size
from ckpt_core.errors import ArgumentError, DamagedError
from ckpt_core.urls import local_path, place_of

MANIFEST = "export.json"
CARD = "README.md"
_FORMAT_VERSION = 1
_BLOCK_BYTES = 2**20
_MOST_THREADS = 8
LARGE_BYTES = 2**20
"""Files above this size in bytes are sent one at a time, and are read only where they are part of a new release."""
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Content:
    """One file of a release: where its bytes are, how many, and their sha256 in hex."""

    source: Path | bytes
    size: int
    sha256: str

    def blocks(self) -> Iterator[bytes]:
        """Yield its bytes, block by block.

        Raises:
            DamagedError: the file cannot be read.
        """
        if isinstance(self.source, bytes):
            yield self.source
            return
        try:
            with self.source.open("rb") as file:
                while block := file.read(_BLOCK_BYTES):
                    yield block
        except OSError as problem:
            raise DamagedError(
                f"{self.source}: cannot be read ({problem.strerror}); check the disk, or convert again"
            ) from problem

    def git_id(self) -> str:
        """Return the id that git gives a file of this content, which is read for it.

        Raises:
            DamagedError: the file cannot be read, or has another sha256.
        """
        git, sha256 = hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False), hashlib.sha256()
        for block in self.blocks():
            git.update(block)
            sha256.update(block)
        self.check_digest(sha256.hexdigest())
        return git.hexdigest()

    def check(self) -> None:
        """Read it to its end, and compare its sha256.

        Raises:
            DamagedError: the file cannot be read, or has another sha256.
        """
        sha256 = hashlib.sha256()
        for block in self.blocks():
            sha256.update(block)
        self.check_digest(sha256.hexdigest())

    def check_digest(self, found: str) -> None:
        """Raise DamagedError unless `found`, the sha256 of what was read, is the expected one."""
        if found != self.sha256:
            raise DamagedError(
                f"{self.source}: was changed after {MANIFEST} was written, or its disk failed: it has sha256 {found},"
                f" expected {self.sha256}; convert again"
            )

    @contextmanager
    def verified(self) -> Generator[None]:
        """Check it, and that nobody changes it while the block runs, in which other code reads the file.

        Raises:
            DamagedError: the file cannot be read, has another sha256, or was changed meanwhile.
        """
        before = self._version()
        self.check()
        yield
        if self._version() != before:
            raise DamagedError(
                f"{self.source}: was changed while it was sent, and nothing was tagged; convert again where its"
                " content is another one now, and publish again"
            )

    def _version(self) -> tuple[int, ...]:
        """Return what changes with every write; the inode's time does even where the file's own was set back."""
        if isinstance(self.source, bytes):
            return ()
        try:
            status = self.source.stat()
        except OSError as problem:
            raise DamagedError(f"{self.source}: cannot be read ({problem.strerror}); convert again") from problem
        return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def check_all(contents: Iterable[Content]) -> None:
    """Read several contents to their ends at the same time; raises DamagedError as `Content.check` does."""
    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
        for _ in pool.map(Content.check, contents):
            pass


def read_contents(
    source: str | PathLike[str],
    card: str | Callable[[Mapping[str, Any]], str],
    pictures: Mapping[str, bytes] | None = None,
) -> dict[str, Content]:
    """Return every file of the release by its path.

    Names, sizes and the digests of small files are compared with `export.json`. Large files are read here only if they
    are newer than it; a release that is new reads each of them when it is staged. A `card` that is no text makes one of
    what `export.json` says, where the export has none.

    Raises:
        ArgumentError: no local directory, two cards, or a picture whose name is taken or none.
        DamagedError: the directory and `export.json` do not agree.
    """
    export = _local(source)
    manifest = _in_memory(_read(export / MANIFEST))
    record = _record(export, cast("bytes", manifest.source))
    contents = _listed(export, record)
    _check_directory(export, contents)
    contents[MANIFEST] = manifest
    if CARD not in contents:
        contents[CARD] = _in_memory((card if isinstance(card, str) else card(record)).encode())
    elif isinstance(card, str):
        raise ArgumentError(f"{export} has a {CARD} of its own; publish it without another card")
    for name, picture in (pictures or {}).items():
        if not name or PurePosixPath(name).name != name or name.startswith(".") or name in contents:
            raise ArgumentError(f"a picture cannot be named {name!r}; give it a plain name that no other file has")
        contents[name] = _in_memory(picture)
    return contents


def name_of(files: Mapping[str, tuple[int, str]]) -> str:
    """Return 16 hexadecimal digits that stand for all files, given the size and sha256 of each by its path."""
    lines = (f"{path}\0{files[path][0]}\0{files[path][1]}\n" for path in sorted(files))
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


def check_weights(export: Path) -> None:
    """Read the headers of the safetensors files, and the index that says which tensor is in which.

    Raises:
        DamagedError: they are not sound, or do not agree.
    """
    from ckpt_core.hf_weights import read_weights

    read_weights(export)


def _local(source: str | PathLike[str]) -> Path:
    if not isinstance(place_of(source, "export"), Path):
        raise ArgumentError(
            f"{source} is a URL, and only local exports are published: copy it to a "
            "directory, with export.json last, and publish that; or convert to a local directory"
        )
    path = local_path(source, "export")
    if not path.is_dir():
        raise ArgumentError(f"{source} is not a directory; publish takes what ckpt convert wrote")
    return path


def _in_memory(data: bytes) -> Content:
    return Content(source=data, size=len(data), sha256=hashlib.sha256(data).hexdigest())


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise DamagedError(f"{path} is missing, so this is no complete export; convert again") from None


def _record(export: Path, manifest: bytes) -> Mapping[str, Any]:
    """Return what `export.json` says, in the one version that is known."""
    try:
        record: Any = json.loads(manifest)
        version = record["format_version"]
    except (ValueError, LookupError, TypeError, RecursionError) as problem:
        raise _damaged(export, problem) from None
    if version != _FORMAT_VERSION:
        raise DamagedError(
            f"{export / MANIFEST}: format_version is {version}, expected {_FORMAT_VERSION}; use a newer ckptflow"
        )
    return record


def _listed(export: Path, record: Mapping[str, Any]) -> dict[str, Content]:
    try:
        files = cast("Mapping[str, Mapping[str, Any]]", record["files"])
        return {name: _content(export, name, entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except (LookupError, TypeError, AttributeError) as problem:
        raise _damaged(export, problem) from None


def _damaged(export: Path, problem: Exception) -> DamagedError:
    return DamagedError(f"{export / MANIFEST} is damaged ({type(problem).__name__}: {problem}); convert again")


def _content(export: Path, name: str, size: object, sha256: object) -> Content:
    plain = PurePosixPath(name)
    if plain.is_absolute() or ".." in plain.parts or str(plain) != name or name in (".", MANIFEST):
        raise DamagedError(f"{export / MANIFEST}: {name!r} is not the name of a file in the export; convert again")
    if not isinstance(size, int) or not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
        raise DamagedError(f"{export / MANIFEST}: {name} has no size or sha256; convert again, with digests")
    return Content(source=export / name, size=size, sha256=sha256)


def _check_directory(export: Path, listed: Mapping[str, Content]) -> None:
    there = {path.relative_to(export).as_posix(): path for path in export.rglob("*") if not path.is_dir()}
    there.pop(MANIFEST)
    if missing := sorted(listed.keys() - there.keys()):
        raise DamagedError(f"{export}: {missing[0]} is in {MANIFEST} but not there; convert again")
    if extra := sorted(there.keys() - listed.keys()):
        raise DamagedError(f"{export}: {extra[0]} is there but not in {MANIFEST}; remove it, or convert again")
    written = (export / MANIFEST).stat().st_mtime_ns  # it is the last file that a conversion writes
    for name, content in listed.items():
        size = file_size(there[name])
        if size != content.size:
            found = "is no file" if size is None else f"has {size} bytes"
            raise DamagedError(f"{export}: {name} {found}, {MANIFEST} says {content.size} bytes; convert again")
        looks_written_since = there[name].stat().st_mtime_ns > written
        if content.size <= LARGE_BYTES or looks_written_since:
            content.check()
