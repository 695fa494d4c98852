"""Which names a repository, a branch, a tag and a path may have, and the refusal of all others."""

import re

_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?")
_REF = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._/-]{0,199}")
COMMIT = re.compile(r"[0-9a-f]{40}")
SHORT_COMMIT = re.compile(r"[0-9a-f]{5,40}")
SHA256 = re.compile(r"[0-9a-f]{64}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f\\]")
_LONGEST_PATH = 1024
_RESERVED = frozenset({"api", "datasets", "spaces"})  # where the Hub's own addresses begin


class Refusal(Exception):  # noqa: N818  a protocol answer, not a failure of this library
    """What the Hub answers instead of doing it: an HTTP status and the code that its client reads."""

    def __init__(self, status: int, message: str, *, code: str | None = None, commit: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.commit = commit


def not_found(repo_id: str) -> Refusal:
    """Return the refusal that there is no such repository."""
    return Refusal(404, f"Repository not found: {repo_id}", code="RepoNotFound")


def check_repo_id(repo_id: str) -> tuple[str, str]:
    """Return namespace and name; anything that is not two plain names is refused."""
    namespace, _, name = repo_id.partition("/")
    for part in (namespace, name):
        if not _NAME.fullmatch(part) or "--" in part or ".." in part or part.endswith(".git"):
            raise Refusal(400, f"Invalid repository id: {repo_id!r} is not <namespace>/<name>")
    if namespace in _RESERVED:
        raise Refusal(400, f"Invalid repository id: the namespace {namespace} is reserved")
    return namespace, name


def check_ref(name: str) -> None:
    """Refuse a branch's or tag's name that git would refuse, or that looks like a commit id."""
    parts = name.split("/")
    bad_part = any(not part or part.startswith(".") or part.endswith((".", ".lock")) for part in parts)
    if not _REF.fullmatch(name) or ".." in name or bad_part or COMMIT.fullmatch(name) or parts[0] == "refs":
        raise Refusal(400, f"Invalid branch or tag name: {name!r}")


def check_path(path: str) -> None:
    """Refuse a path that is not a plain relative one."""
    parts = path.split("/")
    if len(path) > _LONGEST_PATH or _CONTROL.search(path) or {"", ".", "..", ".git"} & set(parts):
        raise Refusal(400, f"Invalid path in a repository: {path!r}")
