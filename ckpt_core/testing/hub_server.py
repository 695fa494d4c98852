"""A local Hub server: the real protocol over HTTP on loopback, its repositories in a directory.

with hub_server("hub") as server:
    HfApi(endpoint=server.endpoint).create_repo("team/model")
    print(sum(request.received for request in server.requests), "bytes sent")
"""

import errno
import signal
import socket
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from ckpt_core.errors import ArgumentError
from ckpt_core.testing.hub_app import create_app
from ckpt_core.testing.hub_faults import Faults
from ckpt_core.testing.hub_log import OnRequest, Recorded, RequestLog
from ckpt_core.testing.hub_wire import Cuttable, Faulty
from ckpt_core.urls import local_path

_HOST = "127.0.0.1"
_HIGHEST_PORT = 65535
_GRACE_SECONDS = 5


@dataclass(frozen=True)
class HubServer:
    """A running server: where it answers, where it keeps its repositories, and what it was asked."""

    endpoint: str
    directory: Path
    requests: RequestLog


def serve(
    directory: str | PathLike[str],
    *,
    port: int = 0,
    ready: Callable[[HubServer], None] | None = None,
    faults: Faults | None = None,
    on_request: OnRequest | None = None,
    **options: Any,
) -> None:
    """Serve the repositories in `directory` until SIGTERM or SIGINT, then finish open requests and return.

    `port` 0 takes a free one; `ready` is called once, when connections are accepted. `faults` are committed as planned,
    and `on_request` is told method, path and status of each answer before it goes. `options` are those of
    `hub_app.create_app`: `token`, `read_only_token`, `xet`, `part_size`, `page_size`. Call it in the main thread.
    Raises ArgumentError where the port cannot be had.
    """
    place = local_path(directory, "directory")
    with _listening(port) as listener:
        log = RequestLog()
        server = _server(create_app(place, **options), log, faults, on_request)
        with _stopped_by_signals(server):
            if ready is not None:
                ready(HubServer(_endpoint(listener), place, log))
            server.run(sockets=[listener])


@contextmanager
def hub_server(
    directory: str | PathLike[str],
    *,
    port: int = 0,
    faults: Faults | None = None,
    on_request: OnRequest | None = None,
    **options: Any,
) -> Generator[HubServer]:
    """Serve the repositories in `directory` from a thread while the block runs; options as for `serve`."""
    place = local_path(directory, "directory")
    with _listening(port) as listener:
        log = RequestLog()
        server = _server(create_app(place, **options), log, faults, on_request)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="local Hub")
        thread.start()
        try:
            yield HubServer(_endpoint(listener), place, log)
        finally:
            server.should_exit = True
            thread.join()


class _Server(uvicorn.Server):
    """uvicorn without its signal handling, which would end the process instead of returning."""

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        yield


def _server(app: ASGIApp, log: RequestLog, faults: Faults | None, on_request: OnRequest | None) -> _Server:
    # Recorded outside of the faults and inside of the cuts: the log says what the client gets, before it gets it.
    wire = Cuttable(Recorded(Faulty(app, faults or Faults()), log, on_request))
    config = uvicorn.Config(
        wire,
        loop="asyncio",
        http=wire.protocol(),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        timeout_graceful_shutdown=_GRACE_SECONDS,
    )
    return _Server(config)


@contextmanager
def _listening(port: int) -> Generator[socket.socket]:
    if not 0 <= port <= _HIGHEST_PORT:
        raise ArgumentError(f"port {port} does not exist; choose one from 1 to {_HIGHEST_PORT}, or 0 for any free one")
    # With its protocol named, asyncio sends small answers at once; else each waits 40 ms for the client's receipt.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    with listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((_HOST, port))
        except OSError as problem:
            reason = "is in use" if problem.errno == errno.EADDRINUSE else f"cannot be bound ({problem.strerror})"
            raise ArgumentError(f"port {port} on {_HOST} {reason}; choose another, or 0 for any free one") from None
        listener.listen(128)
        yield listener


def _endpoint(listener: socket.socket) -> str:
    return f"http://{_HOST}:{listener.getsockname()[1]}"


@contextmanager
def _stopped_by_signals(server: uvicorn.Server) -> Generator[None]:
    def stop(_: int, __: FrameType | None) -> None:
        server.should_exit = True

    previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
