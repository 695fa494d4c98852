"""Large files over HTTP: the git-LFS batch protocol with the Hub's multipart extension.

The client sends no token with the bytes, so each upload address carries a signature, as on the Hub.
"""

import hashlib
import hmac
import json
import secrets
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ckpt_core.testing.hub_auth import Gate
from ckpt_core.testing.hub_files import atomic_file
from ckpt_core.testing.hub_names import Refusal
from ckpt_core.testing.hub_repo import Repo
from ckpt_core.testing.hub_repos import Repos
from ckpt_core.testing.hub_requests import answering, integer, json_object, repo_id, text

_COPY_BYTES = 2**20


class Lfs:
    """The upload side of LFS; files above `part_size` bytes are sent in parts."""

    def __init__(self, repos: Repos, gate: Gate, part_size: int) -> None:
        self._repos = repos
        self._gate = gate
        self._part_size = part_size
        self._secret = secrets.token_bytes(32)

    def routes(self) -> Sequence[Route]:
        """Return the routes that this protocol needs."""
        upload = "/api/lfs/{namespace:quoted}/{name:quoted}/{oid:quoted}"
        objects = "/{namespace:quoted}/{git:quoted}/info/lfs/objects"
        return [
            Route(upload, self.receive, methods=["PUT"]),
            Route(upload + "/{part:int}", self.receive_part, methods=["PUT"]),
            Route(upload, answering(self.complete), methods=["POST"]),
            Route(objects + "/batch", answering(self.batch), methods=["POST"]),
            Route(objects + "/verify", answering(self.verify), methods=["POST"]),
        ]

    def batch(self, request: Request, body: bytes) -> Response:
        """Tell for each object where to send it, or that it is here already."""
        self._gate.check_write(request)
        repo = self._git_repo(request)
        data = json_object(body)
        if data.get("operation") != "upload":
            raise Refusal(400, "This server takes LFS uploads; files are read under /resolve/")
        objects = [self._instructions(request, repo, item) for item in data.get("objects", [])]
        return JSONResponse({"transfer": "basic", "hash_algo": "sha256", "objects": objects})

    async def receive(self, request: Request) -> Response:
        """Take an object in one piece."""
        repo, oid = self._signed(request)
        with atomic_file(repo.object_file(oid)) as file:
            found = hashlib.sha256()
            async for chunk in request.stream():
                found.update(chunk)
                file.write(chunk)
            _check_digest(found.hexdigest(), oid)
        return Response()

    async def receive_part(self, request: Request) -> Response:
        """Take one part of an object; its ETag is what the client names it by on completion."""
        repo, oid = self._signed(request)
        with atomic_file(_part_file(repo, oid, request.path_params["part"])) as file:
            found = hashlib.sha256()
            async for chunk in request.stream():
                found.update(chunk)
                file.write(chunk)
        return Response(headers={"ETag": f'"{found.hexdigest()}"'})

    def complete(self, request: Request, body: bytes) -> Response:
        """Put the parts together and check that they are the object."""
        repo, oid = self._signed(request)
        parts = sorted(json_object(body).get("parts", []), key=lambda part: integer(part, "partNumber"))
        files = [_part_file(repo, oid, integer(part, "partNumber")) for part in parts]
        if missing := [file.name for file in files if not file.exists()]:
            raise Refusal(400, f"Parts are missing: {', '.join(missing)}")
        with atomic_file(repo.object_file(oid)) as target:
            found = hashlib.sha256()
            for chunk in _chunks(files):
                found.update(chunk)
                target.write(chunk)
            _check_digest(found.hexdigest(), oid)
        for path in files:
            path.unlink(missing_ok=True)
        return Response()

    def verify(self, request: Request, body: bytes) -> Response:
        """Confirm that an object is here with the size that the client believes."""
        self._gate.check_write(request)
        repo = self._git_repo(request)
        data = json_object(body)
        oid, size = text(data, "oid"), integer(data, "size")
        path = repo.object_file(oid)
        if not path.exists():
            raise Refusal(404, f"LFS object {oid} was not uploaded")
        if path.stat().st_size != size:
            raise Refusal(422, f"LFS object {oid} has {path.stat().st_size} bytes, not {size}")
        return JSONResponse({})

    def _instructions(self, request: Request, repo: Repo, item: Any) -> dict[str, Any]:
        oid, size = text(item, "oid"), integer(item, "size")
        answer: dict[str, Any] = {"oid": oid, "size": size}
        if repo.object_file(oid).exists():
            return answer  # no actions: nothing to send
        base = str(request.base_url).rstrip("/")
        address = f"{base}/api/lfs/{repo.id}/{oid}"
        query = f"?signature={self._signature(repo.id, oid)}"
        upload: dict[str, Any] = {"href": address + query}
        if size > self._part_size:
            count = -(-size // self._part_size)
            parts = {str(number): f"{address}/{number}{query}" for number in range(1, count + 1)}
            upload["header"] = {"chunk_size": str(self._part_size), **parts}
        verify = {"href": f"{base}/{quote(repo.id)}.git/info/lfs/objects/verify"}
        return {**answer, "authenticated": True, "actions": {"upload": upload, "verify": verify}}

    def _git_repo(self, request: Request) -> Repo:
        name, dot, _ = request.path_params["git"].rpartition(".git")
        if not dot:
            raise Refusal(404, "Not found")
        return self._repos.get(f"{request.path_params['namespace']}/{name}")

    def _signed(self, request: Request) -> tuple[Repo, str]:
        oid = request.path_params["oid"]
        sent = request.query_params.get("signature", "")
        if not hmac.compare_digest(sent.encode(), self._signature(repo_id(request), oid).encode()):
            raise Refusal(403, "This upload address was not issued by this server; ask for a new one")
        return self._repos.get(repo_id(request)), oid

    def _signature(self, repo: str, oid: str) -> str:
        return hmac.new(self._secret, json.dumps([repo, oid]).encode(), "sha256").hexdigest()


def _chunks(files: Iterable[Path]) -> Iterator[bytes]:
    for path in files:
        with path.open("rb") as file:
            while chunk := file.read(_COPY_BYTES):
                yield chunk


def _part_file(repo: Repo, oid: str, number: int) -> Path:
    return repo.path / "parts" / f"{repo.object_file(oid).name}-{number}"


def _check_digest(found: str, expected: str) -> None:
    if found != expected:
        raise Refusal(422, f"The bytes sent have sha256 {found}, not {expected}; nothing was stored")
