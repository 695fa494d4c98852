"""When a task need not run again: a cache policy, and what names a checkpoint or export without reading its bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect.cache_policies import CachePolicy

from ckpt_core import open_checkpoint
from ckpt_core.errors import CkptError
from ckpt_core.store import objects
from ckpt_core.urls import place_of
from tasks import provenance

if TYPE_CHECKING:
    from prefect.context import TaskRunContext

    from ckpt_core.urls import Place


def _always(_: Any) -> bool:
    return True


@dataclass(kw_only=True)
class ByContent(CachePolicy):
    """Finds what an earlier task run returned for equal content, as long as that still holds.

    Neither flow runs nor machines count, only what decides the result, and the versions of the libraries that make it.
    Prefect takes an earlier result by its key alone; so where the one that was found does not hold any more, as its
    checkpoint was deleted, the key is another one: the task runs, and what it then returns is found by the next.
    """

    name: str
    """Begins the names of the files in the result storage; tasks that share it, and return alike, share results."""

    content: Callable[..., Any]
    """Called with the task's parameters; returns what decides the result, of JSON types. What it raises about a
    checkpoint or export is left to the task to say, which then runs."""

    holds: Callable[[Any], bool] = _always
    """Called with an earlier result; returns whether what it tells of is still there, and is the same."""

    def compute_key(
        self,
        task_ctx: TaskRunContext,
        inputs: dict[str, Any],
        flow_parameters: dict[str, Any],  # noqa: ARG002 - the interface
        **_: Any,
    ) -> str | None:
        """Return the key of the earlier result that holds, or else the first one that has none; None for no caching."""
        try:
            content = self.content(**inputs)
        except (CkptError, OSError):
            return None
        key = f"{self.name}-{_digest([content, _libraries()])}"
        store = task_ctx.result_store
        for number in count():
            numbered = f"{key}-{number}"
            if not store.exists(numbered) or self._holds(store.read(numbered).result):
                return numbered
        return None

    def _holds(self, result: Any) -> bool:
        try:
            return self.holds(result)
        except (CkptError, OSError):
            return False


@cache  # looking them up takes longer than all the rest
def _libraries() -> dict[str, str]:
    return provenance.libraries()


def checkpoint_identity(url: str) -> dict[str, Any]:
    """Return what names a committed step and its files as they lie there: a file that was written again is another.

    Raises:
        NotACheckpointError: there is no committed step.
        DamagedError: its manifest is damaged, or a file is missing or has another size.
    """
    checkpoint = open_checkpoint(url)
    manifest = checkpoint.manifest
    return {"digest": manifest.digest(), "files": _as_they_lie(checkpoint.root, manifest.files)}


def export_identity(path: str) -> dict[str, Any]:
    """Return what names an export and its files as they lie there: a file that was written again is another.

    Raises:
        NotACheckpointError: there is no export.
        DamagedError: its record is damaged, or a file is missing or has another size.
    """
    from ckpt_core.export import EXPORT_NAME, read_export

    export = read_export(place_of(path))
    return {
        "source": dict(export.source),
        "made": {name: dict(record) for name, record in export.files.items()},
        "files": _as_they_lie(export.path, [EXPORT_NAME, *export.files]),
    }


def _as_they_lie(root: Place, names: Iterable[str]) -> str:
    """Return a digest of what a file system tells of files, so that none has to be read: size, time, version."""
    if isinstance(root, Path):
        told = {name: [status.st_size, status.st_mtime_ns] for name in names for status in [(root / name).stat()]}
    else:
        entries = objects.entries_below(root)
        told = {name: sorted((key, str(value)) for key, value in entries.get(name, {}).items()) for name in names}
    return _digest(told)


def _digest(document: Any) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
