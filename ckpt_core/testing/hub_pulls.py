"""Pull requests: commits beside main, under `refs/pr/<number>`, until somebody merges them."""

import itertools
import json
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ckpt_core.testing.hub_auth import Gate
from ckpt_core.testing.hub_files import write_atomically
from ckpt_core.testing.hub_names import Refusal
from ckpt_core.testing.hub_repo import Change, Put, Remove, Repo, now
from ckpt_core.testing.hub_repos import Repos
from ckpt_core.testing.hub_requests import API, answering, json_object, repo_id, text


@dataclass(frozen=True)
class Pull:
    """One pull request: the commit of main that it began at, and the one that merged it."""

    number: int
    title: str
    created: str
    base: str
    status: Literal["open", "closed", "merged"] = "open"
    merged: str | None = None

    @property
    def ref(self) -> str:
        """What its commits are found under."""
        return f"refs/pr/{self.number}"


class Pulls:
    """Opening, describing, closing and merging pull requests."""

    def __init__(self, repos: Repos, gate: Gate) -> None:
        self._repos = repos
        self._gate = gate

    def routes(self) -> Sequence[Route]:
        """Return the routes that pull requests need."""
        one = API + "/discussions/{number:int}"
        return [
            Route(API + "/discussions", answering(self.open), methods=["POST"]),
            Route(one, answering(self.describe), methods=["GET"]),
            Route(one + "/status", answering(self.set_status), methods=["POST"]),
            Route(one + "/merge", answering(self.merge), methods=["POST"]),
        ]

    def open(self, request: Request, body: bytes) -> Response:
        """Open a pull request without commits, at the head of main."""
        self._gate.check_write(request)
        data = json_object(body)
        if not data.get("pullRequest"):
            raise Refusal(400, "This server has pull requests, but no discussions")
        pull = open_pull(self._repos.get(repo_id(request)), text(data, "title"))
        return JSONResponse({"num": pull.number})

    def describe(self, request: Request, _: bytes) -> Response:
        """Describe a pull request, as far as the client reads it."""
        repo = self._repos.get(repo_id(request))
        self._gate.check_read(request, repo)
        pull = _read(repo, request)
        return JSONResponse(
            {
                "num": pull.number,
                "title": pull.title,
                "status": pull.status,
                "createdAt": pull.created,
                "author": {"name": "local"},
                "repo": {"name": repo.id, "type": "model"},
                "isPullRequest": True,
                "changes": {"base": "main", "mergeCommitId": pull.merged},
                "filesWithConflicts": _conflicts(repo, pull) if pull.status == "open" else [],
                "events": [],
            }
        )

    def set_status(self, request: Request, body: bytes) -> Response:
        """Close a pull request, or open it again."""
        repo, pull = self._writable(request)
        status = text(json_object(body), "status")
        if status not in ("open", "closed"):
            raise Refusal(400, f"A pull request cannot be made {status!r}")
        _write(repo, replace(pull, status=status))
        event = {"id": uuid.uuid4().hex, "type": "status-change", "createdAt": now(), "data": {"status": status}}
        return JSONResponse({"newStatus": event})

    def merge(self, request: Request, _: bytes) -> Response:
        """Bring what a pull request changed to main, in one commit; 409 where main changed the same files."""
        repo, pull = self._writable(request)
        if conflicts := _conflicts(repo, pull):
            raise Refusal(409, f"main has changed since, in {', '.join(conflicts)}; nothing was merged")
        main = repo.commit("main")
        changes = [change for change in _changes(repo, pull) if isinstance(change, Put) or change.path in main.files]
        commit_id = repo.apply("main", changes, f"{pull.title} (#{pull.number})", "", main.id)
        _write(repo, replace(pull, status="merged", merged=commit_id))
        return JSONResponse({})

    def _writable(self, request: Request) -> tuple[Repo, Pull]:
        self._gate.check_write(request)
        repo = self._repos.get(repo_id(request))
        pull = _read(repo, request)
        if pull.status == "merged":
            raise Refusal(400, f"Pull request {pull.number} is merged")
        return repo, pull


def open_pull(repo: Repo, title: str, *, start: str = "main") -> Pull:
    """Open a pull request at a commit."""
    base, created = repo.resolve(start), now()
    for number in itertools.count(1 + len(repo.refs().pulls)):
        pull = Pull(number=number, title=title, created=created, base=base)
        try:
            repo.add_ref("pulls", pull.ref, base)
        except Refusal as refusal:
            if refusal.status != 409:  # noqa: PLR2004  the number was taken meanwhile: try the next
                raise
            continue
        _write(repo, pull)
        return pull
    raise AssertionError("there are always more numbers")


def _changes(repo: Repo, pull: Pull) -> list[Change]:
    base, head = repo.commit(pull.base).files, repo.commit(pull.ref).files
    changed = sorted(path for path in base.keys() | head.keys() if base.get(path) != head.get(path))
    return [Put(path, head[path]) if path in head else Remove(path) for path in changed]


def _conflicts(repo: Repo, pull: Pull) -> list[str]:
    """Return the files that main changed since in another way."""
    base, head, main = (repo.commit(revision).files for revision in (pull.base, pull.ref, "main"))
    paths = [change.path for change in _changes(repo, pull)]
    return [path for path in paths if main.get(path) not in (base.get(path), head.get(path))]


def _read(repo: Repo, request: Request) -> Pull:
    path = repo.path / "pulls" / f"{request.path_params['number']}.json"
    if not path.exists():
        raise Refusal(404, f"There is no pull request {request.path_params['number']}")
    record: dict[str, Any] = json.loads(path.read_bytes())
    return Pull(**record)


def _write(repo: Repo, pull: Pull) -> None:
    write_atomically(repo.path / "pulls" / f"{pull.number}.json", json.dumps(asdict(pull)).encode())
