"""The Hub's commit protocol: what to send how, then one ndjson request that commits it all."""

import base64
import binascii
from collections.abc import Sequence
from typing import Any, cast

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ckpt_core.testing import hub_trees
from ckpt_core.testing.hub_auth import Gate
from ckpt_core.testing.hub_cards import CardError, check_card
from ckpt_core.testing.hub_cas import Cas
from ckpt_core.testing.hub_files import link
from ckpt_core.testing.hub_names import Refusal, check_path
from ckpt_core.testing.hub_repo import Change, Copy, Put, Remove, Repo
from ckpt_core.testing.hub_repos import Repos
from ckpt_core.testing.hub_requests import API, answering, flag, integer, json_object, repo_id, text

_NO_PULL_REQUESTS = (
    "This server has no pull requests and no discussions: commit to a branch, without create_pr, and to main when it is"
    " to be served"
)


class Commits:
    """Writing to a repository: preupload, commit, branches and tags."""

    def __init__(self, repos: Repos, gate: Gate, cas: Cas | None) -> None:
        self._repos = repos
        self._gate = gate
        self._cas = cas

    def routes(self) -> Sequence[Route]:
        """Return the routes that this protocol needs."""
        return [
            Route(API + "/preupload/{revision:quoted}", answering(self.preupload), methods=["POST"]),
            Route(API + "/commit/{revision:quoted}", answering(self.commit), methods=["POST"]),
            Route(API + "/branch/{ref:quoted}", answering(self.create_branch), methods=["POST"]),
            Route(API + "/branch/{ref:quoted}", answering(self.delete_branch), methods=["DELETE"]),
            Route(API + "/tag/{ref:quoted}", answering(self.create_tag), methods=["POST"]),
            Route(API + "/tag/{ref:quoted}", answering(self.delete_tag), methods=["DELETE"]),
            Route(API + "/discussions", answering(self.discussions), methods=["GET", "POST"]),
            Route(API + "/discussions/{rest:path}", answering(self.discussions), methods=["GET", "POST"]),
        ]

    def preupload(self, request: Request, body: bytes) -> Response:
        """Tell for each file whether git or LFS takes it, and what the branch holds under its path."""
        _refuse_pull_request(request)
        repo = self._writable(request)
        files = repo.commit(request.path_params["revision"]).files
        known = files.get(hub_trees.GIT_ATTRIBUTES)
        attributes = repo.content(known) if known else b""
        answers: list[dict[str, Any]] = []
        for item in json_object(body).get("files", []):
            path, sample = text(item, "path"), _decode(text(item, "sample"))
            check_path(path)
            lfs = hub_trees.goes_to_lfs(path, integer(item, "size"), sample, attributes)
            remote = {"oid": files[path].etag} if path in files else {}
            mode = "lfs" if lfs else "regular"
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **remote})
        return JSONResponse({"files": answers})

    def commit(self, request: Request, body: bytes) -> Response:
        """Commit every operation of the request at once, or nothing."""
        _refuse_pull_request(request)
        repo = self._writable(request)
        lines = [json_object(line) for line in body.splitlines() if line.strip()]
        headers = [line["value"] for line in lines if line.get("key") == "header"]
        if len(headers) != 1:
            raise Refusal(400, "A commit has exactly one header")
        changes = [self._change(repo, line) for line in lines if line.get("key") != "header"]
        title, message = text(headers[0], "summary"), headers[0].get("description") or ""
        commit_id = repo.apply(request.path_params["revision"], changes, title, message, headers[0].get("parentCommit"))
        url = f"{request.base_url}{repo.id}/commit/{commit_id}"
        return JSONResponse({"success": True, "commitOid": commit_id, "commitUrl": url, "hookOutput": ""})

    def discussions(self, request: Request, _: bytes) -> Response:
        """Refuse what is about pull requests and discussions."""
        self._repos.get(repo_id(request))
        raise Refusal(400, _NO_PULL_REQUESTS)

    def create_branch(self, request: Request, body: bytes) -> Response:
        """Create a branch at a revision, or at the head of main."""
        start = json_object(body or b"{}").get("startingPoint") or "main"
        self._writable(request).add_ref("branches", request.path_params["ref"], start)
        return JSONResponse({})

    def delete_branch(self, request: Request, _: bytes) -> Response:
        """Delete a branch; its commits stay."""
        self._writable(request).remove_ref("branches", request.path_params["ref"])
        return JSONResponse({})

    def create_tag(self, request: Request, body: bytes) -> Response:
        """Tag a revision: here the path names the revision and the body the tag."""
        self._writable(request).add_ref("tags", text(json_object(body), "tag"), request.path_params["ref"])
        return JSONResponse({})

    def delete_tag(self, request: Request, _: bytes) -> Response:
        """Delete a tag; here the path names the tag."""
        self._writable(request).remove_ref("tags", request.path_params["ref"])
        return JSONResponse({})

    def _writable(self, request: Request) -> Repo:
        self._gate.check_write(request)
        return self._repos.get(repo_id(request))

    def _change(self, repo: Repo, line: dict[str, Any]) -> Change:
        value = cast("dict[str, Any]", line.get("value"))
        path = text(value, "path")
        match line.get("key"):
            case "file":
                content = text(value, "content")
                plain = _decode(content) if value.get("encoding") == "base64" else content.encode()
                if path == "README.md":
                    _check_metadata(plain)
                return Put(path, repo.store(plain))
            case "lfsFile":
                return Put(path, self._uploaded(repo, text(value, "oid"), value.get("size")))
            case "copyFile":
                return Copy(path, text(value, "srcPath"), value.get("srcRevision"))
            case "deletedFile":
                return Remove(path.rstrip("/"))
            case "deletedFolder":
                return Remove(path.rstrip("/"), folder=True)
            case other:
                raise Refusal(400, f"Unknown operation in a commit: {other!r}")

    def _uploaded(self, repo: Repo, oid: str, declared_size: int | None) -> hub_trees.Entry:
        path = repo.object_file(oid)
        if not path.exists() and self._cas is not None and (content := self._cas.content(oid)):
            link(content, path)
        if not path.exists():
            raise Refusal(400, f"LFS object {oid} was not uploaded")
        size = path.stat().st_size
        if declared_size not in (None, size):
            raise Refusal(400, f"LFS object {oid} has {size} bytes, not {declared_size}")
        return hub_trees.lfs_entry(oid, size)


def _refuse_pull_request(request: Request) -> None:
    if flag(request.query_params.get("create_pr")):
        raise Refusal(400, _NO_PULL_REQUESTS)


def _check_metadata(card: bytes) -> None:
    try:
        check_card(card.decode())
    except CardError as error:
        said = "".join(f"\n- {problem}" for problem in error.problems)
        raise Refusal(400, f"Invalid metadata in README.md.{said}") from None
    except UnicodeDecodeError:
        raise Refusal(400, "README.md is not UTF-8") from None


def _decode(value: str) -> bytes:
    try:
        return base64.b64decode(value, validate=True)
    except binascii.Error as problem:
        raise Refusal(400, f"Content is not base64: {problem}") from None
