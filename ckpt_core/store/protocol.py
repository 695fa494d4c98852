"""What a store does, whatever it is made of; `ckpt_core.testing.store_contract` tests it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from ckpt_core.format.manifest import Manifest
    from ckpt_core.retention import Retention
    from ckpt_core.store.checkpoint import Checkpoint
    from ckpt_core.urls import Place


@dataclass(frozen=True)
class Pruned:
    """What became of the steps that a policy did not keep."""

    deleted: tuple[int, ...] = ()
    """Those that are checkpoints no more, oldest first."""

    leased: tuple[int, ...] = ()
    """Those that somebody reads, or pinned meanwhile: they stay until the next time."""

    errors: tuple[str, ...] = ()
    """What went wrong, in sentences, and which steps are not sound. Of a deletion in the background, see `wait`."""


class Staging(Protocol):
    """A step that is being written."""

    @property
    def path(self) -> Place:
        """The directory to write its files below."""
        ...

    @property
    def target(self) -> Place:
        """Where the committed step will be."""
        ...

    def commit(self, manifest: Manifest) -> Checkpoint:
        """Write the manifest last, and so make it a step, all at once.

        Raises:
            StepExistsError: the step was committed meanwhile; nothing was changed.
            CommitError: it was not committed, or may not survive; the message says which.
        """
        ...


class Store(Protocol):
    """Committed steps by run; `LocalStore` keeps them in a directory, `RemoteStore` in an object store."""

    @property
    def url(self) -> str:
        """Where the store is."""
        ...

    def runs(self) -> list[str]:
        """Return the names of the runs that have a committed step, sorted; unreadable ones are left out and logged."""
        ...

    def list(self, run: str) -> list[Checkpoint]:
        """Return the committed steps of a run, oldest first; damaged and unreadable ones are left out and logged."""
        ...

    def latest(self, run: str) -> Checkpoint | None:
        """Return the newest committed step of a run that is all there, or None."""
        ...

    def stage(self, run: str, step: int) -> Staging:
        """Begin to write a step; what dead writers left is removed.

        Raises:
            StepExistsError: the step is committed already.
        """
        ...

    def release(self, staging: Staging) -> None:
        """End what `stage` began; without a commit, nothing of it stays. Raises no OSError: the outcome stands."""
        ...

    def prune(self, run: str, retention: Retention, *, background: bool = False, dry_run: bool = False) -> Pruned:
        """Delete the steps of a run that the policy does not keep and nobody reads, and debris.

        The newest sound step, pinned ones, damaged and unreadable ones always stay. Before anything is deleted, the
        newest step that stays is read; if its bytes are not those of its digests it does not count, and the next
        older one is read.

        Args:
            run: the run.
            retention: what stays besides.
            background: take the steps away now, and free their bytes on a thread; `wait` tells how that went.
            dry_run: delete nothing, and return what would be deleted if nobody reads it.

        Raises:
            ArgumentError: the steps cannot be ranked by the policy's metric; nothing was deleted.
            DamagedError: a pin does not name a step; nothing was deleted.
        """
        ...

    def wait(self) -> tuple[str, ...]:
        """Wait for deletions in the background; return what went wrong with them since the last call, in sentences."""
        ...

    def pin(self, run: str, name: str, step: int) -> None:
        """Give a committed step a name, which keeps it; a pin of that name moves. The champion's is `champion`.

        Raises:
            NotACheckpointError: the step is not committed.
        """
        ...

    def unpin(self, run: str, name: str) -> None:
        """Take a pin away.

        Raises:
            ArgumentError: the run has no pin of that name.
        """
        ...

    def pins(self, run: str) -> dict[str, int]:
        """Return the steps of a run that have a name, by that.

        Raises:
            DamagedError: a pin does not name a step.
        """
        ...

    def repair(self, run: str, *, dry_run: bool = False) -> list[str]:
        """Remove debris, and set damaged steps aside as `.damaged-...`, whole, so that they can be saved again.

        Returns:
            What was done, in sentences; with `dry_run` what would be done, and nothing changes.
        """
        ...
