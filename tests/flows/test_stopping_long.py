"""A server that is away for longer than Prefect's own patience."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from stopping_story import SLOW_S, STEPS, Stop, Story, told

from deployments.automations import lost_heartbeats
from deployments.stack import CRASHED_AFTER_S

pytestmark = [pytest.mark.timeout(1800), pytest.mark.long]
OUTAGE_S = 75.0


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    """A server, with the automation that misses heartbeats, and a worker."""
    with told(tmp_path_factory.mktemp("stopping")) as story:
        story.stack.post("/automations/", lost_heartbeats(CRASHED_AFTER_S).model_dump(mode="json"))
        yield story


def test_a_retrain_needs_no_server_for_75_s(story: Story):
    """The server goes away in the midst of training; the retrain does all the rest meanwhile, and is Completed."""
    story.stack.slow.write_text(str(SLOW_S))
    run = story.submit("outage")
    story.meet_training("outage")
    stop = Stop.now(story, "outage", run)
    story.stack.slow.unlink()
    story.stack.server_away(OUTAGE_S)
    attempt = stop.watched({}, seconds=300)
    assert attempt.ending.state == "Completed"
    assert STEPS in attempt.after
    assert story.staged("outage") == []
