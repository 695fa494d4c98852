"""Every target keeps the contract: a local Hub, a directory, fsspec's memory, and S3 as a real server speaks it."""

import os
import uuid

import pytest
from hub_client import Client, Here, files_below, model_files, sharded_files, weights, write_export
from object_stores import s3_server  # noqa: F401 - a fixture

from ckpt_core.errors import ArgumentError, DamagedError, HubConflictError, HubError


@pytest.fixture(scope="module")
def hub_client(tmp_path_factory):
    """Run one server, and one process that calls it, for all tests here."""
    with Client(tmp_path_factory.mktemp("hub")) as running:
        yield running


@pytest.fixture(params=["hub", "directory", "memory"])
def target(request, tmp_path):
    """Return who calls, and the address of a target that is not there yet."""
    if request.param == "hub":
        return request.getfixturevalue("hub_client"), f"team/model-{uuid.uuid4().hex}"
    if request.param == "directory":
        return Here(), str(tmp_path / "releases")
    if request.param == "memory":
        return Here(), f"memory://{uuid.uuid4().hex}/releases"
    return Here(), f"{request.getfixturevalue('s3_server').new_bucket()}/some/releases"


@pytest.fixture
def make(tmp_path):
    """Return a function that writes an export, the same for the same seed."""
    return lambda seed: write_export(tmp_path / f"export-{seed}", model_files(seed))


def copy_of(target, revision, directory):
    """Return the files of a revision, but for the card."""
    caller, where = target
    caller.call("download", where, revision, directory=str(directory))
    return {name: data for name, data in files_below(directory).items() if name != "README.md"}


@pytest.mark.parametrize("target", ["hub", "directory", "memory", "s3"], indirect=True)
def test_the_life_of_a_release(target, make, tmp_path):
    """Published, it is served as v1; again, nothing is created; another is v2, of exactly its own files."""
    caller, where = target
    assert caller.call("served", where) is None
    first = caller.call("publish", make(1), where)
    assert (first["tag"], first["created"], first["files"]) == ("v1", True, 5)
    assert caller.call("publish", make(1), where) == {**first, "created": False}
    other = write_export(tmp_path / "other", {"model.safetensors": weights(2), "new.txt": b"1"})
    second = caller.call("publish", other, where)
    assert (second["tag"], second["created"]) == ("v2", True)
    assert second["commit"] != first["commit"]
    assert caller.call("served", where) == {**second, "created": False}
    assert copy_of(target, "v2", tmp_path / "v2") == files_below(other)
    assert copy_of(target, first["commit"], tmp_path / "v1") == files_below(make(1))


def test_a_release_is_taken_back_and_given_again(target, make, tmp_path):
    """Rolled back, main has the old tree at a new commit; publishing either again goes on from there."""
    caller, where = target
    first, second = (caller.call("publish", make(seed), where) for seed in (1, 2))
    back = caller.call("roll_back", where, "v1")
    assert (back["tag"], back["created"]) == ("v1", True)
    assert back["commit"] not in (first["commit"], second["commit"])
    assert caller.call("served", where) == {**back, "created": False}
    assert copy_of(target, back["commit"], tmp_path / "back") == files_below(make(1))
    assert copy_of(target, second["commit"], tmp_path / "second") == files_below(make(2))
    assert caller.call("roll_back", where, "v1") == {**back, "created": False}
    assert caller.call("publish", make(1), where) == {**back, "created": False}
    again = caller.call("publish", make(2), where)
    assert (again["tag"], again["created"]) == ("v3", True)
    assert caller.call("roll_back", where, "v2")["created"] is False


def test_an_unknown_release_is_not_rolled_back_to(target, make):
    """A tag that is not there is refused with those that are, and so is a target that is not there."""
    caller, where = target
    with pytest.raises(HubError, match="there is nothing here"):
        caller.call("roll_back", where, "v1")
    caller.call("publish", make(1), where)
    caller.call("publish", make(2), where, tag="best")
    with pytest.raises(ArgumentError, match=r"has no tag 'v9' to roll back to; it has best, v1"):
        caller.call("roll_back", where, "v9")


def test_a_candidate_is_not_served_until_it_is_promoted(target, make):
    """What is staged leaves main as it is, is found again when it is staged again, and is one commit when promoted."""
    caller, where = target
    first = caller.call("publish", make(1), where)
    candidate = caller.call("stage", make(2), where)
    assert candidate["parent"] == first["commit"]
    assert caller.call("stage", make(2), where) == candidate
    assert caller.call("served", where) == {**first, "created": False}
    release = caller.call("promote", where, candidate)
    assert (release["tag"], release["created"]) == ("v2", True)
    assert caller.call("served", where) == {**release, "created": False}
    assert caller.call("promote", where, candidate | {"commit": release["commit"]})["created"] is False


def test_a_rejected_candidate_leaves_nothing(target, make, tmp_path):
    """A candidate that is discarded is gone, main stays, and the same export can be staged again; twice is fine."""
    caller, where = target
    first = caller.call("publish", make(1), where)
    for _ in range(2):
        candidate = caller.call("stage", make(2), where)
        caller.call("discard", where, candidate)
        caller.call("discard", where, candidate)
        with pytest.raises(HubError):
            caller.call("download", where, candidate["name"], directory=str(tmp_path / "gone"))
    assert caller.call("served", where) == {**first, "created": False}
    assert caller.call("publish", make(2), where)["tag"] == "v2"


@pytest.mark.parametrize("target", ["hub", "directory", "memory", "s3"], indirect=True)
def test_who_comes_second_is_told(target, make):
    """Of two candidates for the same place one is promoted; the other is a conflict that names what came first."""
    caller, where = target
    first = caller.call("publish", make(1), where)
    candidates = [caller.call("stage", make(seed), where) for seed in (2, 3)]
    release = caller.call("promote", where, candidates[1])
    with pytest.raises(HubConflictError, match=r"somebody else moved main from .* to .*Publish v2.*nothing was overw"):
        caller.call("promote", where, candidates[0])
    assert caller.call("served", where) == {**release, "created": False}
    with pytest.raises(HubConflictError, match=r"the decision to publish was made against .*nothing was sent"):
        caller.call("publish", make(4), where, parent=first["commit"])
    assert caller.call("publish", make(4), where, parent=release["commit"])["tag"] == "v3"


def test_the_same_release_from_two_is_one(target, make):
    """Two that stage the same export share the candidate, and the second promotion finds the first."""
    caller, where = target
    candidates = [caller.call("stage", make(1), where) for _ in range(2)]
    first = caller.call("promote", where, candidates[0])
    assert caller.call("publish", make(1), where) == {**first, "created": False}


def test_a_tag_of_ones_own_names_one_release(target, make):
    """It is set once, found again, refused for another export before anything is sent, and leads back to its own."""
    caller, where = target
    first = caller.call("publish", make(1), where, tag="2026.1")
    assert first["tag"] == "2026.1"
    assert caller.call("publish", make(1), where, tag="2026.1")["created"] is False
    assert caller.call("publish", make(1), where) == {**first, "created": False}
    with pytest.raises(HubConflictError, match=r"the tag 2026\.1 is on commit"):
        caller.call("publish", make(2), where, tag="2026.1")
    assert caller.call("served", where) == {**first, "created": False}
    assert caller.call("publish", make(1), where, tag="also")["tag"] == "also"
    assert caller.call("publish", make(2), where)["tag"] == "v1"
    again = caller.call("publish", make(1), where, tag="2026.1")
    assert (again["tag"], again["created"]) == ("2026.1", True)
    assert caller.call("served", where)["commit"] == again["commit"]


def test_weights_that_changed_after_the_export_are_not_published(target, make, tmp_path):
    """Weights of the right size whose bytes are not those of `export.json` never become a candidate."""
    caller, where = target
    first = caller.call("publish", make(1), where)
    export = write_export(tmp_path / "export", {"model.safetensors": weights(2, 400_000)})
    content = bytearray((export / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (export / "model.safetensors").write_bytes(content)
    os.utime(export / "model.safetensors", (0, 0))  # as if it were as old as its digest
    with pytest.raises(DamagedError, match=r"model\.safetensors: was changed after .* it has sha256"):
        caller.call("publish", export, where)
    assert caller.call("served", where) == {**first, "created": False}


def test_a_shard_that_rotted_is_found_also_where_the_target_has_it(target, tmp_path):
    """An unchanged shard of the export is read before a new tag covers it, also where the target has its content."""
    caller, where = target
    first = caller.call("publish", write_export(tmp_path / "first", sharded_files([1, 2], 300_000)), where)
    second = write_export(tmp_path / "second", sharded_files([1, 9], 300_000))
    flip_last_bit(second / "model-00001-of-00002.safetensors")
    with pytest.raises(DamagedError, match=r"second/model-00001-of-00002\.safetensors: was changed after"):
        caller.call("publish", second, where)
    assert caller.call("served", where) == {**first, "created": False}
    flip_last_bit(second / "model-00001-of-00002.safetensors")
    assert caller.call("publish", second, where)["tag"] == "v2"


def test_another_tag_needs_a_sound_export(target, tmp_path):
    """A second tag for what is served covers an export that is read: one that rotted is refused."""
    caller, where = target
    export = write_export(tmp_path / "export", sharded_files([1], 300_000))
    first = caller.call("publish", export, where)
    flip_last_bit(export / "model-00001-of-00001.safetensors")
    with pytest.raises(DamagedError, match="was changed after"):
        caller.call("publish", export, where, tag="also")
    assert caller.call("publish", export, where) == {**first, "created": False}


def flip_last_bit(path):
    """Damage a file, or mend it, and leave it as old as its digest."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, (0, 0))


def test_every_byte_can_be_read_back(target, make):
    """With `read_back` a sound release passes, the first time and when it is served already."""
    caller, where = target
    assert caller.call("publish", make(1), where, read_back=True)["created"] is True
    assert caller.call("publish", make(1), where, read_back=True)["created"] is False
    caller.call("publish", make(2), where)
    assert caller.call("roll_back", where, "v1", read_back=True)["created"] is True
