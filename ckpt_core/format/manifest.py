"""The commit record of a step: who made it, from what, how good it is, and the digest of every file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from types import NoneType
from typing import TYPE_CHECKING, Any, cast

from ckpt_core.errors import DamagedError
from ckpt_core.format.digests import ALGORITHM, digest_bytes, hasher
from ckpt_core.format.source import open_source

if TYPE_CHECKING:
    from ckpt_core.urls import Place

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
MAX_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One file of a checkpoint: its size in bytes and its digest as `algorithm:hex`."""

    bytes: int
    digest: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What `manifest.json` holds. Its JSON schema is `manifest.schema.json` beside this module.

    Numbers may be NaN or infinite; they are then written as Python's `json` writes them.
    """

    run: str
    step: int
    time: str
    """When it was committed, ISO 8601 in UTC."""

    world_size: int
    module: str | None = None
    """Class of the model, as `package.module.Class`."""

    optimizer: str | None = None
    """Class of the optimizer."""

    hyperparameters: Mapping[str, Any] = field(default_factory=dict[str, Any])
    hyperparameter_types: list[Any] | None = None
    """What of their types JSON loses, as `json_types.types_of` tells it; None if nothing."""

    metrics: Mapping[str, Any] = field(default_factory=dict[str, Any])
    lineage: Mapping[str, Any] = field(default_factory=dict[str, Any])
    files: Mapping[str, FileRecord] = field(default_factory=dict[str, FileRecord])
    """Every file but the manifest itself, by its path below `directory`."""

    directory: str = ""
    """The directory of the step that the files lie below; empty if that is the step's own."""

    def __post_init__(self) -> None:
        json.dumps(
            [self.hyperparameters, self.hyperparameter_types, self.metrics, self.lineage]
        )  # a TypeError here, not half way

    @property
    def nbytes(self) -> int:
        """Size of all files in bytes."""
        return sum(record.bytes for record in self.files.values())

    def digest(self) -> str:
        """Return the digest of everything the manifest says; as it names every file's, of the checkpoint."""
        plain = json.loads(json.dumps(self._document()))  # as it is read: with text for keys, in another order
        return digest_bytes(json.dumps(plain, sort_keys=True).encode())

    def to_bytes(self) -> bytes:
        """Return the text of `manifest.json`."""
        document = {**self._document(), "digest": self.digest()}
        return (json.dumps(document, indent=1) + "\n").encode()

    def _document(self) -> dict[str, Any]:
        document = {"format_version": FORMAT_VERSION, **asdict(self)}
        if not self.directory:
            del document["directory"]
        if self.hyperparameter_types is None:
            del document["hyperparameter_types"]
        return document


def read_manifest(directory: Place) -> Manifest:
    """Read and check the manifest of the step in `directory`.

    Raises:
        FileNotFoundError: there is none.
        DamagedError: it is not a manifest, or its own digest does not match.
    """
    path = directory / MANIFEST_NAME
    size = path.stat().st_size
    if not path.is_file() or size > MAX_BYTES:
        raise DamagedError(f"{path}: not a regular file of at most {MAX_BYTES} bytes; restore a copy.")
    return parse_manifest(path.read_bytes(), path)


def parse_manifest(data: bytes, path: Place) -> Manifest:
    """Read and check the text of a manifest that lies at `path`.

    Raises:
        DamagedError: it is not a manifest, or its own digest does not match.
    """
    try:
        document = cast("dict[str, Any]", json.loads(data))
        version, stored = document.pop("format_version"), document.pop("digest")
        _check_version(version, path)
        files = {str(name): FileRecord(**record) for name, record in document.pop("files").items()}
        manifest = Manifest(**document, files=files)
        _check(manifest)
    except DamagedError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(
            f"{path}: not a manifest ({type(error).__name__}: {str(error)[:200]}); restore a copy or delete the step."
        ) from None
    if stored != manifest.digest():
        raise DamagedError(
            f"{path}: its content gives {manifest.digest()}, it says {str(stored)[:99]}; restore a copy or delete the "
            "step."
        )
    return manifest


def _check_version(version: Any, path: Place) -> None:
    if version != FORMAT_VERSION:
        raise DamagedError(
            f"{path}: format_version {str(version)[:40]}, this library reads {FORMAT_VERSION}; update ckptflow."
        )


def _check(manifest: Manifest) -> None:
    """Check the types of what a manifest says, and that its files lie below it."""
    expected = {"run": str, "step": int, "time": str, "world_size": int}
    expected |= {
        "module": str | None,
        "optimizer": str | None,
        "hyperparameters": dict,
        "hyperparameter_types": (list, NoneType),
        "metrics": dict,
        "lineage": dict,
        "directory": str,
    }
    for name, kind in expected.items():
        if not isinstance(getattr(manifest, name), kind):
            raise TypeError(f"{name} is a {type(getattr(manifest, name)).__name__}")
    if manifest.directory and not _is_inside(manifest.directory):
        raise ValueError(f"the directory {manifest.directory[:200]!r}: none of a step")
    for name, record in manifest.files.items():
        if not (_is_inside(name) and type(record.bytes) is int and record.bytes >= 0 and type(record.digest) is str):
            raise ValueError(f"the file {name[:200]!r}: no file of a step")


def _is_inside(name: str) -> bool:
    """Whether a name leads below the directory that it is joined to; with `:/` it may be taken for a URL."""
    return bool(name) and "\0" not in name and ":/" not in name and not {"", ".", ".."} & set(name.split("/"))


def record_file(place: Place, algorithm: str = ALGORITHM) -> FileRecord:
    """Read a file once; return its size and digest.

    Raises:
        DamagedError: there is no file.
    """
    made, size = hasher(algorithm), 0
    with open_source(place) as source:
        buffer = memoryview(bytearray(source.block_bytes))
        while count := source.read_at(size, buffer):
            made.update(buffer[:count])
            size += count
    return FileRecord(size, f"{algorithm}:{made.hexdigest()}")


def record_bytes(data: bytes) -> FileRecord:
    """Return the size and digest of a file that holds `data`."""
    return FileRecord(len(data), digest_bytes(data, ALGORITHM))
