"""Deletions that take time: done at once or on a thread, with what went wrong kept until somebody asks."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from typing import TYPE_CHECKING

from ckpt_core.errors import CheckpointError

if TYPE_CHECKING:
    from ckpt_core.urls import Place

_log = logging.getLogger(__name__)


class Deletions:
    """The deletions of one store; what fails is logged too, and left for the next prune."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._running: list[tuple[Place, Future[str | None]]] = []

    def begin(self, place: Place, delete: Callable[[], None]) -> None:
        """Delete on the store's thread, which a program waits for before it ends."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ckpt-delete")
        self._running.append((place, self._pool.submit(attempt, place, delete)))

    def wait(self) -> tuple[str, ...]:
        """Wait for all that began; return what went wrong, once."""
        wait_for([future for _, future in self._running])  # who interrupts this can wait again
        running, self._running = self._running, []
        return tuple(error for place, future in running if (error := _outcome(place, future)) is not None)


def attempt(place: Place, delete: Callable[[], None]) -> str | None:
    """Delete, and return what went wrong, as a sentence."""
    try:
        delete()
    except (OSError, CheckpointError) as error:
        return not_deleted(place, error)
    return None


def not_deleted(place: Place, error: BaseException) -> str:
    """Log that something was not deleted, and return that as a sentence."""
    message = f"{place}: not deleted ({error}); the next prune of the run tries again."
    _log.warning("%s", message)
    return message


def _outcome(place: Place, future: Future[str | None]) -> str | None:
    """Return what went wrong with a deletion that is over: also where that was not foreseen, for the others' sake."""
    error = future.exception()
    return future.result() if error is None else not_deleted(place, error)
