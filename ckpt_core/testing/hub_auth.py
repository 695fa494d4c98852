"""Who may read and write: the two tokens of a local Hub server."""

import hmac
from dataclasses import dataclass
from typing import Literal

from starlette.requests import Request

from ckpt_core.testing.hub_names import Refusal
from ckpt_core.testing.hub_repo import Repo

Role = Literal["nobody", "reader", "writer"]


@dataclass(frozen=True)
class Gate:
    """Without a `token` everybody may write; with one, only who sends it. The read-only token never may."""

    token: str | None = None
    read_only_token: str | None = None

    def role(self, request: Request) -> Role:
        """Tell what the sender of a request may do; a token that is neither is refused with 401."""
        bearer = _bearer(request)
        if _same(bearer, self.read_only_token):
            return "reader"
        if self.token is None or _same(bearer, self.token):
            return "writer"
        if bearer is not None:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return "nobody"

    def check_write(self, request: Request) -> None:
        """Refuse with 401 who has no token, with 403 whose token may only read."""
        role = self.role(request)
        if role == "nobody":
            raise Refusal(401, "Invalid username or password.")
        if role == "reader":
            raise Refusal(403, "You don't have the rights to write to this repository")

    def check_read(self, request: Request, repo: Repo) -> None:
        """Hide a private repository from who has no token, as if it were not there."""
        if self.role(request) == "nobody" and repo.settings["private"]:
            raise Refusal(401, "Repository not found", code="RepoNotFound")

    def check_known(self, request: Request) -> Role:
        """Refuse with 401 who sends no token at all."""
        role = self.role(request)
        if role == "nobody" or _bearer(request) is None:
            raise Refusal(401, "Invalid username or password.")
        return role


def _bearer(request: Request) -> str | None:
    scheme, _, value = request.headers.get("authorization", "").partition(" ")
    return value.strip() if scheme.lower() == "bearer" else None


def _same(sent: str | None, expected: str | None) -> bool:
    if sent is None or expected is None:
        return False
    return hmac.compare_digest(sent.encode(), expected.encode())
