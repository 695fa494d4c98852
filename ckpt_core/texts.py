"""Texts in files: plain text, or JSON lines with a field that holds it."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ckpt_core.errors import ArgumentError
from ckpt_core.urls import local_path

if TYPE_CHECKING:
    from ckpt_core.urls import AnyPath

_LONGEST_TEXT = 1 << 20  # characters: a longer file is read as several texts, cut at line ends


def find_texts(source: AnyPath, others: str = "") -> list[Path]:
    """Return the files of a path or glob, in the order of their names; hidden ones in a directory do not count.

    Raises:
        ArgumentError: there is none; `others` says what else the caller would have taken.
    """
    path = local_path(source, "data")
    if path.is_dir():
        return sorted(p for p in path.rglob("*") if p.is_file() and not _hidden(p.relative_to(path)))
    if path.is_file():
        return [path]
    matches = [Path(name) for name in glob.glob(str(path), recursive=True)]  # noqa: PTH207 (Path.glob takes no absolute pattern)
    if not matches:
        raise ArgumentError(
            f"no data at {str(source)!r} (from {Path.cwd()}): neither a file, a directory, nor a glob that matches "
            f"something{others}"
        )
    return sorted(p for p in matches if not p.is_dir())


def read_texts(path: Path, field: str = "text") -> Iterator[str]:
    """Yield the texts of a file: the `field` of each row of a `.jsonl` file, else the whole, in parts if it is long.

    Raises:
        ArgumentError: it cannot be read, is not UTF-8, or a row has no text.
    """
    try:
        if path.exists() and not path.is_file():
            raise ArgumentError(f"{path}: not a regular file; choose text files by a glob such as 'dir/**/*.txt'")
        yield from _row_texts(path, field) if path.suffix == ".jsonl" else _parts(path)
    except UnicodeDecodeError as error:
        raise ArgumentError(
            f"{path}: not UTF-8 text ({error.reason}); choose text files by a glob such as 'dir/**/*.txt'"
        ) from error
    except OSError as error:
        raise ArgumentError(f"{path}: cannot be read: {error.strerror or error}") from error


def text_of(row: Mapping[str, Any], field: str, where: str) -> str:
    """Return the text of a row.

    Raises:
        ArgumentError: it has none; the message says `where`.
    """
    if field not in row:
        raise ArgumentError(f"{where}: no field {field!r}, only {sorted(row)}; set `text_field`")
    text = row[field]
    if not isinstance(text, str):
        raise ArgumentError(f"{where}: field {field!r} is a {_kind(text)}, expected text; set `text_field`")
    return text.encode(errors="replace").decode()  # a lone surrogate, which JSON can hold, has no UTF-8


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _parts(path: Path) -> Iterator[str]:
    """Yield parts of at most `_LONGEST_TEXT` characters and the rest of a line."""
    with path.open(encoding="utf-8") as file:
        while text := file.read(_LONGEST_TEXT):
            yield text + file.readline()


def _row_texts(path: Path, field: str) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                where = f"{path}, line {number}"
                yield text_of(_row(line, field, where), field, where)


def _row(line: str, field: str, where: str) -> dict[str, Any]:
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ArgumentError(f"{where}: not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ArgumentError(f"{where}: expected an object with the field {field!r}, found a JSON {_kind(row)}")
    return cast("dict[str, Any]", row)


def _kind(value: object) -> str:
    names: dict[type[Any], str] = {dict: "object", list: "list", str: "string", bool: "truth value", type(None): "null"}
    return names.get(type(value), "number" if isinstance(value, int | float) else type(value).__name__)
