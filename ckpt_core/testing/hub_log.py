"""What a local Hub server was asked, and how many bytes went each way."""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import attrgetter

from starlette.types import ASGIApp, Message, Receive, Scope, Send

OnRequest = Callable[[str, str, int], None]
_LONGEST = 100_000  # requests that are remembered: a server may run for weeks


@dataclass(frozen=True)
class LoggedRequest:
    """One request; `received` and `sent` count the bytes of its body and of the answer's, without headers.

    The body of a request that is refused unread counts nothing. `status` is None where the connection was cut before an
    answer began; `path` is without the query.
    """

    number: int
    method: str
    path: str
    status: int | None
    received: int
    sent: int


class RequestLog:
    """The newest requests in the order of their arrival, each noted when its answer ends. Any thread may use it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: deque[LoggedRequest] = deque(maxlen=_LONGEST)
        self._arrived = 0

    def __iter__(self) -> Iterator[LoggedRequest]:
        with self._lock:
            return iter(sorted(self._requests, key=attrgetter("number")))

    def __len__(self) -> int:
        return len(self._requests)

    def clear(self) -> None:
        """Forget all requests that are answered."""
        with self._lock:
            self._requests.clear()

    def arrival(self) -> int:
        """Return the number of a request that arrives now; the first is 1."""
        with self._lock:
            self._arrived += 1
            return self._arrived

    def append(self, request: LoggedRequest) -> None:
        """Remember a request."""
        with self._lock:
            self._requests.append(request)


class Recorded:
    """An application of which every request is logged, and told to a callback as soon as its status is known."""

    def __init__(self, app: ASGIApp, log: RequestLog, on_request: OnRequest | None) -> None:
        self._app = app
        self._log = log
        self._on_request = on_request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        tally = _Tally(self._log.arrival(), scope["method"], scope["path"])

        async def counted_receive() -> Message:
            message = await receive()
            tally.received += len(message.get("body", b""))
            return message

        async def counted_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                tally.status = message["status"]
                if self._on_request is not None:
                    self._on_request(tally.method, tally.path, message["status"])
            elif scope["method"] != "HEAD":
                tally.sent += len(message.get("body", b""))
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                self._note(tally)  # before the client has it all: who reads the log then finds the request
            await send(message)

        try:
            await self._app(scope, counted_receive, counted_send)
        finally:
            self._note(tally)

    def _note(self, tally: "_Tally") -> None:
        if not tally.noted:
            tally.noted = True
            self._log.append(tally.request())


@dataclass
class _Tally:
    number: int
    method: str
    path: str
    status: int | None = None
    received: int = 0
    sent: int = 0
    noted: bool = False

    def request(self) -> LoggedRequest:
        return LoggedRequest(self.number, self.method, self.path, self.status, self.received, self.sent)
