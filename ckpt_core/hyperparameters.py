"""Hyperparameters, whatever they came as: as a dict, and in JSON types."""

# dataclasses-json is only partly annotated.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from typing import Any, cast

from dataclasses_json.core import _ExtendedEncoder  # pyright: ignore[reportPrivateUsage] - what its to_json uses

from ckpt_core import json_types
from ckpt_core.errors import ArgumentError
from ckpt_core.json_types import TYPES_KEY


def as_dict(hyperparameters: Any) -> dict[str, Any]:
    """Return hyperparameters as a dict, or raise: they are a dict, a NamedTuple or a dataclass instance."""
    if hyperparameters is None:
        return {}
    if isinstance(hyperparameters, dict):
        return cast("dict[str, Any]", hyperparameters)
    if isinstance(hyperparameters, tuple) and hasattr(hyperparameters, "_fields"):
        return cast("Any", hyperparameters)._asdict()
    if is_dataclass(hyperparameters) and not isinstance(hyperparameters, type):
        return asdict(hyperparameters)
    raise ArgumentError(
        f"hyperparameters: expected a dict, a NamedTuple or a dataclass instance, found {type(hyperparameters)!r}."
    )


class _Encoder(_ExtendedEncoder):
    """dataclasses-json's own, and besides it dataclasses in a dict and numpy's numbers."""

    def default(self, o: Any) -> Any:
        if type(o).__module__ == "numpy" and hasattr(o, "tolist"):
            return o.tolist()
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
        ArgumentError (a ValueError): it holds what JSON cannot; the message begins with `what`.
    """
    try:
        return json.loads(json.dumps(value, cls=_Encoder, default=default, skipkeys=skipkeys))
    except (TypeError, ValueError) as error:
        raise ArgumentError(
            f"{what}: {error}; give numbers, text, lists and dicts, or `default=` to to_json."
        ) from None
