"""What tasks return, as small JSON: a checkpoint is its reference, a failure its text, and nothing is pickled.

What is read back is what was returned, but for a checkpoint, whose state is loaded from its store on demand. Importing
this module also gives a checkpoint that is a task's parameter its identity in Prefect's cache keys: its digest.
"""

from __future__ import annotations

import json
import sys
import uuid
from dataclasses import fields, is_dataclass
from typing import Any

from prefect.cache_policies import STABLE_TRANSFORMS
from prefect.serializers import Serializer
from pydantic import Field

from ckpt_core import PyTorchCheckpoint
from ckpt_core.errors import ArgumentError, DamagedError

_KIND = "$type"
"""The key that only objects have which stand for something else than a dict."""

_PLAIN = {type(None), bool, int, float, str}


class ReferenceSerializer(Serializer):
    """Stores JSON types, tuples, dataclasses and checkpoints, in any nesting.

    A failure is stored as text, which Prefect raises as a `FailedRun` where it is read. A dataclass is looked up in
    the modules that are imported where it is read, and nothing is imported for it.
    """

    type: str = Field(default="ckpt-reference", frozen=True)

    def dumps(self, obj: Any) -> bytes:
        """Return a result as JSON text.

        Raises:
            ArgumentError: something in it has no JSON; the message says where.
        """
        told = f"{type(obj).__name__}: {obj}" if isinstance(obj, BaseException) else _encode(obj, "result")
        return json.dumps(told).encode()

    def loads(self, blob: bytes) -> Any:
        """Return the result that JSON text stands for.

        Raises:
            DamagedError: the text stands for none.
        """
        try:
            return _decode(json.loads(blob))
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            raise DamagedError(
                f"a stored result: not of this serializer, or of other code ({type(error).__name__}: {error}); set "
                "PREFECT_TASKS_REFRESH_CACHE=true for one run, to have it made again."
            ) from None


def _encode(value: Any, where: str) -> Any:
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind is list:
        return [_encode(item, f"{where}[{number}]") for number, item in enumerate(value)]
    if kind is dict:
        return {_checked_key(key, where): _encode(item, f"{where}[{key!r}]") for key, item in value.items()}
    if kind is tuple:
        return {_KIND: "tuple", "items": _encode(list(value), where)}
    if isinstance(value, PyTorchCheckpoint):
        return {_KIND: "checkpoint", "reference": value.to_dict()}
    if is_dataclass(kind):
        given = {field.name: getattr(value, field.name) for field in fields(kind) if field.init}
        return {_KIND: "dataclass", "class": _name_of(kind, where), "fields": _encode(given, where)}
    raise ArgumentError(
        f"{where}: a {kind.__module__}.{kind.__qualname__} cannot be stored as a task's result; return JSON types, "
        "tuples, dataclasses and checkpoints, or set persist_result=False on the task."
    )


def _checked_key(key: Any, where: str) -> str:
    if type(key) is not str or key == _KIND:
        raise ArgumentError(f"{where}: has the key {key!r}; a stored dict has text for keys, other than {_KIND!r}.")
    return key


def _name_of(kind: type, where: str) -> str:
    """Return the name by which a dataclass is found again."""
    name = f"{kind.__module__}:{kind.__qualname__}"
    try:
        found = _find(name)
    except LookupError:
        found = None
    if found is not kind:
        raise ArgumentError(f"{where}: {name} cannot be found by its name; define it at the top of its module.")
    return name


def _decode(document: Any) -> Any:
    if isinstance(document, list):
        return [_decode(item) for item in document]
    if not isinstance(document, dict):
        return document
    match document.get(_KIND):
        case None:
            return {key: _decode(item) for key, item in document.items()}
        case "tuple":
            return tuple(_decode(document["items"]))
        case "checkpoint":
            return PyTorchCheckpoint.from_dict(document["reference"])
        case "dataclass":
            return _find(str(document["class"]))(**_decode(document["fields"]))
        case other:
            raise ValueError(f"{_KIND} is {other!r:.80}")


def _find(name: str) -> Any:
    """Return a dataclass by the name of its module, a colon, and its own; nothing is imported for it.

    Raises:
        LookupError: there is none in the modules that are imported.
    """
    module, _, path = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in path.split("."):
        found = getattr(found, "__dict__", {}).get(part)
    if not (isinstance(found, type) and is_dataclass(found)):
        raise LookupError(f"no dataclass {name!r:.200} in the modules that are imported")
    return found


def _identity(checkpoint: PyTorchCheckpoint) -> Any:
    """Return what a checkpoint is the same as in a cache key, wherever it lies: what was saved, by its digest.

    One that was never saved is equal to no other: its tensors are not looked at.
    """
    if checkpoint.url is None and not (checkpoint.module is None and checkpoint.optimizer is None):
        return {"never saved": uuid.uuid4().hex}
    reference = checkpoint.to_dict()
    return {"digest": reference["digest"]} if checkpoint.url else reference


STABLE_TRANSFORMS[PyTorchCheckpoint] = _identity
