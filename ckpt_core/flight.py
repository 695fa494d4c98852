"""One step on its way into a store: written by a thread, and given up if that takes too long."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from ckpt_core.errors import CkptError, CommitError

T = TypeVar("T")

_NAMING_S = 30.0
"""How long a commit may take that has begun already when time is up: it can no longer be given up."""

_log = logging.getLogger(__name__)


class Flight(Generic[T]):
    """Runs `write` in a thread of its own; what it returns is then `committed`.

    Args:
        what: names the step in messages.
        write: writes and commits; calls its argument right before the commit, on every rank, and commits on none if
            one of these calls raised.
    """

    def __init__(self, what: str, write: Callable[[Callable[[], None]], T]) -> None:
        self.committed: T | None = None
        self._what = what
        self._error: BaseException | None = None
        self._deciding = threading.Lock()
        self._permitted = self._given_up = False
        self._began = time.monotonic()
        # A daemon: at the end of the process it is waited for within a bound, not for ever.
        self._thread = threading.Thread(target=self._run, args=(write,), name=f"save {what}", daemon=True)
        self._thread.start()

    def join(self, timeout: float | None = None) -> None:
        """Wait for the end, at most `timeout` seconds."""
        self._thread.join(timeout)

    def give_up(self) -> None:
        """Prevent the commit, if there is still something to prevent."""
        with self._deciding:
            if self._thread.is_alive() and not self._permitted:
                self._given_up = True

    def outcome(self) -> bool:
        """Return whether the step is committed; False means that it is just being given its name.

        What is not that far is given up.

        Raises:
            CommitError: it was given up, or it failed.
        """
        self.give_up()
        if self._given_up:
            seconds = time.monotonic() - self._began
            raise CommitError(
                f"{self._what}: not committed: given up {seconds:.1f} s after it was begun, as time was up; the steps "
                "before it are untouched. Give `timeout` more seconds, or the store more speed."
            )
        if self._thread.is_alive():
            return False
        if self._error is not None:
            raise CommitError(self._explain(self._error)) from self._error
        return True

    def named(self) -> bool:
        """Wait for the end of a commit that has begun, and return whether the step is committed: True.

        Raises:
            CommitError: it failed, or did not end.
        """
        self._thread.join(_NAMING_S)
        if not self.outcome():
            raise CommitError(
                f"{self._what}: may be committed or not: all of it was written, and giving it its name did not end in "
                f"{_NAMING_S:.0f} s. See `ckpt list` of the store."
            )
        return True

    def end(self) -> None:
        """Give up what can still be given up, and see the rest through.

        Raises:
            CommitError: the step is not committed, or not surely.
        """
        if not self.outcome():
            self.named()

    def _run(self, write: Callable[[Callable[[], None]], T]) -> None:
        try:
            self.committed = write(self._permit)
            _log.info("%s: committed %.3f s after it was copied", self._what, time.monotonic() - self._began)
        except BaseException as error:  # noqa: BLE001 - told by `outcome`
            self._error = error
            _log.error("%s", self._explain(error))

    def _permit(self) -> None:
        """Let the commit go on, unless it was given up."""
        with self._deciding:
            if self._given_up:
                raise CommitError(f"{self._what}: given up before it was committed.")
            self._permitted = True

    def _explain(self, error: BaseException) -> str:
        if isinstance(error, CkptError):
            return f"{self._what}, saved in the background: {error}"
        certainly = "not committed" if not self._permitted else "not surely committed (see `ckpt list` of the store)"
        return f"{self._what}: {certainly}: {type(error).__name__}: {error}; remove the cause, then save the next step."
