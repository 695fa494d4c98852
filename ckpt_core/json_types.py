"""Types that JSON loses: tuples, and keys of dicts that are no text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import NoneType
from typing import Any, cast

Types = list[Any] | None
"""What a value was, where its JSON does not tell: `tuple`, `list` or `dict`, then its entries' own."""

TYPES_KEY = "_types"
"""Where a dict in JSON holds the types that its other entries had."""

_KEYS = frozenset({str, int, float, bool, NoneType})
_SCALARS = frozenset({str, int, float, bool, NoneType})
_MAX_DEPTH = 100


def types_of(value: Any) -> Types:
    """Return the types that JSON would lose of a value that can be written as JSON; None if it loses none.

    Raises:
        ValueError: two keys of a dict would be one.
    """
    if type(value) in {list, tuple}:
        entries = [types_of(entry) for entry in cast("list[Any]", value)]
        name = type(value).__name__
        return [name, entries] if name == "tuple" or any(entry is not None for entry in entries) else None
    if isinstance(value, dict):
        pairs = [(key, types_of(entry)) for key, entry in cast("dict[Any, Any]", value).items() if type(key) in _KEYS]
        texts = {_text(key) for key, _ in pairs}
        if len(texts) < len(pairs):
            raise ValueError(f"of the keys {[key for key, _ in pairs][:9]}, two are the same as text")
        odd = any(type(key) is not str or entry is not None for key, entry in pairs)
        return ["dict", [list(pair) for pair in pairs]] if odd else None
    return None


def with_types(value: Any, types: Any, depth: int = 0) -> Any:
    """Return a value that was read from JSON with the types that `types_of` told of it.

    Raises:
        ValueError: they do not fit it.
    """
    if types is None:
        return value
    try:
        kind, entries = types
        if depth > _MAX_DEPTH:
            raise ValueError("nested too deeply")
        if kind == "dict" and isinstance(value, Mapping):
            stored = dict(cast("Mapping[str, Any]", value))
            typed = {key: with_types(stored.pop(_text(key)), entry, depth + 1) for key, entry in entries}
            return {**typed, **stored}
        if kind in {"list", "tuple"} and isinstance(value, list):
            pairs = zip(cast("list[Any]", value), entries, strict=True)
            made = [with_types(entry, known, depth + 1) for entry, known in pairs]
            return tuple(made) if kind == "tuple" else made
    except (TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"types that do not fit their value ({type(error).__name__})") from None
    raise ValueError(f"a {type(value).__name__} where a {str(kind)[:20]} was written")


def odd_entry(value: Any, where: str) -> str | None:
    """Return name and type of the first entry that JSON and `types_of` do not keep, such as an enum's member."""
    if type(value) in {list, tuple}:
        pairs = [(str(place), entry) for place, entry in enumerate(cast("list[Any]", value))]
    elif type(value) is dict:
        content = cast("dict[Any, Any]", value)
        odd = next((key for key in content if type(key) not in _KEYS), None)
        if odd is not None:
            return _described(odd, f"{where}.{odd}")
        pairs = [(str(key), entry) for key, entry in content.items()]
    else:
        return None if type(value) in _SCALARS else _described(value, where)
    return next((found for name, entry in pairs if (found := odd_entry(entry, f"{where}.{name}")) is not None), None)


def _described(value: object, where: str) -> str:
    return f"{where}: a {type(value).__module__}.{type(value).__qualname__}"


def _text(key: Any) -> str:
    """Return the text that JSON makes of a key."""
    return next(iter(json.loads(json.dumps({key: 0}))))
