"""Reading requests: bodies as JSON, path parameters that the client quoted, and refusals as responses."""

import json
import uuid
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar, cast
from urllib.parse import unquote

from starlette.concurrency import run_in_threadpool
from starlette.convertors import Convertor, register_url_convertor
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ckpt_core.testing.hub_names import Refusal

T = TypeVar("T")
API = "/api/models/{namespace:quoted}/{name:quoted}"
Handler = Callable[[Request, bytes], Response]


class _Quoted(Convertor[str]):
    """One segment in which the client may have quoted a slash: a branch `a/b` is `a%2Fb`."""

    regex = "[^/]+"

    def convert(self, value: str) -> str:
        return unquote(value)

    def to_string(self, value: str) -> str:
        raise NotImplementedError(f"addresses are not built from {value!r}")


class _QuotedPath(_Quoted):
    regex = ".+"


register_url_convertor("quoted", _Quoted())
register_url_convertor("quoted_path", _QuotedPath())


class RawPaths:
    """Route by the path as it was sent, so that a quoted slash does not split a segment."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "http":
            scope = {**scope, "path": scope["raw_path"].decode("latin-1")}
        await self._app(scope, receive, send)


class RequestIds:
    """Give each answer the id of its request, which the client shows in its errors: the one it sent, or a new one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        sent = dict(scope.get("headers", []))
        number = sent.get(b"x-request-id") or sent.get(b"x-amzn-trace-id") or uuid.uuid4().hex.encode()

        async def named_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), (b"x-request-id", number)]}
            await send(message)

        await self._app(scope, receive, named_send)


def answering(handler: Handler) -> Callable[[Request], Awaitable[Response]]:
    """Make an endpoint of a function that takes the request and its whole body, and may block."""

    async def endpoint(request: Request) -> Response:
        return await run_in_threadpool(handler, request, await request.body())

    return endpoint


def refuse(_: Request, refusal: Exception) -> Response:
    """Turn a refusal into the answer that the client understands."""
    assert isinstance(refusal, Refusal)
    line = " ".join(refusal.message.split())  # of several lines, or with other spaces, it would be no header
    headers = {"X-Error-Message": "".join(each if each.isascii() and each.isprintable() else "?" for each in line)}
    if refusal.code is not None:
        headers["X-Error-Code"] = refusal.code
    if refusal.commit is not None:
        headers["X-Repo-Commit"] = refusal.commit
    return JSONResponse({"error": refusal.message}, refusal.status, headers)


def repo_id(request: Request) -> str:
    """Return the repository that the path names."""
    return f"{request.path_params['namespace']}/{request.path_params['name']}"


def json_object(body: bytes) -> dict[str, Any]:
    """Parse a JSON object, or refuse with 400."""
    try:
        value: Any = json.loads(body)
    except ValueError as problem:
        raise Refusal(400, f"The body is not JSON: {problem}") from None
    if not isinstance(value, dict):
        raise Refusal(400, "The body is not a JSON object")
    return cast("dict[str, Any]", value)


def text(data: Any, key: str) -> str:
    """Return a string of a JSON object, or refuse with 400."""
    return _member(data, key, str)


def integer(data: Any, key: str) -> int:
    """Return a whole number of a JSON object, or refuse with 400."""
    return _member(data, key, int)


def flag(value: str | None) -> bool:
    """Read a boolean of a query or form, as the client writes them."""
    return (value or "").lower() in {"1", "true"}


def _member(data: Any, key: str, kind: type[T]) -> T:
    value = cast("dict[str, Any]", data).get(key) if isinstance(data, dict) else None
    if not isinstance(value, kind):
        raise Refusal(400, f"{key!r} must be a {kind.__name__}")
    return value
