"""A local Hub server: the real protocol over HTTP on loopback, its repositories in a directory.

with hub_server("hub") as server:
    HfApi(endpoint=server.endpoint).create_repo("team/model")
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

from ckpt_core.errors import ArgumentError
from ckpt_core.testing.hub_app import create_app

_HOST = "127.0.0.1"
_HIGHEST_PORT = 65535
_GRACE_SECONDS = 5


@dataclass(frozen=True)
class HubServer:
    """A running server: where it answers, and where it keeps its repositories."""

    endpoint: str
    directory: Path


def serve(
    directory: str | PathLike[str],
    *,
    port: int = 0,
    ready: Callable[[HubServer], None] | None = None,
    **options: Any,
) -> None:
    """Serve the repositories in `directory` until SIGTERM or SIGINT, then finish open requests and return.

    `port` 0 takes a free one; `ready` is called once, when connections are accepted. `options` are those of
    `hub_app.create_app`: `token`, `read_only_token`, `on_request`, `part_size`, `page_size`. Call it in the main
    thread. Raises ArgumentError where the port cannot be had.
    """
    with _listening(port) as listener:
        server = _server(Path(directory), options)
        with _stopped_by_signals(server):
            if ready is not None:
                ready(_address(listener, directory))
            server.run(sockets=[listener])


@contextmanager
def hub_server(directory: str | PathLike[str], *, port: int = 0, **options: Any) -> Generator[HubServer]:
    """Serve the repositories in `directory` from a thread while the block runs; options as for `serve`."""
    with _listening(port) as listener:
        server = _server(Path(directory), options)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="local Hub")
        thread.start()
        try:
            yield _address(listener, directory)
        finally:
            server.should_exit = True
            thread.join()


class _Server(uvicorn.Server):
    """uvicorn without its signal handling, which would end the process instead of returning."""

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        yield


def _server(directory: Path, options: dict[str, Any]) -> _Server:
    config = uvicorn.Config(
        create_app(directory, **options),
        loop="asyncio",
        http="h11",
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
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    with listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((_HOST, port))
        except OSError as problem:
            reason = "is in use" if problem.errno == errno.EADDRINUSE else f"cannot be bound ({problem.strerror})"
            raise ArgumentError(f"port {port} on {_HOST} {reason}; choose another, or 0 for any free one") from None
        listener.listen(128)
        yield listener


def _address(listener: socket.socket, directory: str | PathLike[str]) -> HubServer:
    return HubServer(endpoint=f"http://{_HOST}:{listener.getsockname()[1]}", directory=Path(directory))


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
