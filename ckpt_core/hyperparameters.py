"""Hyperparameters, whatever they came as: as a dict, and in JSON types."""

# dataclasses-json is only partly annotated.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, is_dataclass
from functools import partial
from typing import Any, cast

from dataclasses_json.core import _ExtendedEncoder  # pyright: ignore[reportPrivateUsage] - what its to_json uses

from ckpt_core import json_types
from ckpt_core.errors import ArgumentError
from ckpt_core.json_types import TYPES_KEY

_MOST_LEVELS = 100
"""How deep values may be nested: readers recurse, and so do other programs that read the JSON."""


def as_dict(hyperparameters: Any) -> dict[str, Any]:
    """Return hyperparameters as a dict, or raise: they are a dict, a NamedTuple or a dataclass instance."""
    if hyperparameters is None:
        return {}
    if isinstance(hyperparameters, dict):
        return cast("dict[str, Any]", hyperparameters)
    if isinstance(hyperparameters, tuple) and hasattr(hyperparameters, "_fields"):
        return cast("Any", hyperparameters)._asdict()
    if is_dataclass(hyperparameters) and not isinstance(hyperparameters, type):
        try:
            return asdict(hyperparameters)
        except RecursionError:
            raise ArgumentError("hyperparameters: nested without end, or contain themselves.") from None
    raise ArgumentError(
        f"hyperparameters: expected a dict, a NamedTuple or a dataclass instance, found {type(hyperparameters)!r}."
    )


class _Encoder(_ExtendedEncoder):
    """dataclasses-json's own, and besides it dataclasses in a dict and numpy's numbers."""

    def default(self, o: Any) -> Any:
        if type(o).__module__ == "numpy" and hasattr(o, "tolist"):
            return o.tolist()
        if type(o).__module__.partition(".")[0] == "torch" and hasattr(o, "tolist"):
            raise TypeError("a tensor is no JSON, but what its item() or tolist() returns")
        if is_dataclass(o) and not isinstance(o, type):
            return asdict(o)
        return super().default(o)


def types_lost(value: Any, what: str) -> list[Any] | None:
    """Return what `plain` loses of the types of tuples and keys, for `restored`.

    Raises:
        ArgumentError (a ValueError): two keys of a dict would be one.
    """
    try:
        return json_types.types_of(value)
    except (ValueError, RecursionError) as error:
        raise ArgumentError(f"{what}: {error}; rename one.") from None


def restored(value: Any, types: Any) -> Any:
    """Return hyperparameters that were read from JSON, with tuples and keys as they were.

    Raises:
        ArgumentError (a ValueError): they have no such types.
    """
    try:
        return json_types.with_types(value, types)
    except ValueError as error:
        raise ArgumentError(f"hyperparameter_types: {error}; not a reference.") from None


def exact(state: dict[str, Any], what: str) -> dict[str, Any]:
    """Return a state in JSON types if reading it gives it back as it is; what it is read with stands in it, too.

    Raises:
        ArgumentError (a ValueError): it holds something else; the message begins with `what` and names it.
    """
    document = plain(state, what)
    odd = json_types.odd_entry(state, what)
    if odd is not None:
        raise ArgumentError(
            f"{odd} would come back as something else; give numbers, text, lists, tuples and dicts of Python's types."
        )
    types = types_lost(state, what)
    return document if types is None else {**document, TYPES_KEY: types}


def plain(value: Any, what: str, default: Callable[..., Any] | None = None, *, skipkeys: bool = False) -> Any:
    """Return `value` in JSON types only; `default` and `skipkeys` are those of `json.dumps`.

    Raises:
        ArgumentError (a ValueError): it holds what JSON cannot; the message begins with the key below `what`.
    """
    encode = partial(json.dumps, cls=_Encoder, default=default, skipkeys=skipkeys)
    try:
        made = json.loads(encode(value), object_pairs_hook=_unambiguous)
        _check_depth(made)
    except (TypeError, ValueError, RecursionError) as error:
        where, reason = _culprit(value, what, encode)
        raise ArgumentError(
            f"{where}: {reason or error}; give numbers, text, lists and dicts, or `default=` to to_json."
        ) from None
    return made


def _unambiguous(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object, unless two of a dict's keys, such as 1 and "1", are one in JSON."""
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"two keys are {twice!r} as JSON")
    return made


def _check_depth(value: Any) -> None:
    """Check that readers, which recurse, can take a value."""
    level, depth = [value], 0
    while level:
        if depth > _MOST_LEVELS:
            raise ValueError(f"nested more than {_MOST_LEVELS} levels deep")
        level = [child for parent in level for _, child in _children(parent) if isinstance(child, list | dict)]
        depth += 1


def _children(value: Any) -> list[tuple[str, Any]]:
    """Return what is in a container, by the text that leads to it."""
    if isinstance(value, Mapping):
        return [(f".{key}", child) for key, child in cast("Mapping[Any, Any]", value).items()]
    if isinstance(value, list | tuple):
        return [(f"[{place}]", child) for place, child in enumerate(cast("list[Any]", value))]
    return []


def _culprit(value: Any, what: str, encode: Callable[[Any], str]) -> tuple[str, str | None]:
    """Return where in a value the part is that JSON cannot hold, and, if the encoder's own error does not tell, why."""
    path, top, above = what, what, {id(value)}
    for _ in range(_MOST_LEVELS):
        for step, child in _children(value):
            if id(child) in above:
                return path + step, "contains itself"
            reason = _refusal(child, encode)
            if reason is not None:
                value, path = child, path + step
                top = path if top == what else top
                above.add(id(child))
                break
        else:
            return path, _refusal(value, encode)
    return top, f"nested more than {_MOST_LEVELS} levels deep"


def _refusal(value: Any, encode: Callable[[Any], str]) -> str | None:
    """Return why a value cannot be JSON; None if it can."""
    try:
        _check_depth(json.loads(encode(value), object_pairs_hook=_unambiguous))
    except RecursionError:
        return f"nested more than {_MOST_LEVELS} levels deep"
    except (TypeError, ValueError) as error:
        return str(error)
    return None
