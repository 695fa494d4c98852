"""`export.json`: what an export was made of, and the size and sha256 of each file. Read strictly."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ckpt_core.durable import file_size
from ckpt_core.errors import DamagedError, NotACheckpointError
from ckpt_core.export.carried import EXPORT_NAME, is_plain

if TYPE_CHECKING:
    from ckpt_core.urls import Place

FORMAT_VERSION = 1
MAX_BYTES = 64_000_000
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Export:
    """A Hugging Face directory that `convert` wrote, and what its `export.json` says."""

    path: Place
    source: Mapping[str, Any]
    files: Mapping[str, Mapping[str, Any]]
    rules: tuple[str, ...]
    architecture: str

    @property
    def nbytes(self) -> int:
        """Size of all files in bytes, `export.json` aside."""
        return sum(record["bytes"] for record in self.files.values())


def read_export(path: Place) -> Export:
    """Read what `export.json` says, and check that the files are there in the sizes that it says.

    Raises:
        NotACheckpointError: there is no `export.json`.
        DamagedError: it is not readable, or a file is missing or has another size.
    """
    record = path / EXPORT_NAME
    size = file_size(record)
    if size is None:
        raise NotACheckpointError(
            f"{path}: no {EXPORT_NAME}, so not an export of ckptflow; make one with `ckpt convert`."
        )
    if size > MAX_BYTES:
        raise DamagedError(
            f"{record}: not an export's record ({size} bytes, expected at most {MAX_BYTES}); convert again."
        )
    try:
        export = _parse(path, json.loads(record.read_bytes()))
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{record}: not an export's record ({str(error)[:300]}); convert again.") from None
    for name, entry in export.files.items():
        if file_size(path / name) != entry["bytes"]:
            raise DamagedError(
                f"{path / name}: missing or not of {entry['bytes']} bytes, as {EXPORT_NAME} says; convert again."
            )
    return export


def _parse(path: Place, document: Any) -> Export:
    """Return the export that a record describes; ValueError says what is wrong with it."""
    fields = _expect(document, dict, "the record")
    if fields.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"format_version {fields.get('format_version')!r}, expected {FORMAT_VERSION}")
    files = _expect(fields.get("files"), dict, "files")
    for name, entry in files.items():
        _check_entry(name, _expect(entry, dict, name))
    rules = [_expect(rule, str, "a rule") for rule in _expect(fields.get("rules"), list, "rules")]
    source = _expect(fields.get("source"), dict, "source")
    return Export(path, source, files, tuple(rules), _expect(fields.get("architecture"), str, "architecture"))


def _check_entry(name: str, entry: dict[str, Any]) -> None:
    if not is_plain(name):
        raise ValueError(f"{name!r} is no plain name of a file in a directory")
    size, sha256 = entry.get("bytes"), entry.get("sha256", "none")
    if type(size) is not int or size < 0:
        raise ValueError(f"{name} has bytes {size!r}, expected a number")
    if sha256 is not None and not (type(sha256) is str and _SHA256.fullmatch(sha256)):
        raise ValueError(f"{name} has sha256 {sha256!r}, expected 64 hexadecimal digits, or null if none was made")


def _expect(value: Any, kind: type[Any], what: str) -> Any:
    if type(value) is not kind:
        raise ValueError(f"{what} is a {type(value).__name__}, expected a {kind.__name__}")
    return value
