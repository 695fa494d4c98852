"""The wire between a client and the local Hub server: where faults strike, and where connections are cut."""

import asyncio
import json
from collections.abc import Awaitable, Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from ckpt_core.testing.hub_faults import Fault, Faults

Address = tuple[str, int]


class Cut(Exception):  # noqa: N818  an order, not a failure
    """Raised by an application to end its request's connection, which ASGI itself has no way to ask for."""


class Cuttable:
    """An application that may raise `Cut`; its server must speak `protocol()`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._open: dict[Address, asyncio.BaseTransport] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or end its connection when what was sent to it is gone."""
        try:
            await self._app(scope, receive, send)
        except Cut:
            if transport := self._open.get(scope["client"]):
                transport.close()
            while (await receive())["type"] != "http.disconnect":
                pass

    def protocol(self) -> type[asyncio.Protocol]:
        """Return uvicorn's protocol, made to note each open connection here by its client's address."""
        connections = self._open

        class NotedProtocol(H11Protocol):
            def connection_made(self, transport: asyncio.Transport) -> None:
                super().connection_made(transport)
                connections[transport.get_extra_info("peername")] = transport

            def connection_lost(self, exc: Exception | None) -> None:
                connections.pop(self.transport.get_extra_info("peername"), None)
                super().connection_lost(exc)

        return NotedProtocol


class Faulty:
    """An application whose requests meet the faults of a plan. Raises `Cut`."""

    def __init__(self, app: ASGIApp, faults: Faults) -> None:
        self._app = app
        self._faults = faults
        self._kinds: dict[str, Callable[[Fault, Scope, Receive, Send], Awaitable[None]]] = {
            "status": self._status,
            "delay": self._delay,
            "cut": self._cut,
            "lost": self._lost,
            "flip": self._flip,
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or fail at it as planned."""
        fault = self._faults.strike(scope["method"], scope["path"]) if scope["type"] == "http" else None
        if fault is None:
            await self._app(scope, receive, send)
        else:
            await self._kinds[fault.kind](fault, scope, receive, send)

    async def _status(self, fault: Fault, _: Scope, receive: Receive, send: Send) -> None:
        await _body(receive)  # a client that still sends would see a cut connection
        await _refuse(send, fault.status or 503, fault.retry_after)

    async def _delay(self, fault: Fault, scope: Scope, receive: Receive, send: Send) -> None:
        body = await _body(receive)
        try:
            await asyncio.wait_for(receive(), fault.seconds)
        except TimeoutError:  # nothing came, so the client still waits; else it has gone
            await self._app(scope, _replayed(body, receive), send)

    async def _cut(self, fault: Fault, scope: Scope, receive: Receive, send: Send) -> None:
        if fault.body == "request":
            await _body(receive, fault.at)
        elif fault.body == "response":
            await self._app(scope, receive, _truncated(send, fault.at))
        raise Cut

    async def _lost(self, fault: Fault, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, _unsent)
        if fault.status is None:
            raise Cut
        await _refuse(send, fault.status, fault.retry_after)

    async def _flip(self, fault: Fault, scope: Scope, receive: Receive, send: Send) -> None:
        flip = _Flip(fault.at)

        async def flipped_receive() -> Message:
            return flip(await receive())

        async def flipped_send(message: Message) -> None:
            await send(flip(message))

        if fault.body == "request":
            await self._app(scope, flipped_receive, send)
        else:
            await self._app(scope, receive, flipped_send)


class _Flip:
    """Turns one byte of the bodies that pass by."""

    def __init__(self, at: int) -> None:
        self._left = at

    def __call__(self, message: Message) -> Message:
        body = bytearray(message.get("body", b""))
        if 0 <= self._left < len(body):
            body[self._left] ^= 0xFF
            message = {**message, "body": bytes(body)}
        self._left -= len(body)
        return message


async def _body(receive: Receive, most: int | None = None) -> bytes:
    """Read the request's body, or no more of it than tells that it has `most` bytes."""
    body = bytearray()
    more = True
    while more and (most is None or len(body) < most):
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return bytes(body)


def _replayed(body: bytes, receive: Receive) -> Receive:
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return waiting.pop() if waiting else await receive()

    return replay


def _truncated(send: Send, most: int) -> Send:
    left = most

    async def truncate(message: Message) -> None:
        nonlocal left
        if message["type"] == "http.response.start":
            await send(message)
        elif body := message.get("body", b"")[:left]:
            left -= len(body)
            await send({**message, "body": body, "more_body": True})

    return truncate


async def _unsent(_: Message) -> None:
    pass


async def _refuse(send: Send, status: int, retry_after: float | None) -> None:
    body = json.dumps({"error": f"a fault was asked for: {status}"}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    if retry_after is not None:
        headers.append((b"retry-after", b"%g" % retry_after))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
