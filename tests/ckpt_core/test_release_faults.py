"""Every request of a release goes wrong in every way, and its process dies around each: a rerun ends it well."""

from itertools import count

import pytest
from release_campaign import IDLE_SECONDS, SCENES, Campaign

from ckpt_core.testing.hub_faults import Fault

FAULTS = {
    "429": {"kind": "status", "status": 429, "retry_after": 0},
    "500": {"kind": "status", "status": 500},
    "503": {"kind": "status", "status": 503},
    "412": {"kind": "status", "status": 412},
    "504 after success": {"kind": "lost", "status": 504},
    "lost": {"kind": "lost"},
    "timeout": {"kind": "delay", "seconds": 3 * IDLE_SECONDS},
    "cut": {"kind": "cut"},
    "cut in its body": {"kind": "cut", "body": "request", "at": 40},
    "flipped byte": {"kind": "flip", "body": "request", "at": 40},
}
REFUSED = {"412", "flipped byte"}
"""What the same request may not be sent again after."""

SHORT = [("first release", name) for name in FAULTS if name not in ("lost", "cut in its body")]
SHORT += [("next release", "lost"), ("roll back", "lost")]
LONG = [(scene, name) for scene in SCENES for name in FAULTS if (scene, name) not in SHORT]
FEWEST = {"first release": 20, "next release": 20, "roll back": 6}
"""Requests that each scene has at least: a campaign that found fewer struck nothing."""


@pytest.fixture(scope="module")
def campaign(tmp_path_factory):
    """Run one server, and one process that calls it, for all cases."""
    with Campaign(tmp_path_factory.mktemp("campaign")) as running:
        yield running


@pytest.fixture(scope="module")
def xet_campaign(tmp_path_factory):
    """The same with a client that uploads through Xet."""
    with Campaign(tmp_path_factory.mktemp("xet"), xet=True) as running:
        yield running


def fail_each(campaign, scene, name):
    """Let each request of a scene fail in one way; return how many there were."""
    for number in count(1):
        campaign.begin(scene)
        if not campaign.fail(Fault(on=number, **FAULTS[name]), passes=name not in REFUSED):
            return number - 1
        campaign.finish()
    raise AssertionError("unreachable")


@pytest.mark.parametrize(("scene", "name"), SHORT)
def test_each_request_fails(campaign, scene, name):
    """A request that fails leaves main as it was or as it should be, and a rerun ends with the one commit."""
    assert fail_each(campaign, scene, name) >= FEWEST[scene]


@pytest.mark.long
@pytest.mark.parametrize(("scene", "name"), LONG)
def test_each_request_fails_in_every_scene(campaign, scene, name):
    """The same holds of each way to fail in each scene."""
    assert fail_each(campaign, scene, name) >= FEWEST[scene]


@pytest.mark.long
@pytest.mark.parametrize("name", ["lost", "503"])
def test_each_request_fails_in_xet(xet_campaign, name):
    """The same holds of uploads through Xet."""
    assert fail_each(xet_campaign, "first release", name) >= FEWEST["first release"]


@pytest.mark.parametrize("scene", [pytest.param("next release", marks=pytest.mark.long), "first release", "roll back"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_the_process_ends_around_each_request(campaign, scene, when):
    """A publication that ends before or after a request, and is run again, ends with the one commit."""
    for number in count(1):
        campaign.begin(scene)
        died = campaign.die(number, when)
        campaign.finish()
        if not died:
            break
    assert number > FEWEST[scene]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("number", [1, 5, 9, 13])
def test_the_process_is_killed(campaign, number, when):
    """The same holds of a real process that is killed with SIGKILL."""
    campaign.begin("first release")
    assert campaign.kill(number, when)
    campaign.finish()
