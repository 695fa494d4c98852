"""The nested state dict that flat names stood in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from ckpt_core.errors import DamagedError
from ckpt_core.format.index import Keys

_MAX_HOLES = 16  # DCP leaves empty dicts in lists out; a number in a path must not make a list of any length
_MAX_DEPTH = 200  # no state is so deep; deeper ones would exhaust the interpreter's stack


class _Node(dict[str | int, Any]):
    """A dict or, where its keys are numbers, a list."""


def nest(flat: Mapping[str, Any], paths: Mapping[str, Keys], where: str) -> dict[str, Any]:
    """Return the nested dict in which each value stands at its path, or at its name where it has none.

    Raises:
        DamagedError: two paths contradict each other.
    """
    root = _Node()
    for name, value in flat.items():
        *parents, last = paths.get(name, (name,))
        if len(parents) > _MAX_DEPTH:
            raise DamagedError(
                f"{where}: {name:.80} lies {len(parents)} levels deep, expected at most {_MAX_DEPTH}; restore a copy "
                "of the checkpoint."
            )
        node = root
        for key in parents:
            node = node.setdefault(key, _Node())
            if not isinstance(node, _Node):
                raise DamagedError(f"{where}: {name} lies inside a value; restore a copy of the checkpoint.")
        if last in node:
            raise DamagedError(f"{where}: {name} has the place of something else; restore a copy of the checkpoint.")
        node[last] = value
    if any(isinstance(key, int) for key in root):
        raise DamagedError(f"{where}: its names stand in no dict; restore a copy of the checkpoint.")
    return cast("dict[str, Any]", _plain(root, where))


def _plain(node: Any, where: str) -> Any:
    if not isinstance(node, _Node):
        return node
    items = {key: _plain(value, where) for key, value in node.items()}
    numbers = [key for key in items if isinstance(key, int)]
    if not numbers:
        return items
    length = max(numbers) + 1
    if len(numbers) < len(items) or length > 2 * len(items) + _MAX_HOLES:
        raise DamagedError(f"{where}: a list of {length} with {len(items)} items; restore a copy of the checkpoint.")
    return [items.get(number, {}) for number in range(length)]
