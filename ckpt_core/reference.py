"""What a checkpoint's JSON says of its state: where it lies in a store, and what it is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Any, ClassVar

from ckpt_core.errors import ArgumentError
from ckpt_core.format.index import Index, read_index
from ckpt_core.store import Checkpoint


@dataclass(frozen=True)
class Reference:
    """Where a checkpoint's state lies, and what it is, in JSON types."""

    url: str
    run: str
    step: int
    digest: str
    """The manifest's digest, which covers every file's."""

    module: dict[str, Any] | None
    """`class`, and of its tensors `count`, `elements`, `bytes` and elements by `dtypes`."""

    optimizer: dict[str, Any] | None
    """`class`."""

    EMPTY: ClassVar[dict[str, Any]] = dict.fromkeys(("url", "run", "step", "digest", "module", "optimizer"))

    @classmethod
    def parse(cls, document: Mapping[str, Any]) -> Reference:
        """Read it from a checkpoint's JSON object.

        Raises:
            ArgumentError (a ValueError): something is missing or of another type.
        """
        expected = {"url": str, "run": str, "step": int, "digest": str}
        for name, kind in expected.items():
            if not isinstance(document.get(name), kind):
                raise ArgumentError(f"{name}: expected {kind.__name__}, found {document.get(name)!r}; not a reference.")
        for name in ("module", "optimizer"):
            if not isinstance(document.get(name), (dict, NoneType)):
                raise ArgumentError(f"{name}: expected an object or null, found {document.get(name)!r}.")
        fields: dict[str, Any] = {name: document.get(name) for name in cls.EMPTY}
        return cls(**fields)


def refer(checkpoint: Checkpoint) -> Reference:
    """Return the reference to a committed step."""
    manifest = checkpoint.manifest
    model = checkpoint.component("model")
    return Reference(
        url=checkpoint.url,
        run=manifest.run,
        step=manifest.step,
        digest=manifest.digest(),
        module=None if model is None else {"class": manifest.module, "tensors": _summarize(read_index(model))},
        optimizer=None if checkpoint.component("optimizer") is None else {"class": manifest.optimizer},
    )


def _summarize(index: Index) -> dict[str, Any]:
    dtypes: dict[str, int] = {}
    for entry in index.tensors.values():
        dtypes[entry.dtype] = dtypes.get(entry.dtype, 0) + math.prod(entry.shape)
    return {
        "count": len(index.tensors),
        "elements": sum(dtypes.values()),
        "bytes": index.nbytes,
        "dtypes": dict(sorted(dtypes.items())),
    }
