"""Paths and URLs: a local path where the system's calls are needed, a place anywhere where reading is enough."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote_to_bytes, urlsplit

from ckpt_core.errors import ArgumentError

if TYPE_CHECKING:
    from upath import UPath

    Place = Path | UPath
    """A directory or file: on a local file system, or below a URL that fsspec knows."""

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|file:/")


def place_of(url: str | Place) -> Place:
    """Return what `url` names: a path for a path or a `file://` URL, else a place that fsspec reaches.

    Raises:
        ArgumentError: no URL, or one of a scheme that needs a package that is not installed.
    """
    text = str(url)
    if isinstance(url, Path) or not _SCHEME.match(text) or text.startswith("file:"):
        return local_path(text)
    from upath import UPath

    try:
        place = UPath(url, use_listings_cache=False)  # others write there too
        _ = place.fs  # finds the scheme's file system
    except (ImportError, ValueError) as error:
        raise ArgumentError(f"{text}: no store that can be reached here ({error}).") from None
    return place if place.name or place.parent == place else place.parent  # a slash at the end names no other place


def is_url(text: str) -> bool:
    """Whether this is written like a URL, of whatever scheme."""
    return _SCHEME.match(text) is not None


def is_reachable(url: str | Place) -> bool:
    """Whether `place_of` takes it."""
    try:
        place_of(url)
    except ArgumentError:
        return False
    return True


def local_path(url: str | Place) -> Path:
    """Return the absolute path that `url` names: a path or a `file://` URL.

    Raises:
        ArgumentError: a URL of another scheme.
    """
    text = str(url)
    if "\0" in text:
        raise ArgumentError(f"{text!r}: a path has no NUL in it.")
    if isinstance(url, Path) or not _SCHEME.match(text):
        return Path(text).absolute()
    try:
        parts = urlsplit(text)
    except ValueError as error:
        raise ArgumentError(f"{text}: not a URL ({error}).") from None
    path = Path(os.fsdecode(unquote_to_bytes(parts.path)))
    plain = parts.scheme == "file" and parts.netloc in {"", "localhost"} and not (parts.query or parts.fragment)
    if plain and path.is_absolute() and "\0" not in str(path):
        return path
    raise ArgumentError(f"{text}: expected a local path or a file:///... URL.")
