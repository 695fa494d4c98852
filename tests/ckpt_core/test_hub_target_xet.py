"""Publishing through Xet, which the client picks by itself: no byte goes twice, and each wait has an end."""

import os
import shutil
import signal

import pytest
from hub_client import REPO, Client, files_below, line_for, sharded_files, write_export

from ckpt_core.errors import DamagedError, HubError
from ckpt_core.testing.hub_faults import Fault, Faults

XET = {"HF_HUB_DISABLE_XET": "0"}


@pytest.fixture
def faults():
    """Give a plan without faults."""
    return Faults()


@pytest.fixture
def client(tmp_path, faults):
    """Run a server, and a caller that uses Xet."""
    with Client(tmp_path, XET, faults=faults) as running:
        yield running


def sent_to_xet(client):
    """Return the bytes of weights that were sent."""
    return sum(request.received for request in client.log if "/xorbs/" in request.path)


def test_the_life_of_a_release(client, tmp_path):
    """Each byte is sent once, an unchanged release sends nothing, a changed shard itself, and a rollback no weights."""
    first = client.publish(write_export(tmp_path / "first", sharded_files([1, 2, 3, 4], 300_000)))
    assert first["tag"] == "v1"
    assert not [path for method, path, _ in client.requests if method == "PUT" or "info/lfs" in path]
    shard = (tmp_path / "first/model-00001-of-00004.safetensors").stat().st_size
    assert 4 * shard <= sent_to_xet(client) < 4.2 * shard

    client.log.clear()
    assert client.publish(tmp_path / "first") == {**first, "created": False}
    assert sum(request.received for request in client.log) == 0
    assert not [path for path in client.opened if path.endswith(".safetensors")]

    second = client.publish(write_export(tmp_path / "second", sharded_files([1, 2, 9, 4], 300_000)))
    assert shard <= sent_to_xet(client) < 1.2 * shard
    client.log.clear()
    back = client.call("roll_back", REPO, "v1")
    assert sent_to_xet(client) == 0
    assert client.titles() == ["Roll back to v1", "Publish v2", "Publish v1", "initial commit"]
    for release, name in ((second, "second"), (back, "first")):
        place = tmp_path / f"copy of {name}"
        client.call("download", REPO, release["commit"], directory=str(place))
        assert files_below(place).items() >= files_below(tmp_path / name).items()


def test_killed_in_the_middle_a_rerun_completes_the_release(client, tmp_path):
    """A publisher that dies with -9 as its second shard arrived leaves main as it was; the rerun is the one release."""
    export = write_export(tmp_path / "export", sharded_files([1, 2, 3], 300_000))
    publisher = client.start_worker()
    arrived = []

    def kill(_, path, __):
        arrived.extend([path] * ("/shards" in path))
        if len(arrived) == 2 and publisher.poll() is None:
            os.kill(publisher.pid, signal.SIGKILL)

    client.on_request = kill
    publisher.communicate(line_for("publish", export, REPO), timeout=60)
    assert publisher.returncode == -signal.SIGKILL
    client.on_request = lambda *_: None
    assert client.titles() == ["initial commit"]
    release = client.publish(export)
    shard = (export / "model-00001-of-00003.safetensors").stat().st_size
    assert sent_to_xet(client) < 3.5 * shard
    assert client.titles() == ["Publish v1", "initial commit"]
    refs = client.repo.refs()
    assert (refs.tags, refs.branches) == ({"v1": release["commit"]}, {"main": release["commit"]})


def test_a_storage_that_never_answers_is_given_up(client, faults, tmp_path):
    """Xet's client waits for ever for the last answer to an upload; a publication does not."""
    export = write_export(tmp_path / "export", sharded_files([1, 2], 300_000))
    faults.add(Fault(kind="delay", seconds=100, on=lambda _, path: "/shards" in path, times=100))
    with pytest.raises(HubError, match=r"in Xet did not end within .* s; run it again"):
        client.call_alone({"TEST_XET_SECONDS": "1"}, "publish", export, REPO)
    assert client.titles() == ["initial commit"]
    faults.clear()
    assert client.publish(export)["tag"] == "v1"


def test_a_server_that_begins_anew_is_told_of(client, tmp_path):
    """When a server lost what the client remembers to have sent, the error says what to delete, and that helps."""
    export = write_export(tmp_path / "export", sharded_files([1, 2], 300_000))
    client.publish(export)
    shutil.rmtree(client.directory / "team")
    for path in (client.directory / ".xet").rglob("*"):
        if path.is_file():
            path.unlink()
    cache = tmp_path / "home/xet"
    with pytest.raises(HubError, match=f"does not have what this machine remembers.*delete {cache}, then run it again"):
        client.call_alone({}, "publish", export, REPO)
    shutil.rmtree(cache)
    assert client.call_alone({}, "publish", export, REPO)["created"] is True
    client.call("download", REPO, "v1", directory=str(tmp_path / "copy"))
    assert files_below(tmp_path / "copy").items() >= files_below(export).items()


def test_weights_of_another_digest_do_not_arrive(client, tmp_path):
    """Weights that changed and look as old as their digest are found before a byte is sent."""
    export = write_export(tmp_path / "export", sharded_files([1, 2], 300_000))
    path = export / "model-00001-of-00002.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(path, (0, 0))
    with pytest.raises(DamagedError, match=r"model-00001-of-00002\.safetensors: was changed after"):
        client.publish(export)
    assert client.titles() == ["initial commit"]
    assert sent_to_xet(client) == 0
