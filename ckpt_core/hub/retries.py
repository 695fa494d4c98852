"""Trying again what failed for a moment: a few times, later each time, and not before the server wants it."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from tenacity import RetryCallState

T = TypeVar("T")

TRIES = 5
FIRST_WAIT_S = 1.0
LONGEST_WAIT_S = 30.0
LONGEST_ASKED_S = 300.0
"""The longest wait that a server is granted when it asks for one: the Hub counts requests in windows of 5 minutes."""


def persist(
    action: Callable[[], T],
    *,
    passes: Callable[[BaseException], bool],
    asked: Callable[[BaseException], float | None] = lambda _: None,
) -> T:
    """Run an action, and again while it fails in a way that passes: `TRIES` times at most.

    Between two tries it waits about twice as long as before, or as many seconds as the error `asked` for; an error
    that asks for more than `LONGEST_ASKED_S` is not waited for. The last error is raised as it is. The action must be
    one that may be run again although it was done.
    """
    from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential_jitter

    backoff = wait_exponential_jitter(initial=FIRST_WAIT_S, max=LONGEST_WAIT_S, jitter=FIRST_WAIT_S)

    def worthwhile(problem: BaseException) -> bool:
        return passes(problem) and (asked(problem) or 0) <= LONGEST_ASKED_S

    def wait(state: "RetryCallState") -> float:
        problem = state.outcome.exception() if state.outcome else None
        return max(backoff(state), (asked(problem) if problem else None) or 0)

    retrying = Retrying(retry=retry_if_exception(worthwhile), stop=stop_after_attempt(TRIES), wait=wait, reraise=True)
    return retrying(action)


def asked_by(headers: Mapping[str, str]) -> float | None:
    """Return the seconds to wait that an answer's headers ask for: `Retry-After`, or the end of a rate limit."""
    from huggingface_hub.utils._http import (  # pyright: ignore[reportPrivateUsage] the Hub's own form of a rate limit
        parse_ratelimit_headers,
    )

    after = headers.get("retry-after", "").strip()
    if after.isdecimal():
        return float(after)
    limit = parse_ratelimit_headers(headers)
    return float(limit.reset_in_seconds) if limit and limit.remaining == 0 else None
