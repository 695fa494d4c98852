"""A day compressed: retrains follow each other while things go wrong, and in the end all is as it should be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from day_campaign import FAULTS, Day, kept, left_behind, live_through, losses
from live_stack import wait_until
from stopping_story import Story, told

from tasks.config import HubSettings

pytestmark = pytest.mark.timeout(7200)
STEPS = 12
KEEP = 3
SETTLED = 2
"""After so many retrains a worker has loaded all that it needs."""


@dataclass(frozen=True)
class Lived:
    """A day, and where it was."""

    story: Story
    day: Day


@pytest.fixture(
    scope="module",
    params=[
        pytest.param({"retrains": 5, "faults": 3, "seed": 13}, id="short"),
        pytest.param({"retrains": 30, "faults": 18, "seed": 2}, id="long", marks=pytest.mark.long),
    ],
)
def lived(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lived]:
    """A day; its figures are printed."""
    root = tmp_path_factory.mktemp("day")
    hub = HubSettings(repo_id=str(root / "releases"))
    with told(root, steps=STEPS, keep_checkpoints=KEEP, hub=hub) as story:
        day = live_through(story, **request.param)
        print("\n" + day.table())
        yield Lived(story, day)


def test_each_retrain_ends_in_a_true_state(lived: Lived):
    """Undisturbed ones are completed, and each fault has an end of its own."""
    for retrain in lived.day.retrains:
        ends = FAULTS[retrain.fault].ends if retrain.fault else {"Completed"}
        assert retrain.state in ends, retrain


def test_releases_only_improve(lived: Lived):
    """Each release is better than what was served before it, which is the release before it."""
    served: float | None = None
    for challenger, champion in losses(lived.story):
        assert champion == pytest.approx(served)
        assert served is None or challenger < served
        served = challenger
    assert served is not None


def test_the_store_holds_what_is_to_stay(lived: Lived):
    """The newest steps, the champion and the newest releases are there, and no other step."""
    there, wanted = kept(lived.story, KEEP)
    assert there == wanted


def test_nothing_is_left_behind(lived: Lived):
    """Soon there is no process, slot, lease, lock, or staging directory any more."""
    wait_until(lambda: left_behind(lived.story) == [], seconds=60, told=lambda: str(left_behind(lived.story)))


def test_the_worker_does_not_grow(lived: Lived):
    """Its memory is the same after the last retrain as after the first ones that it ran."""
    assert lived.day.growth_mb(SETTLED) < 30
