"""Large files in Xet: tokens for its storage, and the storage's own protocol under `/api/xet`.

Of the protocol's versions the first, which every client falls back to: a xorb in one request, a shard in one, plans to
reconstruct a file, and ranges of xorbs at signed addresses. Chunks are looked up by the first chunk of a file alone.
"""

import hmac
import re
import time
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from ckpt_core.testing.hub_auth import Gate
from ckpt_core.testing.hub_cas import Cas, Piece
from ckpt_core.testing.hub_names import Refusal
from ckpt_core.testing.hub_repos import Repos
from ckpt_core.testing.hub_requests import API, answering, repo_id

_PREFIX = "/api/xet"
_HOUR = 3600
_RANGE = re.compile(r"bytes=(\d+)-(\d*)")
_BEARER = re.compile(r"(read|write)-(\d+)-([0-9a-f]{64})")

Scope = Literal["read", "write"]


class Xet:
    """The upload and the download side of Xet."""

    def __init__(self, repos: Repos, gate: Gate, cas: Cas) -> None:
        self._repos = repos
        self._gate = gate
        self._cas = cas
        self._secret = cas.secret

    def routes(self) -> Sequence[Route]:
        """Return the routes that this protocol needs."""
        xorb = _PREFIX + "/v1/xorbs/{prefix:quoted}/{hash:quoted}"
        chunk = _PREFIX + "/v1/chunks/{prefix:quoted}/{hash:quoted}"
        return [
            Route(API + "/xet-read-token/{revision:quoted_path}", answering(self.read_token), methods=["GET"]),
            Route(API + "/xet-write-token/{revision:quoted_path}", answering(self.write_token), methods=["GET"]),
            Route(xorb, answering(self.take_xorb), methods=["POST"]),
            Route(_PREFIX + "/v1/shards", answering(self.take_shard), methods=["POST"]),
            Route(chunk, answering(self.find_chunk), methods=["GET"]),
            Route(_PREFIX + "/v1/reconstructions/{hash:quoted}", answering(self.plan), methods=["GET"]),
            Route(_PREFIX + "/xorbs/{hash:quoted}", answering(self.send_xorb), methods=["GET"]),
        ]

    def read_token(self, request: Request, _: bytes) -> Response:
        """Give who may read the repository a token for the storage."""
        self._gate.check_read(request, self._repos.get(repo_id(request)))
        return self._token(request, "read")

    def write_token(self, request: Request, _: bytes) -> Response:
        """Give who may write to the repository a token for the storage."""
        self._gate.check_write(request)
        self._repos.get(repo_id(request))
        return self._token(request, "write")

    def take_xorb(self, request: Request, body: bytes) -> Response:
        """Take a xorb."""
        self._check(request, "write")
        return JSONResponse({"was_inserted": self._cas.add_xorb(request.path_params["hash"], body)})

    def take_shard(self, request: Request, body: bytes) -> Response:
        """Take the description of files whose xorbs are here; the files are uploaded when this is answered."""
        self._check(request, "write")
        self._cas.add_shard(body)
        return JSONResponse({"result": 1})

    def find_chunk(self, request: Request, _: bytes) -> Response:
        """Tell what may be here already of a file that begins with a chunk."""
        self._check(request, "read")
        shard = self._cas.similar(request.path_params["hash"])
        if shard is None:
            raise Refusal(404, "No file here begins with this chunk")
        return Response(shard, media_type="application/octet-stream")

    def plan(self, request: Request, _: bytes) -> Response:
        """Tell of which chunks a file, or a range of it, is made, and where to fetch them."""
        self._check(request, "read")
        asked = _RANGE.fullmatch(request.headers.get("range", "bytes=0-"))
        if asked is None:
            raise Refusal(416, "A range is written bytes=FIRST-LAST")
        found = self._cas.reconstruct(request.path_params["hash"], int(asked[1]), int(asked[2]) if asked[2] else None)
        fetch: dict[str, list[dict[str, Any]]] = {}
        for piece in dict.fromkeys(found.pieces):
            fetch.setdefault(piece.xorb, []).append(self._fetch(request, piece))
        terms = [{"hash": piece.xorb, "unpacked_length": piece.size, "range": _range(piece)} for piece in found.pieces]
        return JSONResponse({"offset_into_first_range": found.offset, "terms": terms, "fetch_info": fetch})

    def send_xorb(self, request: Request, _: bytes) -> Response:
        """Serve a range of a xorb to who has its signed address."""
        xorb = request.path_params["hash"]
        if not hmac.compare_digest(request.query_params.get("signature", "").encode(), self._sign(xorb).encode()):
            raise Refusal(403, "This address was not issued by this server; ask for a new one")
        return FileResponse(self._cas.xorb_file(xorb), media_type="application/octet-stream")

    def headers(self, request: Request, sha256: str) -> dict[str, str]:
        """Return what tells a client that a content can be had through Xet; nothing where it was uploaded by LFS."""
        file = self._cas.file_hash(sha256)
        if file is None:
            return {}
        route = f"{_base(request)}/api/models/{repo_id(request)}/xet-read-token/main"
        return {"X-Xet-Hash": file, "X-Xet-Refresh-Route": route}

    def annotate(self, items: Iterable[dict[str, Any]]) -> None:
        """Give the large files of a listing their Xet hash, where they have one."""
        for item in items:
            if "lfs" in item and (file := self._cas.file_hash(item["lfs"]["oid"])):
                item["xetHash"] = file

    def _fetch(self, request: Request, piece: Piece) -> dict[str, Any]:
        address = f"{_base(request)}{_PREFIX}/xorbs/{piece.xorb}?signature={self._sign(piece.xorb)}"
        return {
            "range": _range(piece),
            "url": address,
            "url_range": {"start": piece.first_byte, "end": piece.last_byte},
        }

    def _token(self, request: Request, scope: Scope) -> Response:
        expiry = int(time.time()) + _HOUR
        token = f"{scope}-{expiry}-{self._sign(f'{scope}-{expiry}')}"
        address = _base(request) + _PREFIX
        headers = {"X-Xet-Cas-Url": address, "X-Xet-Access-Token": token, "X-Xet-Token-Expiration": str(expiry)}
        return JSONResponse({"casUrl": address, "accessToken": token, "exp": expiry}, headers=headers)

    def _check(self, request: Request, scope: Scope) -> None:
        """Refuse with 401 who sends no valid token, with 403 who may only read."""
        sent = _BEARER.fullmatch(request.headers.get("authorization", "").removeprefix("Bearer "))
        if sent is None or not hmac.compare_digest(sent[3], self._sign(f"{sent[1]}-{sent[2]}")):
            raise Refusal(401, "This token was not issued by this server; ask for a new one")
        if int(sent[2]) < time.time():
            raise Refusal(401, "This token has expired; ask for a new one")
        if scope == "write" and sent[1] != "write":
            raise Refusal(403, "This token may only read")

    def _sign(self, text: str) -> str:
        return hmac.new(self._secret, text.encode(), "sha256").hexdigest()


def _base(request: Request) -> str:
    return str(request.base_url).rstrip("/")


def _range(piece: Piece) -> dict[str, int]:
    return {"start": piece.start, "end": piece.end}
