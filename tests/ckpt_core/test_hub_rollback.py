"""Rolling back: by reference, verified, with all history, and from the command line."""

import json
import os
import signal
from pathlib import Path

import pytest
from hub_client import REPO, Client, files_below, line_for, model_files, sharded_files, write_export

from ckpt_core import hub
from ckpt_core.cli import main
from ckpt_core.errors import HubConflictError
from ckpt_core.testing.hub_faults import Fault, Faults
from ckpt_core.testing.hub_repo import Put


@pytest.fixture
def faults():
    """Give a plan without faults."""
    return Faults()


@pytest.fixture
def client(tmp_path, faults):
    """Run a server with two releases, of two shards each."""
    with Client(tmp_path, faults=faults) as running:
        for seeds in ([1, 2], [3, 4]):
            running.publish(write_export(tmp_path / "export", sharded_files(seeds, 300_000)))
        running.requests.clear()
        running.log.clear()
        yield running


def test_a_rollback_sends_no_weights(client):
    """It is one commit more on main, with exactly the old tree, and a few kilobytes on the wire."""
    release = client.call("roll_back", REPO, "v1")
    repo = client.repo
    assert client.titles() == ["Roll back to v1", "Publish v2", "Publish v1", "initial commit"]
    assert repo.commit("main").files == repo.commit("v1").files
    assert (release["tag"], release["commit"]) == ("v1", repo.resolve("main"))
    assert repo.refs().tags.keys() == {"v1", "v2"}
    assert repo.refs().branches.keys() == {"main"}
    assert sum(request.received + request.sent for request in client.log) < 40_000
    assert not [path for path in client.opened if path.endswith(".safetensors")]


@pytest.mark.parametrize("status", [None, 500, 504])
def test_a_lost_answer_is_recognised(client, faults, status):
    """When the commit landed and its answer did not come, the commit is found by its tree and not made again."""
    faults.add(Fault(kind="lost", status=status, on=lambda _, path: "/commit/" in path))
    release = client.call("roll_back", REPO, "v1")
    assert len(faults.struck) == 1
    assert client.titles()[:2] == ["Roll back to v1", "Publish v2"]
    assert release["commit"] == client.repo.resolve("main")


def test_killed_as_the_commit_landed_a_rerun_finds_it(client):
    """A process that dies with -9 at the answer to its commit has rolled back; the rerun changes nothing."""
    worker = client.start_worker()
    client.on_request = lambda _, path, __: os.kill(worker.pid, signal.SIGKILL) if "/commit/" in path else None
    worker.communicate(line_for("roll_back", REPO, "v1"), timeout=60)
    assert worker.returncode == -signal.SIGKILL
    client.on_request = lambda *_: None
    assert client.call("roll_back", REPO, "v1")["created"] is False
    assert client.titles()[:2] == ["Roll back to v1", "Publish v2"]


def test_somebody_who_comes_first_is_not_overwritten(client):
    """When main moves while a rollback is prepared, the rollback is a conflict that names the commit."""

    def intrude(_, path, __):
        if "/paths-info/" in path:
            client.on_request = lambda *_: None
            client.repo.apply("main", [Put("theirs.txt", client.repo.store(b"theirs"))], "theirs", "", None)

    client.on_request = intrude
    with pytest.raises(HubConflictError, match=r"'theirs' by local"):
        client.call("roll_back", REPO, "v1")
    assert client.titles()[0] == "theirs"


@pytest.fixture
def directory(tmp_path):
    """Return a directory with two releases."""
    for seed in (1, 2):
        hub.publish(write_export(tmp_path / f"export-{seed}", model_files(seed)), str(tmp_path / "releases"))
    return str(tmp_path / "releases")


def test_the_command_rolls_back(directory, tmp_path, capsys):
    """`ckpt rollback` serves the tag again, says so, and says when it was served already."""
    assert main(["rollback", directory, "--to", "v1", "--json"]) == 0
    release = json.loads(capsys.readouterr().out)
    assert (release["tag"], release["commit"], release["created"]) == ("v1", "0000000003", True)
    assert files_below(Path(directory) / "main").items() >= files_below(tmp_path / "export-1").items()
    assert main(["rollback", directory, "--to", "v1"]) == 0
    assert f"{directory} v1 was served already: {directory}/trees/" in capsys.readouterr().out


def test_the_command_lists_the_tags_there_are(directory, capsys):
    """`ckpt rollback` to a tag that is not there is misuse, and names those that are."""
    assert main(["rollback", directory, "--to", "v3"]) == 2
    assert "no tag 'v3' to roll back to; it has v1, v2" in capsys.readouterr().err
    assert main(["rollback", f"{directory}-elsewhere", "--to", "v1"]) == 1
    assert "there is nothing here" in capsys.readouterr().err


def test_the_command_publishes_to_a_directory(directory, tmp_path, capsys):
    """`ckpt publish EXPORT DIRECTORY` makes the next release; the same again creates nothing."""
    export = write_export(tmp_path / "export-3", model_files(3))
    for created in (True, False):
        assert main(["publish", str(export), directory, "--read-back", "--json"]) == 0
        release = json.loads(capsys.readouterr().out)
        assert (release["repo_id"], release["tag"], release["created"]) == (directory, "v3", created)
    assert main(["publish", str(export), directory, "--tag", "v1"]) == 1
    assert "the tag v1 is on commit 0000000001" in capsys.readouterr().err
