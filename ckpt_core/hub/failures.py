"""What went wrong at the Hub, in this library's errors: what to do about it, and never the token."""

import json
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from ckpt_core.errors import CkptError, HubAuthError, HubConflictError, HubError
from ckpt_core.hub import connection
from ckpt_core.hub.connection import Connection
from ckpt_core.hub.retries import asked_by

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

T = TypeVar("T")

_LONGEST_MESSAGE = 500
UNAUTHORIZED, PAYMENT, FORBIDDEN, NOT_FOUND, TIMEOUT = 401, 402, 403, 404, 408
CONFLICT, STALE, TOO_LARGE, TOO_MANY = 409, 412, 413, 429
_SERVER_ERRORS = 500
_RERUN = "run it again: what arrived is found and not sent twice"
_XET_REFUSED = re.compile(r"400 Bad Request.*/shards")  # the list of a file's chunks, of which some are not there
_CARD_REFUSED = "Invalid metadata in README.md. "
_FULL = ("quota", "storage", "limit")


def at_hub(hub: Connection, where: str, action: Callable[[], T]) -> T:
    """Run an action that speaks to the Hub; what the client raises becomes a HubError.

    The error is raised outside the handler and bare, so that it carries neither the client's error nor its request,
    which holds the token.
    """
    from huggingface_hub.utils import httpx

    try:
        return action()
    except CkptError as problem:
        error = problem
    except (httpx.HTTPError, OSError, ValueError, LookupError, RuntimeError) as problem:
        error = _explain(hub, where, problem)
    error.__cause__ = error.__context__ = None
    raise error


def status_of(problem: BaseException) -> int | None:
    """Return the HTTP status that an error of the client came from, if there was an answer."""
    answer = _http_error(problem)
    return answer.response.status_code if answer else None


def passes(problem: BaseException) -> bool:
    """Whether the same request may succeed a little later.

    What the client raises after retries of its own comes wrapped in a RuntimeError, and is not tried again.
    """
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import httpx

    if isinstance(problem, HfHubHTTPError):
        status = problem.response.status_code
        return status in (TIMEOUT, TOO_MANY) or status >= _SERVER_ERRORS
    broken = (httpx.TimeoutException, httpx.NetworkError, httpx.RemoteProtocolError, json.JSONDecodeError)
    return isinstance(problem, broken)  # a proxy's page instead of JSON is one of them


def asked_wait(problem: BaseException) -> float | None:
    """Return the seconds that a refused request is to wait before it is sent again, if the answer says."""
    answer = _http_error(problem)
    return asked_by(answer.response.headers) if answer else None


def _explain(hub: Connection, where: str, problem: BaseException) -> HubError:
    from huggingface_hub.utils import httpx

    card = " ".join(str(problem).split())
    if isinstance(problem, ValueError) and card.startswith(_CARD_REFUSED):
        reasons = hub.hide_token(card.removeprefix(_CARD_REFUSED))[:_LONGEST_MESSAGE]
        return HubError(
            f"{where}: the Hub does not accept the metadata of the card; correct it, then {_RERUN}. It says: {reasons}"
        )
    answer = _http_error(problem)
    if answer is not None:
        return _explain_status(hub, where, answer)
    if isinstance(problem, httpx.TimeoutException):
        return HubError(f"{where}: no answer within {connection.IDLE_SECONDS:g} s; {_RERUN}")
    if isinstance(problem, httpx.TransportError):
        return HubError(
            f"{where}: the Hub cannot be reached, or broke off ({_short(hub, problem)}); check the address and the"
            f" network, then {_RERUN}"
        )
    said = _short(hub, problem)
    if _XET_REFUSED.search(said):
        from huggingface_hub.constants import HF_XET_CACHE

        return HubError(
            f"{where}: the storage does not have what this machine remembers to have sent there ({said}); delete"
            f" {HF_XET_CACHE}, then run it again"
        )
    return HubError(f"{where}: {type(problem).__name__}: {said}; {_RERUN}")


def _explain_status(hub: Connection, where: str, problem: "HfHubHTTPError") -> HubError:
    status = problem.response.status_code
    said = hub.hide_token((problem.server_message or "").strip())[:_LONGEST_MESSAGE]  # cut, a token would show
    found = f"{where}: HTTP {status}" + (f" ({said})" if said else "")
    if status == UNAUTHORIZED:
        advice = "the Hub did not accept the token" if hub.token else "no token was sent"
        return HubAuthError(f"{found}: {advice}; set HF_TOKEN to a valid one, or run hf auth login")
    if status == FORBIDDEN and not any(word in said.lower() for word in _FULL):
        return HubAuthError(
            f"{found}: the token lacks write permission to this repository; set HF_TOKEN to one that has it"
        )
    if status in (STALE, CONFLICT):
        return HubConflictError(
            f"{found}: somebody else changed the repository meanwhile; look at it, then run it again"
        )
    return HubError(f"{found}: {_hint(status)}")


def _hint(status: int) -> str:
    if status == NOT_FOUND:
        return "the repository, revision or file is not there, or is private and the token may not see it"
    if status in (PAYMENT, FORBIDDEN):
        return (
            f"the account's storage is full; delete what is not needed there, or have its limit raised, then {_RERUN}"
        )
    if status == TOO_LARGE:
        return "the commit or a file is over the Hub's limit; convert with a smaller --max-shard-size"
    if status == TOO_MANY:
        return f"too many requests; wait a few minutes, then {_RERUN}"
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
    causes = dict.fromkeys(" ".join(str(each).split()) for each in (problem, problem.__cause__) if each is not None)
    return hub.hide_token(": ".join(causes))[:_LONGEST_MESSAGE]
