"""What pruning is in any store: a policy over facts, then one step after the other taken away."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping

from ckpt_core.errors import CheckpointError, NotACheckpointError
from ckpt_core.retention import Retention, StepFacts, kept
from ckpt_core.store.checkpoint import Checkpoint
from ckpt_core.store.deletions import Deletions, attempt, not_deleted
from ckpt_core.store.names import CHAMPION
from ckpt_core.store.protocol import Pruned

_log = logging.getLogger(__name__)

Bury = Callable[[Checkpoint], Callable[[], None] | None]
"""Makes a step no checkpoint any more and returns what frees its bytes; None where somebody reads or pinned it.

Raises:
    NotACheckpointError: another pruner was faster.
"""


def given_up(
    present: Iterable[int], whole: list[Checkpoint], retention: Retention, pins: Mapping[str, int]
) -> list[Checkpoint]:
    """Return those of the whole steps that the policy does not keep, oldest first."""
    by_step = {checkpoint.step: checkpoint for checkpoint in whole}
    facts = [StepFacts(step, checkpoint.manifest.metrics) for step, checkpoint in by_step.items()]
    facts += [StepFacts(step, valid=False) for step in set(present) - set(by_step)]
    keep = kept(facts, retention, pinned=set(pins.values()), champion=pins.get(CHAMPION))
    return [checkpoint for step, checkpoint in sorted(by_step.items()) if step not in keep]


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
