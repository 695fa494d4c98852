"""What went wrong at the Hub, in this library's errors: what to do about it, and never the token."""

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from ckpt_core.errors import CkptError, HubAuthError, HubConflictError, HubError
from ckpt_core.hub.connection import IDLE_SECONDS, Connection

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

T = TypeVar("T")

_LONGEST_MESSAGE = 500
_UNAUTHORIZED, _FORBIDDEN, _NOT_FOUND, _CONFLICT, _STALE = 401, 403, 404, 409, 412
_TOO_LARGE, _TOO_MANY = 413, 429
_SERVER_ERRORS = 500
_RERUN = "run it again: what arrived is found and not sent twice"


def at_hub(hub: Connection, repo_id: str, action: Callable[[], T]) -> T:
    """Run an action that speaks to the Hub; what the client raises becomes a HubError.

    The error is raised outside the handler, so that it carries neither the client's error nor its request, which holds
    the token.
    """
    from huggingface_hub.utils import httpx

    try:
        return action()
    except CkptError:
        raise
    except (httpx.HTTPError, OSError, ValueError, LookupError, RuntimeError) as problem:
        error = _explain(hub, f"{hub.endpoint}/{repo_id}", problem)
    raise error


def _explain(hub: Connection, where: str, problem: BaseException) -> HubError:
    from huggingface_hub.utils import httpx

    answer = _http_error(problem)
    if answer is not None:
        return _explain_status(hub, where, answer)
    if isinstance(problem, httpx.TimeoutException):
        return HubError(f"{where}: no answer within {IDLE_SECONDS:g} s; {_RERUN}")
    if isinstance(problem, httpx.TransportError):
        return HubError(
            f"{where}: the Hub cannot be reached ({_short(hub, problem)}); check the address and the network"
        )
    return HubError(f"{where}: {type(problem).__name__}: {_short(hub, problem)}; {_RERUN}")


def _explain_status(hub: Connection, where: str, problem: "HfHubHTTPError") -> HubError:
    status = problem.response.status_code
    said = hub.hide_token((problem.server_message or "").strip()[:_LONGEST_MESSAGE])
    found = f"{where}: HTTP {status}" + (f" ({said})" if said else "")
    if status == _UNAUTHORIZED:
        advice = "the Hub did not accept the token" if hub.token else "no token was sent"
        return HubAuthError(f"{found}: {advice}; set HF_TOKEN to a valid one, or run hf auth login")
    if status == _FORBIDDEN:
        return HubAuthError(
            f"{found}: the token lacks write permission to this repository; set HF_TOKEN to one that has it"
        )
    if status in (_STALE, _CONFLICT):
        return HubConflictError(
            f"{found}: somebody else changed the repository meanwhile; look at it, then run it again"
        )
    return HubError(f"{found}: {_hint(status)}")


def _hint(status: int) -> str:
    if status == _NOT_FOUND:
        return "the repository, revision or file is not there, or is private and the token may not see it"
    if status == _TOO_LARGE:
        return "the commit or the account's storage is over the Hub's limit"
    if status == _TOO_MANY:
        return "too many requests; wait a few minutes, then run it again"
    if status >= _SERVER_ERRORS:
        return f"the Hub failed, and may still have done it; {_RERUN}"
    return "the Hub refused the request; its message says why"


def _http_error(problem: BaseException) -> "HfHubHTTPError | None":
    """Find the HTTP answer behind an error: the client wraps that of an upload in a RuntimeError."""
    from huggingface_hub.errors import HfHubHTTPError

    current: BaseException | None = problem
    while current is not None:
        if isinstance(current, HfHubHTTPError):
            return current
        current = current.__cause__
    return None


def _short(hub: Connection, problem: BaseException) -> str:
    causes = [str(problem)] + ([str(problem.__cause__)] if problem.__cause__ else [])
    return hub.hide_token(": ".join(" ".join(cause.split()) for cause in causes))[:_LONGEST_MESSAGE]
