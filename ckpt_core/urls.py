"""Paths and URLs: one parser for every argument that names a file or directory.

A path is a `str`, a `Path` or any other `os.PathLike`; `~` at its beginning is the user's home. `file:///...` and
`local:///...` are paths. Other URLs are places that fsspec reaches, where its package is installed. What is neither,
and would become a strange directory below the current one, is refused: a mistyped scheme, a URL that went through
`Path`, bytes, an empty string, a path of Windows.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import unquote_to_bytes, urlsplit

from ckpt_core.errors import ArgumentError

if TYPE_CHECKING:
    from upath import UPath

    Place = Path | UPath
    """A directory or file: on a local file system, or below a URL that fsspec knows."""

    AnyPath = str | os.PathLike[str] | Place
    """What the parser takes."""

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|(file|local):/")
_LOCAL = re.compile(r"(file|local):/")
_WINDOWS = re.compile(r"[A-Za-z]:\\|\\\\")
_ALMOST = re.compile(r"\s*([A-Za-z][A-Za-z0-9+.-]*)(:|//)")
"""The beginning of what may be a URL that was mistyped, or that `Path` made of one: `s3:/bucket`, `s3//bucket`."""

_BUCKETS = frozenset({"abfs", "abfss", "az", "gcs", "gs", "oss", "s3", "s3a", "tos"})
"""Schemes whose URLs begin with a bucket's name."""

_READ_ONLY = frozenset({"data", "git", "github", "hf", "http", "https", "libarchive", "reference", "tar", "zip"})
"""Schemes that are only read. On the Hub each file would be a commit: that is what `ckpt publish` is for."""


def place_of(url: AnyPath, argument: str = "") -> Place:
    """Return what `url` names: an absolute path, or a place that fsspec reaches.

    Args:
        url: a path or URL.
        argument: what the caller's argument is called, for the error.

    Raises:
        ArgumentError: neither, or a URL of a scheme that needs a package that is not installed.
    """
    text = _text(url, argument)
    if isinstance(url, Path) or not is_url(text) or _LOCAL.match(text):
        return _path(url, text, argument)
    from upath import UPath

    if "::" in text.partition("://")[0]:
        raise _refused(text, argument, "chained file systems are not supported; give the URL of the last one")
    try:
        place = UPath(cast("Any", url), use_listings_cache=False)  # others write there too
        _ = place.fs  # finds the scheme's file system
    except Exception as error:  # noqa: BLE001 - each scheme's package raises errors of its own
        raise _refused(text, argument, f"no store that can be reached here ({error})") from None
    if isinstance(place, Path):  # fsspec, too, takes for a path what does not begin with a scheme
        raise _refused(text, argument, "neither a path nor a URL; expected SCHEME://...")
    if place.protocol in _BUCKETS and not urlsplit(text).netloc:
        raise _refused(text, argument, f"names no bucket; expected {place.protocol}://BUCKET/NAME")
    if {".", ".."} & set(place.parts):
        raise _refused(text, argument, "a URL has no '.' or '..' in its path")
    return place if place.name or place.parent == place else place.parent  # a slash at the end names no other place


def writable_place(url: AnyPath, argument: str = "") -> Place:
    """Return what `url` names, where something is to be written there.

    Raises:
        ArgumentError: `place_of` does not take it, or it can only be read.
    """
    place = place_of(url, argument)
    if not isinstance(place, Path) and place.protocol in _READ_ONLY:
        advice = "; publish to the Hub with `ckpt publish`" if place.protocol == "hf" else ""
        raise _refused(str(url), argument, f"{place.protocol}:// is only read, never written to{advice}")
    return place


def local_path(url: AnyPath, argument: str = "") -> Path:
    """Return the absolute path that `url` names: a path or a `file://` URL.

    Raises:
        ArgumentError: neither; URLs of other schemes are not supported where this is called.
    """
    return _path(url, _text(url, argument), argument)


def name_or_path(value: AnyPath, argument: str) -> str:
    """Return a Hub id as it is, or the absolute path that `value` names where it begins like a path.

    Raises:
        ArgumentError: neither, or a URL other than `file:///...`.
    """
    text = _text(value, argument)
    if isinstance(value, str) and not is_url(text) and not text.startswith(("~", ".", "/", "\\")):
        _check_path(text, argument)
        return text
    return str(_path(value, text, argument))


def is_url(text: str) -> bool:
    """Whether this is written like a URL, of whatever scheme."""
    return _URL.match(text) is not None or "://" in text


def is_reachable(url: AnyPath) -> bool:
    """Whether `place_of` takes it."""
    try:
        place_of(url)
    except ArgumentError:
        return False
    return True


def _text(url: object, argument: str) -> str:
    """Return a path or URL as text.

    Raises:
        ArgumentError: it is none of the types, empty, or has a NUL.
    """
    text = str.__str__(url) if isinstance(url, str) else str(url) if _is_remote(url) else _file_system_path(url)
    if text is None:
        raise _refused(url, argument, f"of type {type(url).__name__}; expected a path or URL as str or Path")
    if not text.strip():
        raise _refused(text, argument, "an empty path; give a directory, such as '.' for the current one")
    if "\0" in text:
        raise _refused(text, argument, "a path has no NUL in it")
    return text


def _is_remote(url: object) -> bool:
    return hasattr(url, "fs") and hasattr(url, "protocol") and not isinstance(url, Path)


def _file_system_path(url: object) -> str | None:
    """Return what `os.fspath` gives, if that is text; bytes have no meaning in a URL or in JSON."""
    try:
        text = cast("str | bytes", os.fspath(cast("Any", url)))
    except TypeError:
        return None
    return text if isinstance(text, str) else None


def _path(url: object, text: str, argument: str) -> Path:
    if not isinstance(url, Path) and is_url(text):
        return _path_of_url(text, argument)
    _check_path(text, argument)
    path = Path(text)
    if text.startswith("~"):
        try:
            path = path.expanduser()
        except RuntimeError as error:
            raise _refused(text, argument, f"{error} For a name that begins with '~', give ./{text}") from None
    return path.absolute()


def _check_path(text: str, argument: str) -> None:
    """Refuse what would become a directory that is called like a scheme, `./s3:/bucket`, or like a drive of Windows."""
    if _WINDOWS.match(text):
        raise _refused(text, argument, "a path of Windows; expected a path of this system, such as /data/runs")
    match = _ALMOST.match(text)
    if match and match[2] == "//" and match[1].lower() not in _BUCKETS:
        match = None  # two slashes in a path, as string formatting makes them
    elif match and match[2] == ":" and not text.startswith("/", match.end()) and not _is_scheme(match[1]):
        match = None  # such as `run:1/step`
    within = any(part.endswith(":") and _is_scheme(part[:-1]) for part in text.split("/"))
    if match or within:
        raise _refused(
            text,
            argument,
            "neither a path nor a URL; expected SCHEME://..., as str, or an absolute path without scheme",
        )


def _is_scheme(name: str) -> bool:
    """Whether fsspec knows a scheme of this name, or might."""
    import fsspec  # pyright: ignore[reportMissingTypeStubs]

    known: list[str] = fsspec.available_protocols()
    return name.lower() in {*known, *_BUCKETS, "file", "local"}


def _path_of_url(text: str, argument: str) -> Path:
    try:
        parts = urlsplit(text)
    except ValueError as error:
        raise _refused(text, argument, f"not a URL ({error})") from None
    path = Path(os.fsdecode(unquote_to_bytes(parts.path)))
    plain = parts.scheme in {"file", "local"} and parts.netloc in {"", "localhost"} and not parts.query + parts.fragment
    if plain and path.is_absolute() and "\0" not in str(path):
        return path
    raise _refused(text, argument, "expected a local path or a file:///... URL")


def _refused(url: object, argument: str, why: str) -> ArgumentError:
    shown = str(url) if isinstance(url, str) and url.isprintable() and url.strip() else repr(url)
    return ArgumentError(f"{argument + ': ' if argument else ''}{shown:.500}: {why}.")
