"""JSON documents that anybody may have written."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, cast

from ckpt_core.durable import file_size

if TYPE_CHECKING:
    from ckpt_core.urls import Place

_FREE_CONTAINERS = 10_000
_BYTES_PER_CONTAINER = 6


def read_object(place: Place, max_bytes: int) -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no regular file of at most `max_bytes`, holds no object, or `parse` refuses it.
    """
    size = file_size(place)
    if size is None or size > max_bytes:
        raise ValueError(f"expected a regular file of at most {max_bytes} bytes, found {size}")
    return parse_object(place.read_bytes())


def parse_object(data: bytes) -> dict[str, Any]:
    """Return the object that JSON text says; see `parse`.

    Raises:
        ValueError: it says something else.
    """
    document = parse(data)
    if type(document) is not dict:
        raise ValueError(f"a JSON {type(document).__name__}, expected an object")
    return cast("dict[str, Any]", document)


def parse(data: bytes) -> Any:
    """Return what JSON text says, within memory of about twenty times its size.

    Raises:
        ValueError: it is no JSON, is nested too deeply, or is made of little but empty objects and lists.
    """
    containers = data.count(b"{") + data.count(b"[")
    # An empty list is three bytes of text and seventy of memory; real documents have ten bytes or more for each.
    if containers > _FREE_CONTAINERS + len(data) // _BYTES_PER_CONTAINER:
        raise ValueError(f"{containers} objects and lists in {len(data)} bytes, which no document of ours has")
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("objects or lists nested too deeply") from None
