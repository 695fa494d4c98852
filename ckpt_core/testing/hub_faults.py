"""Faults that a local Hub server commits on purpose, so that a pipeline can be tested against each.

faults = Faults()
with hub_server("hub", faults=faults) as server:
    faults.add(Fault(kind="lost", on=lambda method, path: "/commit/" in path))
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from ckpt_core.errors import ArgumentError

_ERRORS = range(400, 600)


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One thing that goes wrong with the requests that it strikes.

    What goes wrong, by `kind`:

    - `status`: the answer is the error `status` (by default 503), with `Retry-After` where `retry_after` gives seconds;
      nothing was done.
    - `delay`: nothing is done for `seconds`, and nothing at all if the client has gone by then.
    - `cut`: the connection ends, before anything was done; with `body="request"` when `at` bytes of the request's body
      had come, with `body="response"` when `at` bytes of the answer's body had gone.
    - `lost`: the request is carried out and its answer is lost: the connection ends, or `status` is answered instead.
    - `flip`: the byte at `at` of the `body`, the request's or the response's, arrives with all its bits turned; a body
      that is shorter stays whole.

    `on` is the number of the request to strike, 1 for the next after the fault was added, or a predicate of method and
    path. A fault strikes `times` requests that are due, one after the other. Raises ArgumentError where these do not
    fit together.
    """

    kind: Literal["status", "delay", "cut", "lost", "flip"]
    on: int | Callable[[str, str], bool] = 1
    times: int = 1
    status: int | None = None
    retry_after: float | None = None
    seconds: float = 0
    body: Literal["request", "response"] | None = None
    at: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.on, int) and self.on < 1:
            raise ArgumentError(f"on={self.on}: requests are counted from 1, the next one")
        if self.times < 1:
            raise ArgumentError(f"times={self.times}: a fault strikes at least once")
        if self.status is not None and self.status not in _ERRORS:
            raise ArgumentError(f"status={self.status} is no error; choose one from {_ERRORS[0]} to {_ERRORS[-1]}")
        if self.kind == "flip" and self.body is None:
            raise ArgumentError("a flipped byte needs body='request' or body='response', to say in which body it is")
        if self.at < 0 or self.seconds < 0:
            raise ArgumentError(f"at={self.at}, seconds={self.seconds}: neither can be negative")


@dataclass(frozen=True)
class Strike:
    """A fault, and the request that it struck."""

    fault: Fault
    method: str
    path: str


class Faults:
    """The faults that are still to come, to be changed at any time and from any thread, also while the server runs."""

    def __init__(self, *faults: Fault) -> None:
        self._lock = threading.Lock()
        self._waiting: list[_Waiting] = []
        self._struck: list[Strike] = []
        self.add(*faults)

    def add(self, *faults: Fault) -> None:
        """Let these strike too; where several are due for one request, the one added first does, and it alone."""
        with self._lock:
            self._waiting += [_Waiting(fault, fault.times) for fault in faults]

    def clear(self) -> None:
        """Let nothing strike any more, and forget what struck."""
        with self._lock:
            self._waiting.clear()
            self._struck.clear()

    @property
    def struck(self) -> list[Strike]:
        """What struck so far, in order."""
        with self._lock:
            return list(self._struck)

    def strike(self, method: str, path: str) -> Fault | None:
        """Return the fault that strikes this request, if one does."""
        with self._lock:
            due = [waiting for waiting in self._waiting if waiting.due(method, path)]
            if not due:
                return None
            due[0].left -= 1
            self._waiting = [waiting for waiting in self._waiting if waiting.left]
            self._struck.append(Strike(due[0].fault, method, path))
            return due[0].fault


@dataclass
class _Waiting:
    fault: Fault
    left: int
    seen: int = 0

    def due(self, method: str, path: str) -> bool:
        self.seen += 1
        if isinstance(self.fault.on, int):
            return self.seen >= self.fault.on
        return self.fault.on(method, path)
