"""Trying again: how often, how long between, and what the server has to say about it."""

import pytest

from ckpt_core.hub import retries
from ckpt_core.hub.retries import asked_by, persist


class PassingError(Exception):
    """One that may be gone a little later."""


@pytest.fixture
def waits(monkeypatch):
    """Collect the seconds that are waited, without waiting."""
    found = []
    monkeypatch.setattr("tenacity.nap.time.sleep", found.append)
    return found


def failing(times, error=PassingError):
    """Return an action that fails that often, then returns how often it was run."""
    runs = []

    def action():
        runs.append(True)
        if len(runs) <= times:
            raise error(len(runs))
        return len(runs)

    return action


def passes(error):
    """Whether an error of these tests may be gone a little later."""
    return isinstance(error, PassingError)


def test_what_passes_is_tried_again_each_time_later(waits):
    """An action that fails four times succeeds the fifth time, after waits that double, give or take a second."""
    assert persist(failing(4), passes=passes) == 5
    assert [low <= wait <= low + retries.FIRST_WAIT_S for wait, low in zip(waits, [1, 2, 4, 8], strict=True)] == [
        True
    ] * 4


def test_there_is_an_end(waits):
    """The last error of all tries is raised as it is."""
    with pytest.raises(PassingError, match=f"^{retries.TRIES}$"):
        persist(failing(100), passes=passes)
    assert len(waits) == retries.TRIES - 1


def test_what_does_not_pass_is_not_tried_again(waits):
    """Another error ends it at once."""
    with pytest.raises(ValueError, match=r"^1$"):
        persist(failing(1, ValueError), passes=passes)
    assert waits == []


def test_a_wait_that_is_asked_for_is_kept(waits):
    """The wait is as long as the server wants, unless it wants more than is granted, which ends it."""
    assert persist(failing(1), passes=passes, asked=lambda _: 20.0) == 2
    assert waits == [20.0]
    with pytest.raises(PassingError):
        persist(failing(1), passes=passes, asked=lambda _: retries.LONGEST_ASKED_S + 1)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": " 7 "}, 7.0),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, None),
        ({"ratelimit": '"api";r=0;t=55', "ratelimit-policy": '"fixed window";"api";q=500;w=300'}, 55.0),
        ({"ratelimit": '"api";r=3;t=55'}, None),
    ],
)
def test_the_headers_say_how_long(headers, seconds):
    """Retry-After counts in seconds, else a rate limit that is used up."""
    assert asked_by(headers) == seconds
