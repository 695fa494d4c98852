"""The local Hub as an ASGI application: what the `huggingface_hub` client asks of huggingface.co.

Model repositories only, large files by LFS and by Xet, no pull requests, no discussions, no `.gitignore` rules.
"""

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from urllib.parse import unquote

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ckpt_core.testing.hub_auth import Gate
from ckpt_core.testing.hub_cards import CardError, check_card
from ckpt_core.testing.hub_cas import Cas
from ckpt_core.testing.hub_commits import Commits
from ckpt_core.testing.hub_lfs import Lfs
from ckpt_core.testing.hub_names import Refusal, not_found
from ckpt_core.testing.hub_reads import Reads
from ckpt_core.testing.hub_repos import Repos
from ckpt_core.testing.hub_requests import (
    API,
    RawPaths,
    RequestIds,
    answering,
    json_object,
    refuse,
    repo_id,
    text,
)
from ckpt_core.testing.hub_xet import Xet

_REPO_ADDRESS = re.compile(r"/api/(?:models|datasets|spaces)/(.+)|/(.+)/(?:resolve|raw|info/lfs)/")
_OTHER_KINDS = re.compile(r"(?:/api)?/(?:datasets|spaces)/")
USER = "local"  # the namespace of repositories that are created without one


def create_app(
    directory: Path,
    *,
    token: str | None = None,
    read_only_token: str | None = None,
    xet: bool = True,
    part_size: int = 5 * 10**9,
    page_size: int = 1000,
) -> Starlette:
    """Build the application over the repositories in `directory`, which is created where it is missing.

    Without `xet` it answers as a Hub that has LFS alone. `part_size` is in bytes: larger LFS uploads come in parts.
    """
    repos, gate = Repos(directory), Gate(token, read_only_token)
    cas = Cas(directory) if xet else None
    storage = Xet(repos, gate, cas) if cas else None
    routes: list[Route] = [
        *_Accounts(repos, gate).routes(),
        *Lfs(repos, gate, part_size).routes(),
        *(storage.routes() if storage else []),
        *Commits(repos, gate, cas).routes(),
        *Reads(repos, gate, storage, page_size).routes(),
    ]
    # A page in a browser could otherwise reach this server through a name that resolves to loopback.
    middleware = [
        Middleware(RequestIds),
        Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"]),
        Middleware(RawPaths),
    ]
    handlers = {Refusal: refuse, HTTPException: partial(_refuse_unknown, repos)}
    return Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)


def _refuse_unknown(repos: Repos, request: Request, error: Exception) -> Response:
    """Answer to an address that no route has: no such repository, as of an id without a namespace, or not offered."""
    assert isinstance(error, HTTPException)
    path = unquote(request.url.path)
    found = _REPO_ADDRESS.match(path)
    if found is None:
        return refuse(request, Refusal(error.status_code, f"This server does not offer {request.method} {path}"))
    named = "/".join((found[1] or found[2]).split("/")[:2])
    try:
        if _OTHER_KINDS.match(path):
            raise not_found(f"{path}: this server keeps model repositories only")
        repos.get(named)
    except Refusal as refusal:
        return refuse(request, refusal)
    return refuse(request, Refusal(error.status_code, f"This server does not offer {request.method} {path}"))


class _Accounts:
    """Who is asking, and which repositories there are."""

    def __init__(self, repos: Repos, gate: Gate) -> None:
        self._repos = repos
        self._gate = gate

    def routes(self) -> Sequence[Route]:
        return [
            Route("/api/whoami-v2", answering(self.whoami), methods=["GET"]),
            Route("/api/validate-yaml", answering(self.validate_yaml), methods=["POST"]),
            Route("/api/repos/create", answering(self.create), methods=["POST"]),
            Route("/api/repos/delete", answering(self.delete), methods=["DELETE"]),
            Route(API + "/settings", answering(self.settings), methods=["PUT"]),
        ]

    def whoami(self, request: Request, _: bytes) -> Response:
        role = "write" if self._gate.check_known(request) == "writer" else "read"
        auth = {"type": "access_token", "accessToken": {"displayName": USER, "role": role}}
        return JSONResponse({"type": "user", "id": USER, "name": USER, "fullname": USER, "orgs": [], "auth": auth})

    def validate_yaml(self, _: Request, body: bytes) -> Response:
        try:
            metadata = check_card(text(json_object(body), "content"))
        except CardError as error:
            return JSONResponse({"errors": [{"message": each} for each in error.problems], "warnings": []}, 400)
        warnings = [] if metadata else [{"message": "empty or missing yaml metadata in repo card"}]
        return JSONResponse({"errors": [], "warnings": warnings})

    def create(self, request: Request, body: bytes) -> Response:
        self._gate.check_write(request)
        data = json_object(body)
        target, error = _named_repo(data), {}
        private = data.get("visibility", "public") != "public"
        try:
            self._repos.create(target, private=private)
        except Refusal as refusal:
            if refusal.status != 409:  # noqa: PLR2004  the client reads the address from a 409 as well
                raise
            target, error = self._repos.get(target).id, {"error": refusal.message}
        answer = {"url": f"{request.base_url}{target}", "name": target, "id": target}
        return JSONResponse({**error, **answer}, 409 if error else 200)

    def delete(self, request: Request, body: bytes) -> Response:
        self._gate.check_write(request)
        self._repos.delete(_named_repo(json_object(body)))
        return JSONResponse({})

    def settings(self, request: Request, body: bytes) -> Response:
        self._gate.check_write(request)
        repo = self._repos.get(repo_id(request))
        data = json_object(body)
        if data.get("gated"):
            raise Refusal(400, "This server has no gated repositories")
        if "visibility" in data:
            repo.set_private(data["visibility"] != "public")
        return JSONResponse(repo.settings)


def _named_repo(data: dict[str, object]) -> str:
    if data.get("type") not in (None, "model"):
        raise Refusal(400, "This server keeps model repositories only")
    return f"{data.get('organization') or USER}/{text(data, 'name')}"
