"""Reading a repository: trees, refs, commits, model info, and the files themselves."""

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any
from urllib.parse import parse_qs

from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from ckpt_core.testing import hub_trees
from ckpt_core.testing.hub_auth import Gate
from ckpt_core.testing.hub_cards import card_metadata
from ckpt_core.testing.hub_names import Refusal, check_path
from ckpt_core.testing.hub_repo import Commit, Repo
from ckpt_core.testing.hub_repos import Repos
from ckpt_core.testing.hub_requests import API, answering, flag, repo_id
from ckpt_core.testing.hub_xet import Xet


class _ObjectResponse(FileResponse):
    chunk_size = 2**20


class Reads:
    """Everything that changes nothing; long listings come in pages of `page_size`."""

    def __init__(self, repos: Repos, gate: Gate, xet: Xet | None, page_size: int) -> None:
        self._repos = repos
        self._gate = gate
        self._xet = xet
        self._page_size = page_size

    def routes(self) -> Sequence[Route]:
        """Return the routes that reading needs."""
        file = "/{namespace:quoted}/{name:quoted}/resolve/{revision:quoted}/{path:quoted_path}"
        return [
            Route(API, answering(self.model_info), methods=["GET"]),
            Route(API + "/revision/{revision:quoted}", answering(self.model_info), methods=["GET"]),
            Route(API + "/auth-check", answering(self.auth_check), methods=["GET"]),
            Route(API + "/auth-check/write", answering(self.write_check), methods=["GET"]),
            Route(API + "/refs", answering(self.refs), methods=["GET"]),
            Route(API + "/commits/{revision:quoted}", answering(self.commits), methods=["GET"]),
            Route(API + "/tree/{revision:quoted}", answering(self.tree), methods=["GET"]),
            Route(API + "/tree/{revision:quoted}/{path:quoted_path}", answering(self.tree), methods=["GET"]),
            Route(API + "/paths-info/{revision:quoted}", answering(self.paths_info), methods=["POST"]),
            Route(file, answering(self.file), methods=["GET", "HEAD"]),
        ]

    def model_info(self, request: Request, _: bytes) -> Response:
        """Describe a repository at a revision; with `blobs`, each file's size and ids too."""
        repo = self._readable(request)
        commit = repo.commit(request.path_params.get("revision", "main"))
        settings = repo.settings
        card = card_metadata(repo.content(commit.files["README.md"])) if "README.md" in commit.files else {}
        info: dict[str, Any] = {
            "id": repo.id,
            "modelId": repo.id,
            "author": repo.id.split("/")[0],
            "sha": commit.id,
            "lastModified": commit.date,
            "createdAt": settings["created"],
            "private": settings["private"],
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": card.get("tags") or [],
            "siblings": _siblings(commit, blobs=flag(request.query_params.get("blobs"))),
            "cardData": card,
        }
        info |= {key: card[key] for key in ("library_name", "pipeline_tag") if key in card}
        return JSONResponse(info)

    def auth_check(self, request: Request, _: bytes) -> Response:
        """Answer 200 to who may read."""
        self._readable(request)
        return JSONResponse({})

    def write_check(self, request: Request, _: bytes) -> Response:
        """Answer 200 to who may write."""
        self._readable(request)
        self._gate.check_write(request)
        return JSONResponse({})

    def refs(self, request: Request, _: bytes) -> Response:
        """List branches and tags; there are no pull requests."""
        refs = self._readable(request).refs()
        branches, tags = _refs("refs/heads/", refs.branches), _refs("refs/tags/", refs.tags)
        return JSONResponse({"branches": branches, "tags": tags, "converts": [], "pullRequests": []})

    def commits(self, request: Request, _: bytes) -> Response:
        """List a revision's commits, newest first; where it is asked for, with their texts as HTML, too."""
        history = self._readable(request).history(request.path_params["revision"])
        formatted = "formatted" in request.query_params.getlist("expand[]")
        return self._page(request, [_commit_json(commit, formatted=formatted) for commit in history])

    def tree(self, request: Request, _: bytes) -> Response:
        """List a folder, optionally with all below it and the commit that last changed each."""
        repo = self._readable(request)
        commit = repo.commit(request.path_params["revision"])
        folder = request.path_params.get("path", "").strip("/")
        items = hub_trees.listing(commit.files, folder, recursive=flag(request.query_params.get("recursive")))
        if folder and not items:
            raise Refusal(404, f"{folder} does not exist", code="EntryNotFound", commit=commit.id)
        return self._page(request, items, expand=repo if flag(request.query_params.get("expand")) else None)

    def paths_info(self, request: Request, body: bytes) -> Response:
        """Describe the named files and folders; those that are not there are left out."""
        repo = self._readable(request)
        form = parse_qs(body.decode())
        commit = repo.commit(request.path_params["revision"])
        items = {item["path"]: item for item in hub_trees.listing(commit.files, recursive=True)}
        found = [items[path] for path in form.get("paths", []) if path in items]
        if flag(form.get("expand", ["false"])[0]):
            _add_last_commits(repo, commit.id, found)
        if self._xet is not None:
            self._xet.annotate(found)
        return JSONResponse(found)

    def file(self, request: Request, _: bytes) -> Response:
        """Serve a file or a range of it; never a redirect, whose headers the client would not read."""
        repo = self._readable(request)
        path = request.path_params["path"]
        check_path(path)
        commit_id, entry = repo.entry(request.path_params["revision"], path)
        headers = {"X-Repo-Commit": commit_id, "ETag": f'"{entry.etag}"'}
        if entry.lfs:
            headers |= {"X-Linked-ETag": f'"{entry.etag}"', "X-Linked-Size": str(entry.size)}
            headers |= self._xet.headers(request, entry.sha256) if self._xet else {}
        return _ObjectResponse(repo.object_file(entry.sha256), headers=headers, media_type="application/octet-stream")

    def _readable(self, request: Request) -> Repo:
        repo = self._repos.get(repo_id(request))
        self._gate.check_read(request, repo)
        return repo

    def _page(self, request: Request, items: list[dict[str, Any]], expand: Repo | None = None) -> Response:
        cursor = request.query_params.get("cursor", "0")
        if not cursor.isdecimal():
            raise Refusal(400, f"Invalid cursor: {cursor!r}")
        start, end = int(cursor), int(cursor) + self._page_size
        page = items[start:end]
        if expand is not None:
            _add_last_commits(expand, request.path_params["revision"], page)
        if self._xet is not None:
            self._xet.annotate(page)
        following = request.url.include_query_params(cursor=end)
        headers = {"Link": f'<{following}>; rel="next"'} if end < len(items) else None
        return JSONResponse(page, headers=headers)


def _siblings(commit: Commit, *, blobs: bool) -> list[dict[str, Any]]:
    siblings: list[dict[str, Any]] = []
    for path, entry in commit.files.items():
        item: dict[str, Any] = {"rfilename": path}
        if blobs:
            item |= {"size": entry.size, "blobId": entry.oid}
            if entry.lfs:
                item["lfs"] = {**entry.to_json(path)["lfs"], "sha256": entry.sha256}
        siblings.append(item)
    return siblings


def _refs(prefix: str, names: dict[str, str]) -> list[dict[str, str]]:
    return [{"name": name, "ref": prefix + name, "targetCommit": names[name]} for name in sorted(names)]


def _commit_json(commit: Commit, *, formatted: bool) -> dict[str, Any]:
    texts = {"title": commit.title, "message": commit.message}
    result = {"id": commit.id, **texts, "date": commit.date, "authors": [{"user": "local"}]}
    return result | ({"formatted": {name: escape(each) for name, each in texts.items()}} if formatted else {})


def _add_last_commits(repo: Repo, revision: str, items: Iterable[dict[str, Any]]) -> None:
    """Give each item the newest commit whose parent has another object, or none, under its path."""
    pending = {item["path"]: item for item in items}
    history = repo.history(revision)
    commit = next(history)
    while pending:
        parent = next(history, None)
        here, before = _ids(commit), _ids(parent) if parent else {}
        for path in [path for path in pending if here.get(path) != before.get(path)]:
            pending.pop(path)["lastCommit"] = {"id": commit.id, "title": commit.title, "date": commit.date}
        if parent is None:
            return
        commit = parent


def _ids(commit: Commit) -> dict[str, str]:
    files = {path: entry.oid for path, entry in commit.files.items()}
    return {**files, **hub_trees.folder_ids(commit.files)}
