"""Hyperparameters, whatever they came as: as a dict, and in JSON types."""

# dataclasses-json is only partly annotated.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from typing import Any, cast

from dataclasses_json.core import _ExtendedEncoder  # pyright: ignore[reportPrivateUsage] - what its to_json uses

from ckpt_core.errors import ArgumentError


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
