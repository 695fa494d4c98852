"""Sources of text: files, JSONL rows, Hub datasets, and the standard library's own code."""

from __future__ import annotations

import glob
import json
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckpt_core.errors import ArgumentError
from tasks.config import PYTHON_STDLIB, DataSettings

if TYPE_CHECKING:
    from collections.abc import Iterator

_HUB_PREFIX = "hf:"
_NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idlelib"}
_LONGEST_TEXT = 1 << 20  # characters: a longer file is read as several texts, cut at line ends


def read_texts(settings: DataSettings) -> Iterator[str]:
    """Yield the texts of a source; a long file is several of them.

    Raises:
        ArgumentError: nothing was found, a file cannot be read, or a row has no text.
    """
    if settings.source.startswith(_HUB_PREFIX):
        yield from _hub_texts(settings)
        return
    for path in _files(settings.source):
        if path.suffix == ".jsonl":
            yield from _jsonl_texts(path, settings.text_field)
        else:
            yield from _file_texts(path)


def describe_source(settings: DataSettings) -> str:
    """Say what a source is and where it is looked for, for error messages."""
    if settings.source == PYTHON_STDLIB:
        return f"{PYTHON_STDLIB} (.py files below {_stdlib()})"
    if settings.source.startswith(_HUB_PREFIX):
        return f"Hub dataset {settings.source[len(_HUB_PREFIX) :]!r}, split {settings.split!r}"
    return f"{settings.source!r} (from {Path.cwd()})"


def _stdlib() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _files(source: str) -> list[Path]:
    """Return the files of a path or glob, in the order of their names."""
    if source == PYTHON_STDLIB:
        root = _stdlib()
        return sorted(p for p in root.rglob("*.py") if not _NOT_STDLIB & set(p.relative_to(root).parts))
    path = Path(source).expanduser()
    if path.is_dir():
        return sorted(p for p in path.rglob("*") if p.is_file() and not _hidden(p.relative_to(path)))
    if path.is_file():
        return [path]
    matches = [Path(name) for name in glob.glob(str(path), recursive=True)]  # noqa: PTH207 (Path.glob takes no absolute pattern)
    if not matches:
        raise ArgumentError(
            f"no data at {source!r} (from {Path.cwd()}): neither a file, a directory, a glob that matches "
            f"something, `hf:NAME` nor {PYTHON_STDLIB!r}"
        )
    return sorted(p for p in matches if not p.is_dir())


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _file_texts(path: Path) -> Iterator[str]:
    """Read a text file as documents of at most `_LONGEST_TEXT` characters and the rest of a line."""
    try:
        _require_regular(path)
        with path.open(encoding="utf-8") as file:
            while text := file.read(_LONGEST_TEXT):
                yield text + file.readline()
    except UnicodeDecodeError as error:
        raise ArgumentError(
            f"{path}: not UTF-8 text ({error.reason}); choose text files by a glob such as 'dir/**/*.txt'"
        ) from error
    except OSError as error:
        raise ArgumentError(f"{path}: cannot be read: {error.strerror or error}") from error


def _require_regular(path: Path) -> None:
    if path.exists() and not path.is_file():
        raise ArgumentError(f"{path}: not a regular file; choose text files by a glob such as 'dir/**/*.txt'")


def _jsonl_texts(path: Path, field: str) -> Iterator[str]:
    try:
        _require_regular(path)
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _row_text(line, field, f"{path}, line {number}")
    except UnicodeDecodeError as error:
        raise ArgumentError(f"{path}: not UTF-8 text ({error.reason})") from error
    except OSError as error:
        raise ArgumentError(f"{path}: cannot be read: {error.strerror or error}") from error


def _row_text(line: str, field: str, where: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ArgumentError(f"{where}: not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ArgumentError(f"{where}: expected an object with the field {field!r}, found a JSON {_kind(row)}")
    return _field(row, field, where)


def _field(row: dict[str, Any], field: str, where: str) -> str:
    if field not in row:
        raise ArgumentError(f"{where}: no field {field!r}, only {sorted(row)}; set `text_field`")
    if not isinstance(row[field], str):
        raise ArgumentError(f"{where}: field {field!r} is a {_kind(row[field])}, expected text; set `text_field`")
    return row[field].encode(errors="replace").decode()  # a lone surrogate, which JSON can hold, has no UTF-8


def _kind(value: object) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "truth value", type(None): "null"}
    return names.get(type(value), "number" if isinstance(value, int | float) else type(value).__name__)


def _hub_texts(settings: DataSettings) -> Iterator[str]:
    import datasets

    name = settings.source[len(_HUB_PREFIX) :]
    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(name, split=settings.split)
    except (OSError, ValueError, RuntimeError) as error:  # a name, split or file that is not there, or no network
        raise ArgumentError(
            f"Hub dataset {name!r}, split {settings.split!r}: {error}; check the name, the split and the network"
        ) from error
    for number, row in enumerate(rows):
        yield _field(dict(row), settings.text_field, f"Hub dataset {name!r}, row {number}")
