"""A directory or bucket as a target: what lies where, what is shared, and what a death at any moment leaves."""

import errno
import json
import shutil
import threading
import uuid
from pathlib import Path

import fsspec
import pytest
from hub_client import files_below, model_files, sharded_files, weights, write_export

from ckpt_core import hub
from ckpt_core.errors import ArgumentError, DamagedError, HubConflictError, HubContentError, HubError
from ckpt_core.hub.bucket_files import LocalFiles, RemoteFiles
from ckpt_core.hub.bucket_target import BucketTarget
from ckpt_core.hub.target import State, open_target


@pytest.fixture
def export(tmp_path):
    """Write a small export."""
    return write_export(tmp_path / "export", model_files(1))


@pytest.fixture
def where(tmp_path):
    """Return a directory that is not there."""
    return str(tmp_path / "releases")


def test_what_lies_where(where, export):
    """Trees, commits and versions are plain files, main is a link to what is served, and nothing else stays."""
    release = hub.publish(export, where)
    root = Path(where)
    assert release.commit == "0000000001"
    [tree] = [path for path in (root / "trees").iterdir() if path.is_dir()]
    assert release.url == str(tree)
    assert (root / "main").readlink() == Path("trees", tree.name)
    assert files_below(root / "main").keys() == {*files_below(export), "README.md"}
    assert json.loads((root / "commits/0000000001.json").read_bytes()) == {
        "format_version": 1,
        "tree": tree.name,
        "parent": None,
        "message": "Publish v1",
    }
    assert json.loads((root / "versions/v1.json").read_bytes()) == {"format_version": 1, "commit": "0000000001"}
    assert not [path for path in root.rglob("*") if path.is_file() and "candidates" in path.parts]
    assert not [path for path in (root / ".incoming").rglob("*") if path.is_file()]
    hub.publish(write_export(export, model_files(2)), where)
    hub.roll_back(where, "v1")
    assert (root / "main").readlink() == Path("trees", tree.name)


def test_an_unchanged_shard_is_one_file(where, tmp_path):
    """A release in which one shard of three changed writes that one; the others are the same files as before."""
    hub.publish(write_export(tmp_path / "a", sharded_files([1, 2, 3], 1000)), where)
    sent = []
    hub.publish(
        write_export(tmp_path / "b", sharded_files([1, 9, 3], 1000)), where, progress=lambda *at: sent.append(at)
    )
    links = {path.name: path.stat().st_nlink for path in (Path(where) / "main").iterdir()}
    shards = [links[f"model-0000{number}-of-00003.safetensors"] for number in (1, 2, 3)]
    assert shards == [2, 1, 2]
    assert sent[-1][0] == sent[-1][1] == sum(path.stat().st_size for path in (Path(where) / "main").iterdir())


def test_an_unchanged_release_opens_no_weights(where, tmp_path, monkeypatch):
    """Publishing it again opens no large file of the export, and writes nothing at the target."""
    export = write_export(tmp_path / "export", {"model.safetensors": weights(1, 400_000), "config.json": b"{}"})
    first = hub.publish(export, where)
    before = {path: path.lstat().st_mtime_ns for path in Path(where).rglob("*")}
    (export / "model.safetensors").chmod(0)
    opened = []
    plain = Path.open
    monkeypatch.setattr(Path, "open", lambda path, *rest, **how: opened.append(path.name) or plain(path, *rest, **how))
    assert hub.publish(export, where).commit == first.commit
    assert "model.safetensors" not in opened
    assert {path: path.lstat().st_mtime_ns for path in Path(where).rglob("*")} == before


class DyingError(Exception):
    """The moment at which a process dies."""


class Dying(LocalFiles):
    """Files of a process that dies right before, or right after, its nth change."""

    def __init__(self, root, moment):
        super().__init__(root)
        self.left = moment

    def change(self, act, *arguments):
        """Make a change, unless it is time."""
        self.left -= 1
        if self.left == 0:
            raise DyingError
        result = act(*arguments)
        self.left -= 1
        if self.left == 0:
            raise DyingError
        return result

    def create(self, path, data):
        """Make a small file."""
        return self.change(super().create, path, data)

    def copy(self, source, target):
        """Link a file."""
        return self.change(super().copy, source, target)

    def send(self, content, path, scratch):
        """Write a file."""
        return self.change(super().send, content, path, scratch)

    def delete(self, path):
        """Delete a file."""
        return self.change(super().delete, path)

    def serve(self, directory):
        """Move the link."""
        return self.change(super().serve, directory)


def test_killed_at_any_moment_a_rerun_ends_in_one_release(tmp_path, monkeypatch):
    """Dead before or after each change, main serves the old release or the new one, and a rerun ends with v2, once."""
    old, new = (write_export(tmp_path / str(seed), model_files(seed)) for seed in (1, 2))
    first = hub.publish(old, tmp_path / "releases")
    moment, died = 0, True
    while died:
        moment += 1
        where = str(tmp_path / f"releases-{moment}")
        shutil.copytree(tmp_path / "releases", where, symlinks=True)
        with monkeypatch.context() as patch:
            dying = BucketTarget(where, Dying(Path(where), moment))
            patch.setattr("ckpt_core.hub.publication.open_target", lambda *_, dying=dying, **__: dying)
            try:
                hub.publish(new, where)
                died = False
            except DyingError:
                pass
        now = hub.served(where)
        assert now.commit in (first.commit, "0000000002")
        release = hub.publish(new, where)
        assert (release.tag, release.commit) == ("v2", "0000000002")
        state = open_target(where).read()
        assert state == State("0000000002", {"v1": "0000000001", "v2": "0000000002"})
        assert (Path(where) / "main").resolve() == Path(release.url)
        assert files_below(Path(where) / "main").items() >= files_below(new).items()
    assert moment > 15


def test_many_at_once_make_one_release_each_or_a_conflict(tmp_path, where):
    """Of several publishers at the same time each makes a commit of its own or is told of a conflict; none is lost."""
    exports = [write_export(tmp_path / f"export-{seed}", model_files(seed)) for seed in range(6)]
    outcomes = []

    def publish(export):
        try:
            outcomes.append(hub.publish(export, where))
        except HubConflictError as error:
            outcomes.append(error)

    threads = [threading.Thread(target=publish, args=(export,)) for export in exports]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    releases = [outcome for outcome in outcomes if isinstance(outcome, hub.Release)]
    state = open_target(where).read()
    assert len(outcomes) == 6
    assert sorted(release.commit for release in releases) == [f"{n + 1:010d}" for n in range(len(releases))]
    assert state.head == max(release.commit for release in releases)
    assert (Path(where) / "main").resolve() == Path(max(releases, key=lambda release: release.commit).url)


def test_a_damaged_file_is_found(where, export, tmp_path):
    """A byte flipped in a tree is found when it is downloaded or read back; a cut file when it is published again."""
    hub.publish(export, where)
    path = Path(where) / "main/model.safetensors"
    path.chmod(0o644)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(HubContentError, match=r"model\.safetensors of v1 arrived damaged"):
        hub.download(where, "v1", directory=tmp_path / "copy")
    with pytest.raises(HubContentError, match=r"serves other bytes.*model\.safetensors at 0000000001 has"):
        hub.publish(export, where, read_back=True)
    path.write_bytes(content[:-1])
    release = hub.publish(export, where)
    assert (Path(where) / "main/model.safetensors").read_bytes() == (export / "model.safetensors").read_bytes()
    assert release.tag == "v1"


@pytest.fixture(params=["directory", "memory"])
def anywhere(request, tmp_path):
    """Return the address of a directory or of objects, neither of which is there."""
    return str(tmp_path / "releases") if request.param == "directory" else f"memory://{uuid.uuid4().hex}/releases"


def rot(where, pattern):
    """Flip the last bit of a file of a target, in place: a file that is linked changes in all its trees."""
    if "://" in where:
        files = fsspec.filesystem("memory")
        [path] = files.glob(f"{where}/{pattern}")
        content = files.cat_file(path)
        files.pipe_file(path, content[:-1] + bytes([content[-1] ^ 1]))
        return
    [path] = Path(where).glob(pattern)
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))


def test_a_rotten_file_of_an_old_release_is_in_no_new_one(anywhere, tmp_path):
    """What the old tree has under a recorded digest is read before a new tree shares it, and sent where it rotted."""
    old, new = (write_export(tmp_path / str(seed), sharded_files([1, seed], 1000)) for seed in (2, 3))
    hub.publish(old, anywhere)
    rot(anywhere, "trees/*/model-00001-of-00002.safetensors")
    second = hub.publish(new, anywhere)
    copy = hub.download(anywhere, "v2", directory=tmp_path / "copy")
    assert files_below(copy).items() >= files_below(new).items()
    with pytest.raises(HubContentError, match=r"model-00001-of-00002\.safetensors is damaged.*stay as they are"):
        hub.roll_back(anywhere, "v1")
    assert hub.served(anywhere).commit == second.commit
    assert hub.publish(old, anywhere).tag == "v3"  # writes the damaged file of that tree again
    assert hub.roll_back(anywhere, "v2").tag == "v2"
    assert hub.roll_back(anywhere, "v1").created


def test_a_candidate_that_rotted_is_not_promoted(anywhere, tmp_path):
    """Between staging and promotion days may pass: the files are read again before main moves; staging mends them."""
    first = hub.publish(write_export(tmp_path / "first", model_files(1)), anywhere)
    export = write_export(tmp_path / "export", model_files(2))
    candidate = hub.stage(export, anywhere)
    rot(anywhere, f"trees/{candidate.commit}/model.safetensors")
    with pytest.raises(HubContentError, match=r"model\.safetensors is damaged"):
        hub.promote(anywhere, candidate)
    assert hub.served(anywhere).commit == first.commit
    assert hub.promote(anywhere, hub.stage(export, anywhere)).tag == "v2"
    assert files_below(hub.download(anywhere, "v2", directory=tmp_path / "copy")).items() >= files_below(export).items()


def test_a_rotten_release_gets_no_other_tag(anywhere, export):
    """Another tag for what is served is set after its files were read."""
    hub.publish(export, anywhere)
    rot(anywhere, "trees/*/model.safetensors")
    with pytest.raises(HubContentError, match=r"model\.safetensors is damaged"):
        hub.publish(export, anywhere, tag="also")
    assert open_target(anywhere).read().tags.keys() == {"v1"}


def test_a_list_of_other_digests_proves_nothing(anywhere, export):
    """A tree is named by its list, so digests that were changed with the files are found."""
    hub.publish(export, anywhere)
    rot(anywhere, "trees/*/model.safetensors")
    target = open_target(anywhere)
    tree = target.tree("0000000001")
    wrong = {path: target.digest("0000000001", path) for path in tree}
    record = {"format_version": 1, "files": {path: {"bytes": of[0], "sha256": of[1]} for path, of in wrong.items()}}
    place = f"{hub.served(anywhere).url}.json"
    with fsspec.open(place, "wb") as file:
        file.write(json.dumps(record).encode())
    with pytest.raises(HubContentError, match=r"\.json is not the list of the files that this tree was named by"):
        hub.roll_back(anywhere, "v1")
    assert hub.publish(export, anywhere).tag == "v1"  # mends both
    assert hub.roll_back(anywhere, "v1").tag == "v1"


def test_a_release_is_not_the_export(where, tmp_path):
    """An export's file that is a link, or that is changed in place later, changes nothing in a release."""
    (tmp_path / "elsewhere").write_bytes(weights(1))
    export = write_export(tmp_path / "export", model_files(1))
    (export / "model.safetensors").unlink()
    (export / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    hub.publish(export, where)
    for path in (tmp_path / "elsewhere", export / "config.json"):
        path.write_bytes(b"changed")
    served = Path(where) / "main"
    assert (served / "model.safetensors").read_bytes() == weights(1)
    assert not (served / "model.safetensors").is_symlink()
    assert (served / "config.json").read_bytes() == model_files(1)["config.json"]


def test_a_disk_that_fails_is_the_one_that_is_named(where, tmp_path, monkeypatch):
    """An export that cannot be read is damaged, by its own path; the target is not blamed."""
    export = write_export(tmp_path / "export", {"model.safetensors": weights(1, 400_000), "config.json": b"{}"})
    plain = Path.open

    def fail(path, *rest, **how):
        if path == export / "model.safetensors" and rest == ("rb",):
            raise OSError(errno.EIO, "Input/output error")
        return plain(path, *rest, **how)

    monkeypatch.setattr("ckpt_core.hub.publication.check_weights", lambda _: None)
    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(DamagedError, match=rf"^{export}/model\.safetensors: cannot be read \(Input/output error\)"):
        hub.publish(export, where)
    assert hub.served(where) is None


@pytest.mark.parametrize(
    ("path", "text", "message"),
    [
        ("commits/0000000001.json", "{", "0000000001.json is damaged"),
        ("versions/v1.json", '{"format_version": 2}', "format_version is 2, expected 1"),
        ("trees/{}.json", '{"format_version": 1, "files": {"../x": {}}}', "'../x' is not a path in a tree"),
        ("trees/{}.json", '{"format_version": 1, "files": {"x": {}}}', "json is damaged .KeyError: 'bytes'"),
        ("trees/{}.json", '{"format_version": 1, "files": []}', "json is damaged .AttributeError: "),
        ("commits/0000000001.json", '{"format_version": 1}', "0000000001.json is damaged .KeyError: 'tree'"),
        ("commits/0000000001.json", '{"format_version": 1, "tree": "../../x"}', "neither a commit nor a tag"),
    ],
)
def test_damaged_records_are_named(where, export, tmp_path, path, text, message):
    """A record that is cut, newer or hostile ends in an error that names it, and nothing is written elsewhere."""
    hub.publish(export, where)
    tree = (Path(where) / "main").readlink().name
    (Path(where) / path.format(tree)).write_text(text)
    with pytest.raises(HubError, match=message):
        hub.download(where, "v1", directory=tmp_path / "copy")


def test_objects_cannot_name_files_elsewhere(export, tmp_path, monkeypatch):
    """An object whose name leads out of its tree is refused before anything is written."""
    where = f"memory://{uuid.uuid4().hex}/releases"
    hub.publish(export, where)
    sizes = RemoteFiles.sizes
    monkeypatch.setattr(RemoteFiles, "sizes", lambda *at: {**sizes(*at), "../../evil": 1})
    with pytest.raises(HubContentError, match=r"'\.\./\.\./evil' is not a path in a tree"):
        hub.download(where, "v1", directory=tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()


def test_a_full_disk_is_named(where, export, monkeypatch):
    """An error of the file system is a HubError with the address, and a rerun completes the release."""

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(LocalFiles, "send", full)
        with pytest.raises(HubError, match=r"releases: .*No space left on device; run it again"):
            hub.publish(export, where)
    assert hub.served(where) is None
    assert hub.publish(export, where).tag == "v1"


def test_a_bucket_is_not_made_private(where, export):
    """Asking for a private directory is a mistake that is told before anything is written."""
    with pytest.raises(ArgumentError, match="who may read a directory or bucket is set where it is kept"):
        hub.publish(export, where, private=True)
    assert not Path(where).exists()


def test_a_bucket_is_plain_objects(export):
    """In a bucket the same files lie under the same names, but for the link."""
    name = uuid.uuid4().hex
    release = hub.publish(export, f"memory://{name}/releases")
    files = fsspec.filesystem("memory")
    found = {path.removeprefix(f"/{name}/releases/") for path in files.find(f"/{name}")}
    tree = release.url.rsplit("/", 1)[-1]
    names = {*files_below(export), "README.md"}
    assert found == {f"trees/{tree}/{path}" for path in names} | {
        f"trees/{tree}.json",
        "commits/0000000001.json",
        "versions/v1.json",
    }


def test_a_file_system_without_links_is_fine(where, tmp_path, monkeypatch):
    """Without hard and symbolic links a release sends all its files, has no link main, and still happens once."""

    def refuse(*_, **__):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("os.link", refuse)
    monkeypatch.setattr("os.symlink", refuse)
    exports = [write_export(tmp_path / str(last), sharded_files([1, 2, last], 1000)) for last in (3, 4)]
    assert [hub.publish(export, where).tag for export in exports] == ["v1", "v2"]
    assert not hub.publish(exports[1], where).created
    assert hub.roll_back(where, "v1").commit == "0000000003"
    copy = hub.download(where, "v2", directory=tmp_path / "copy")
    assert files_below(exports[1]).items() <= files_below(copy).items()
    assert not list(Path(where).glob("*main*"))
    candidate = hub.stage(exports[1], where)
    hub.publish(write_export(tmp_path / "other", model_files(5)), where)
    with pytest.raises(HubConflictError, match="somebody else moved main"):
        hub.promote(where, candidate)
