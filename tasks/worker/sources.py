"""Sources of text: files, JSONL rows, Hub datasets, and the standard library's own code."""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

from ckpt_core import texts
from ckpt_core.errors import ArgumentError
from tasks.config import PYTHON_STDLIB, DataSettings

if TYPE_CHECKING:
    from collections.abc import Iterator

_HUB_PREFIX = "hf:"
_NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idlelib"}


def read_texts(settings: DataSettings) -> Iterator[str]:
    """Yield the texts of a source; a long file is several of them.

    Raises:
        ArgumentError: nothing was found, a file cannot be read, or a row has no text.
    """
    if settings.source.startswith(_HUB_PREFIX):
        yield from _hub_texts(settings)
        return
    for path in _files(settings.source):
        yield from texts.read_texts(path, settings.text_field)


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
    return texts.find_texts(source, others=f", nor `hf:NAME` or {PYTHON_STDLIB!r}")


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
        yield texts.text_of(dict(row), settings.text_field, f"Hub dataset {name!r}, row {number}")
