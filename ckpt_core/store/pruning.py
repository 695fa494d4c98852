"""Pruning in any store: choose by a policy, make sure that a sound step stays, then delete one after the other."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from ckpt_core import locks
from ckpt_core.errors import CheckpointError, DamagedError, NotACheckpointError
from ckpt_core.retention import Retention, StepFacts, check_metric, kept
from ckpt_core.store.checkpoint import Checkpoint, check_digests
from ckpt_core.store.deletions import Deletions, attempt, not_deleted
from ckpt_core.store.names import CHAMPION
from ckpt_core.store.protocol import Pruned

_log = logging.getLogger(__name__)

Bury = Callable[[Checkpoint], Callable[[], None] | None]
"""Makes a step no checkpoint any more and returns what frees its bytes; None where somebody reads or pinned it.

Raises:
    NotACheckpointError: another pruner was faster.
"""


@dataclass(frozen=True)
class Plan:
    """What a prune is to do."""

    old: list[Checkpoint]
    """The steps to delete, oldest first."""

    errors: tuple[str, ...]
    """Which steps are not sound, in sentences: they stay, and do not count."""


def plan(present: Iterable[int], whole: list[Checkpoint], retention: Retention, pins: Mapping[str, int]) -> Plan:
    """Choose the steps to delete. If there are any, the newest that stays has been read, and is sound.

    Args:
        present: the numbers of all steps of the run, whatever their state.
        whole: those that have all their files, in their sizes.
        retention: what stays.
        pins: what stays, too.

    Raises:
        ArgumentError: the steps cannot be ranked by the policy's metric.
    """
    by_step = {checkpoint.step: checkpoint for checkpoint in whole}
    others, unsound = set(present) - set(by_step), dict[int, str]()
    pinned, champion = set(pins.values()), pins.get(CHAMPION)
    while True:
        facts = [StepFacts(step, checkpoint.manifest.metrics) for step, checkpoint in by_step.items()]
        check_metric(facts, retention)
        facts += [StepFacts(step, valid=False) for step in (*others, *unsound)]
        keep = kept(facts, retention, pinned=pinned, champion=champion)
        old = [by_step[step] for step in sorted(by_step) if step not in keep]
        if not old:
            return Plan([], tuple(unsound.values()))
        newest = max(by_step)
        try:
            check_digests(by_step[newest])
        except NotACheckpointError:  # pruned by somebody else
            del by_step[newest]
        except (DamagedError, OSError) as error:
            if isinstance(error, OSError) and error.errno in locks.UNSUPPORTED:  # so nothing can be pruned
                raise
            del by_step[newest]
            unsound[newest] = f"step {newest} was not found to be sound, so older steps stay in its place: {error}"
            _log.warning("%s", unsound[newest])
        else:
            return Plan(old, tuple(unsound.values()))


def take_away(checkpoints: list[Checkpoint], bury: Bury, deletions: Deletions, *, background: bool) -> Pruned:
    """Bury each step, and free its bytes now or in the background; what goes wrong with one does not stop the rest."""
    deleted: list[int] = []
    leased: list[int] = []
    errors: list[str] = []
    for checkpoint in checkpoints:
        try:
            free = bury(checkpoint)
        except NotACheckpointError:
            continue
        except (OSError, CheckpointError) as error:
            errors.append(not_deleted(checkpoint.path, error))
            continue
        if free is None:
            _log.warning("%s: being read, or pinned just now, so not deleted", checkpoint.path)
            leased.append(checkpoint.step)
            continue
        deleted.append(checkpoint.step)
        if background:
            deletions.begin(checkpoint.path, free)
        elif error := attempt(checkpoint.path, free):
            errors.append(error)
    return Pruned(tuple(deleted), tuple(leased), tuple(errors))
