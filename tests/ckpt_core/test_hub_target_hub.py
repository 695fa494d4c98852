"""A local Hub as a target: what is tried again, what is not, and what an answer that was lost leads to."""

import os
import socket

import pytest
from hub_client import REPO, Client, model_files, sharded_files, write_export

from ckpt_core.errors import DamagedError, HubAuthError, HubConflictError, HubError
from ckpt_core.hub import retries
from ckpt_core.testing.hub_faults import Fault, Faults

REQUESTS = {
    "refs": ("GET", "/refs"),
    "create": ("POST", "/repos/create"),
    "branch": ("POST", "/branch/"),
    "tree": ("GET", "/tree/"),
    "card": ("POST", "/validate-yaml"),
    "candidate": ("POST", "/commit/candidate"),
    "paths": ("POST", "/paths-info/"),
    "small file": ("GET", "/resolve/"),
    "main": ("POST", "/commit/main"),
    "tag": ("POST", "/tag/"),
    "discard": ("DELETE", "/branch/"),
}
"""The requests of a publication, but for uploads, which the client tries again by itself, as it does trees."""


@pytest.fixture(scope="module")
def plan():
    """Give the plan of faults of all tests here."""
    return Faults()


@pytest.fixture(scope="module")
def shared(tmp_path_factory, plan):
    """Run one server, and one process that calls it, for all tests here."""
    with Client(tmp_path_factory.mktemp("hub"), faults=plan) as running:
        yield running


@pytest.fixture
def client(shared, plan):
    """Give the server without a repository and without faults."""
    yield shared
    plan.clear()
    shared.forget()


@pytest.fixture
def export(tmp_path):
    """Write a small export."""
    return write_export(tmp_path / "export", model_files(1))


def on(name):
    """Return a predicate of the requests of that name."""
    method, part = REQUESTS[name]
    return lambda asked, path: asked == method and part in path


def count(client, name):
    """Return how many requests of that name there were."""
    return sum(on(name)(method, path) for method, path, _ in client.requests)


def check_one_release(client, release):
    """Check that there is one release, and nothing else."""
    assert client.titles() == ["Publish v1", "initial commit"]
    refs = client.repo.refs()
    assert (refs.tags, refs.branches) == ({"v1": release["commit"]}, {"main": release["commit"]})
    assert client.repo.commit("main").files.keys() >= {"model.safetensors", "config.json", "export.json", "README.md"}


@pytest.mark.parametrize(
    ("name", "how"),
    [(name, how) for name in REQUESTS for how in ("cut", "504 after it was done")]
    + [("main", how) for how in ("503", "429", "lost")],
)
def test_what_fails_once_is_tried_again(client, plan, export, name, how):
    """Whatever request of a publication fails for a moment or loses its answer, there is one release in the end."""
    plan.add(
        {
            "503": Fault(kind="status", on=on(name)),
            "429": Fault(kind="status", status=429, retry_after=0, on=on(name)),
            "cut": Fault(kind="cut", on=on(name)),
            "lost": Fault(kind="lost", on=on(name)),
            "504 after it was done": Fault(kind="lost", status=504, on=on(name)),
        }[how]
    )
    release = client.publish(export)
    assert len(plan.struck) == 1
    check_one_release(client, release)


@pytest.mark.parametrize("name", ["refs", "candidate", "main", "tag"])
def test_what_fails_for_good_ends(client, plan, export, name):
    """A request that fails every time is sent a limited number of times; once the Hub is well, a rerun completes."""
    plan.add(Fault(kind="status", on=on(name), times=1000))
    with pytest.raises(HubError, match=r"HTTP 503.*run it again"):
        client.publish(export)
    assert len(plan.struck) == retries.TRIES
    plan.clear()
    check_one_release(client, client.publish(export))


@pytest.mark.parametrize(
    ("status", "error", "message"),
    [
        (401, HubAuthError, r"no token was sent; set HF_TOKEN"),
        (402, HubError, r"storage is full; delete what is not needed"),
        (403, HubAuthError, r"the token lacks write permission"),
        (413, HubError, r"over the Hub's limit; convert with a smaller --max-shard-size"),
        (412, HubConflictError, r"somebody else changed the repository meanwhile"),
    ],
)
@pytest.mark.parametrize("name", ["candidate", "main"])
def test_a_refusal_is_not_tried_again(client, plan, export, name, status, error, message):
    """A refused commit is sent once, its error says what to do, main is as it was, and a rerun completes."""
    plan.add(Fault(kind="status", status=status, on=on(name)))
    with pytest.raises(error, match=message):
        client.publish(export)
    assert count(client, name) == 1
    assert client.titles() == ["initial commit"]
    check_one_release(client, client.publish(export))


def test_a_long_wait_is_not_waited_for(client, plan, export):
    """A Hub that wants no request for an hour is told of at once, also where the client would wait by itself."""
    for on_path in ("/preupload/", "/commit/main"):
        plan.add(Fault(kind="status", status=429, retry_after=3600, on=lambda _, path, part=on_path: part in path))
        with pytest.raises(HubError, match=r"wants no request for 3600 s; run it again then"):
            client.publish(export)
        plan.clear()
    check_one_release(client, client.publish(export))


def test_a_flipped_byte_of_an_upload_does_not_arrive(client, plan, export):
    """Bytes that change on their way are refused by their digest; main is as it was, and a rerun completes."""
    plan.add(Fault(kind="flip", body="request", at=5000, on=lambda method, _: method == "PUT"))
    with pytest.raises(HubError, match=r"HTTP 422 \(The bytes sent have sha256"):
        client.publish(export)
    assert client.titles() == ["initial commit"]
    check_one_release(client, client.publish(export))


def test_what_was_sent_is_not_sent_again(client, plan, tmp_path):
    """When the second of three shards fails for good, a rerun sends that one and the third, and tells of bytes."""
    export = write_export(tmp_path / "export", sharded_files([1, 2, 3], 300_000))
    plan.add(Fault(kind="status", status=403, on=lambda method, path: method == "PUT" and len(puts(client)) == 1))
    with pytest.raises(HubError):
        client.publish(export)
    first = puts(client)
    client.requests.clear()
    client.publish(export)
    assert len(first) == 2  # the second of them was refused
    assert len(set(first + puts(client))) == 3
    assert first[0] not in puts(client)


def test_a_file_that_changes_while_it_is_sent_is_not_tagged(client, tmp_path):
    """Weights that are written to during their upload are no release, though the bytes that were sent were right."""
    export = write_export(tmp_path / "export", sharded_files([1], 300_000))
    path = export / "model-00001-of-00001.safetensors"

    def change(method, *_):
        if method == "PUT":
            times, content = path.stat(), path.read_bytes()
            path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))

    client.on_request = change
    with pytest.raises(DamagedError, match=r"model-00001-of-00001\.safetensors: was changed while it was sent"):
        client.publish(export)
    assert client.titles() == ["initial commit"]
    assert not client.repo.refs().tags


def puts(client):
    """Return the addresses that bytes were sent to."""
    return [path for method, path, _ in client.requests if method == "PUT"]


def test_progress_is_told_in_bytes(client, tmp_path, monkeypatch, capsys):
    """After each shard, and after the small files, a publication tells how many bytes went, of how many."""
    from ckpt_core import hub

    export = write_export(tmp_path / "export", sharded_files([1, 2], 300_000))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    told = []
    hub.publish(export, REPO, endpoint=client.endpoint, progress=lambda done, total: told.append((done, total)))
    total = told[0][1]
    sizes = [(export / f"model-0000{number}-of-00002.safetensors").stat().st_size for number in (1, 2)]
    assert told == [(sizes[0], total), (sum(sizes), total), (total, total)]
    assert total == sum(entry.size for path, entry in client.repo.commit("main").files.items() if path[0] != ".")


def test_a_hub_that_stops_answering_ends_the_publication(client, plan, tmp_path, export):
    """A Hub that takes the commit and says nothing is given up after the idle deadline, each time."""
    plan.add(Fault(kind="delay", seconds=60, on=on("main"), times=1000))
    with pytest.raises(HubError, match=r"no answer within 0\.3 s; run it again"):
        client.call_alone({"TEST_IDLE_SECONDS": "0.3"}, "publish", export, REPO)
    assert len(plan.struck) == retries.TRIES
    plan.clear()
    check_one_release(client, client.publish(export))


def test_a_port_that_only_listens_is_given_up(tmp_path, export):
    """A connection that is taken and never answered ends in an error that says how long was waited."""
    with Client(tmp_path) as client, socket.create_server(("127.0.0.1", 0)) as listener:
        endpoint = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(HubError, match="no answer within"):
            client.call_alone({"TEST_IDLE_SECONDS": "0.2"}, "publish", export, REPO, endpoint=endpoint)
