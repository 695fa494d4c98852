"""What is left in a run's directory when its time is over: abandoned conversions, and exports of steps that are gone.

    <store>/<run>/exports/.converting-<name>/   a conversion under way, or one that was killed and that nobody took up
    <store>/<run>/exports/<name>/               an export; export.json tells the step that it was made of

Both are looked for in stores in a directory; an object store's own rules of expiry do the same there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

from ckpt_core import durable
from ckpt_core.errors import CommitError
from ckpt_core.store import step_name
from ckpt_core.store.names import DAMAGED
from ckpt_core.urls import place_of

_CONVERTING = ".converting-"


def clear_conversions(store: str, run: str, idle_s: float) -> list[str]:
    """Delete what was written of conversions that nobody is at, and of which nothing was written for `idle_s` seconds.

    Returns:
        What was done, in sentences.
    """
    from ckpt_core.export import abandon_conversion

    done: list[str] = []
    for work in _exports(store, run):
        if work.name.startswith(_CONVERTING) and work.is_dir() and _idle_s(work) > idle_s:
            try:
                abandon_conversion(work.with_name(work.name.removeprefix(_CONVERTING)))
            except CommitError:  # somebody took it up this moment
                continue
            done.append(f"{work}: removed; nobody had gone on with this conversion for {idle_s / 3600:g} hours.")
    return done


def clear_exports(store: str, run: str) -> list[str]:
    """Delete the exports of steps that are gone; of a step that was set aside as damaged it may be the last copy.

    Returns:
        What was done, in sentences.
    """
    done: list[str] = []
    for export in _exports(store, run):
        step = _source_step(export, run)
        if step is not None and not _is_there(export.parent.parent, step):
            durable.remove_tree(export)
            export.with_name(f"{export.name}.settings.json").unlink(missing_ok=True)
            done.append(f"{export}: removed; the checkpoint that it was made of is gone.")
    return done


def _exports(store: str, run: str) -> Iterator[Path]:
    """Yield what is in the directory of a run's exports."""
    directory = place_of(store) / run / "exports"
    if isinstance(directory, Path) and directory.is_dir():
        yield from sorted(directory.iterdir())


def _idle_s(directory: Path) -> float:
    """Return the seconds since anything below a directory was written."""
    newest = max(path.stat().st_mtime for path in (directory, *directory.rglob("*")))
    return time.time() - newest


def _source_step(export: Path, run: str) -> int | None:
    """Return the step of this run that an export was made of; None if it is no export, or one of another run."""
    from ckpt_core.export import EXPORT_NAME

    try:
        source = json.loads((export / EXPORT_NAME).read_bytes())["source"]
        return int(source["step"]) if source["run"] == run else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _is_there(run: Path, step: int) -> bool:
    """Whether a run has a step, or one that was set aside."""
    name = step_name(step)
    return (run / name).exists() or any(run.glob(f"{DAMAGED}{name}-*"))
