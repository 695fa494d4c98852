"""A note that somebody is at a conversion to an object store, which has no locks: it expires, and is renewed."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ckpt_core.errors import CommitError
from ckpt_core.store import objects, records

if TYPE_CHECKING:
    from upath import UPath


class Note:
    """A note, in a directory of notes, that somebody is at a conversion whose plan has this key."""

    def __init__(self, directory: UPath, key: str) -> None:
        self._directory = directory
        self._record = records.write(directory, key, records.LOCK_S)

    def renew(self) -> None:
        """Make it last on, when half of its time is over.

        Raises:
            CommitError: it did not last, so somebody else may have begun another conversion.
        """
        if self._record.expiry - time.time() < records.LOCK_S / 2:
            self.check()
            old, self._record = self._record, records.write(self._directory, self._record.key, records.LOCK_S)
            old.delete()

    def check(self) -> None:
        """Check that it lasts.

        Raises:
            CommitError: it does not.
        """
        if not (self._record.live and objects.exists(self._record.place)):
            raise CommitError(
                f"{self._directory.parent}: the conversion was finished or given up, or nothing could be written for "
                f"{records.LOCK_S // 60} minutes. Convert again: finished files are not written again."
            )

    def delete(self) -> None:
        """Take it back."""
        self._record.delete()


@contextmanager
def noted(directory: UPath, key: str) -> Generator[Note]:
    """Leave a note meanwhile."""
    note = Note(directory, key)
    try:
        yield note
    finally:
        note.delete()


def check_alone(directory: UPath, key: str) -> None:
    """Check that nobody is at a conversion with another plan.

    Raises:
        CommitError: somebody is, or died shortly ago.
    """
    others = [record for record in records.records_in(directory) if record.live and record.key != key]
    if others:
        until = time.strftime("%H:%M:%S UTC", time.gmtime(max(record.expiry for record in others)))
        raise CommitError(
            f"{directory.parent}: somebody converts to the same place, with other settings or another checkpoint; wait "
            f"for the end, or if that process is dead, until {until}."
        )
