"""Paths and `file://` URLs."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote_to_bytes, urlsplit

from ckpt_core.errors import ArgumentError

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|file:/")


def local_path(url: str | Path) -> Path:
    """Return the absolute path that `url` names: a path or a `file://` URL.

    Raises:
        ArgumentError: a URL of another scheme.
    """
    text = str(url)
    if "\0" in text:
        raise ArgumentError(f"{text!r}: a path has no NUL in it.")
    if not _SCHEME.match(text):
        return Path(url).absolute()
    try:
        parts = urlsplit(text)
    except ValueError as error:
        raise ArgumentError(f"{text}: not a URL ({error}).") from None
    path = Path(os.fsdecode(unquote_to_bytes(parts.path)))
    plain = parts.scheme == "file" and parts.netloc in {"", "localhost"} and not (parts.query or parts.fragment)
    if plain and path.is_absolute() and "\0" not in str(path):
        return path
    raise ArgumentError(f"{text}: expected a local path or a file:///... URL; other stores are not supported yet.")
