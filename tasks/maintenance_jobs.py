"""What maintenance reads bytes for: a job of `tasks.jobs`, in a child process of its own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckpt_core import open_checkpoint, open_store
from ckpt_core.errors import DamagedError, NotACheckpointError
from ckpt_core.store import CHAMPION, parse_step, step_name
from ckpt_core.urls import place_of

if TYPE_CHECKING:
    from ckpt_core.store import Store
    from ckpt_core.urls import Place

Request = dict[str, Any]


def verify_runs(request: Request) -> dict[str, Any]:
    """Read a share of the newest checkpoints of each run of a store, and of its champion; of others, look at the sizes.

    What is looked for is damage: NaN and Inf, or a config that it does not fit, may be in a checkpoint as it was saved.

    Args:
        request: `store`, a path or URL; `newest`, how many of each run; `share` of the chunks to read, above 0 and at
            most 1; `seed`, which ones.

    Returns:
        `checkpoints`: each one's `run` and `step`, whether its bytes were `read`, and `problems`, sentences, none where
        it is sound.
    """
    store = open_store(request["store"])
    found = [checkpoint for run in store.runs() for checkpoint in _verify_run(store, run, request)]
    return {"checkpoints": found}


def _verify_run(store: Store, run: str, request: Request) -> Iterator[dict[str, Any]]:
    directory, champion = place_of(store.url) / run, _champion(store, run)
    steps = {step for path in directory.iterdir() if (step := parse_step(path.name)) is not None}
    newest = sorted(steps, reverse=True)[: request["newest"]]
    for step in sorted(steps if champion is None else {*steps, champion}, reverse=True):
        place, read = directory / step_name(step), step in newest or step == champion
        problems = _problems(place, request["share"] if read else None, request["seed"], pinned=step == champion)
        if problems is not None:
            yield {"run": run, "step": step, "read": read, "problems": problems}
            if read or problems:
                sys.stdout.write(f"{place}: {'damaged' if problems else 'sound'}\n")
                sys.stdout.flush()


def _champion(store: Store, run: str) -> int | None:
    with suppress(DamagedError):  # a pin that is damaged is told by whoever tidies
        return store.pins(run).get(CHAMPION)
    return None


def _problems(place: Place, share: float | None, seed: int, *, pinned: bool) -> list[str] | None:
    """Return what is wrong with a step; None if it is none: in an object store being written, or pruned meanwhile."""
    from ckpt_core.verify import verify

    try:
        open_checkpoint(place)
        checks = verify(place, allow_nonfinite=True, sample=share, seed=seed).checks if share is not None else ()
    except DamagedError as error:
        return [str(error)]
    except NotACheckpointError as error:
        lost = pinned or (isinstance(place, Path) and place.exists())
        return [str(error)] if lost else None
    return [f"{check.name}: {check.detail}" for check in checks if not check.passed and check.name != "architecture"]
