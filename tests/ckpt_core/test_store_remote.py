"""A store without renames and locks: data first, then the manifest, and notes with a time on them."""

import errno
import itertools
import json
import threading
import time
import uuid
from dataclasses import replace
from importlib.resources import files
from types import SimpleNamespace

import fsspec
import jsonschema
import pytest
import torch
from object_stores import Fault, once, s3_server  # noqa: F401 - one is a fixture

from ckpt_core import PyTorchCheckpoint, durable
from ckpt_core.errors import (
    ArgumentError,
    CheckpointError,
    CommitError,
    DamagedError,
    NotACheckpointError,
    StepExistsError,
)
from ckpt_core.format.manifest import MANIFEST_NAME, Manifest, record_bytes
from ckpt_core.retention import Retention
from ckpt_core.store import Pruned, debris, manifest_cache, objects, open_checkpoint, open_store, records, step_name
from ckpt_core.store.checkpoint import is_newer
from ckpt_core.store.remote import RemoteStore
from ckpt_core.testing.store_contract import FILES, NEWEST, RUN, check, commit, everything, fill, steps

DAY = 24 * 3600


@pytest.fixture
def store():
    """An empty store in memory."""
    return RemoteStore(f"memory://{uuid.uuid4().hex}/store")


@pytest.fixture
def s3(s3_server):  # noqa: F811 - the fixture
    """An empty store on S3, and a server with an empty log."""
    store = open_store(f"{s3_server.new_bucket()}/store")
    s3_server.requests.clear()
    s3_server.failures.clear()
    s3_server.faults.clear()
    s3_server.heeds_conditions = True
    return store


@pytest.fixture
def clock(monkeypatch):
    """A clock to set: it runs on from the number of seconds that it is given."""
    real, offset = time.time, [0]
    monkeypatch.setattr(records.time, "time", lambda: real() + offset[0])
    return lambda seconds: offset.__setitem__(0, seconds)


class TestS3:
    """What goes over the wire."""

    def test_the_manifest_is_written_last_and_once(self, s3, s3_server):  # noqa: F811
        """All data is written before the manifest, which is written under `If-None-Match: *`."""
        commit(s3, 7)
        writes = [r for r in s3_server.requests if r.method == "PUT" and f"/{step_name(7)}/" in r.path]
        assert [request.condition for request in writes][-1] == "*"
        assert writes[-1].path.endswith(f"/{RUN}/{step_name(7)}/{MANIFEST_NAME}")
        assert sorted(request.path.split("/", 5)[-1].split("/", 1)[1] for request in writes[:-1]) == sorted(FILES)

    def test_sizes_come_from_one_listing(self, s3, s3_server):  # noqa: F811
        """Opening a step reads its manifest and lists its files: no request for each of them."""
        url = commit(s3, 7).url
        s3_server.requests.clear()
        open_checkpoint(url)
        assert not [request for request in s3_server.requests if "/model/" in request.path]
        assert len(s3_server.requests) <= 4, s3_server.requests

    def test_a_conflict_is_tried_again(self, s3, s3_server, monkeypatch):  # noqa: F811
        """Where S3 answers 409, which means that others write at the same time, the manifest is sent again."""
        s3_server.failures += [(409, False), (409, False)]
        commit(s3, 7)
        assert steps(s3.list(RUN)) == [7]
        monkeypatch.setattr("ckpt_core.store.objects._FIRST_WAIT_S", 0)
        s3_server.failures += [(409, False)] * 6
        with pytest.raises(CommitError, match="conflicting writes 6 times"):
            commit(s3, 8)
        assert steps(s3.list(RUN)) == [7]

    @pytest.mark.parametrize("status", [412, 400])
    def test_a_lost_answer(self, s3, s3_server, status):  # noqa: F811
        """A manifest that was written, though the answer says otherwise, is a commit: it is read back."""
        s3_server.failures.append((status, True))
        check(commit(s3, 7))
        check(s3.latest(RUN))

    def test_an_outcome_that_is_not_known(self, s3, s3_server, clock):  # noqa: F811
        """Where the manifest's writing failed it may still arrive: the data stays until nobody can wait for it."""
        s3_server.failures.append((400, False))
        with pytest.raises(CommitError, match="not known"):
            commit(s3, 7)
        assert len(everything(s3)) == len(FILES) + 1
        commit(s3, 7)
        clock(2 * DAY)
        s3.prune(RUN, NEWEST)
        check(s3.latest(RUN))
        assert len(everything(s3)) == len(FILES) + 1

    def test_writers_at_the_same_time(self, s3):
        """Of five writers that commit a step at the same moment exactly one wins, and its step is whole."""
        staged = [s3.stage(RUN, 7) for _ in range(5)]
        manifests = [fill(staging, 7, writer) for writer, staging in enumerate(staged)]
        barrier, won = threading.Barrier(5), []

        def race(writer):
            barrier.wait()
            try:
                staged[writer].commit(manifests[writer])
            except StepExistsError:
                return
            won.append(writer)

        threads = [threading.Thread(target=race, args=(writer,)) for writer in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for staging in staged:
            s3.release(staging)
        check(s3.latest(RUN), *won)
        assert len(won) == 1

    def test_a_store_that_cannot_be_reached(self, s3, s3_server):  # noqa: F811
        """A bucket that is not there is an OSError, or an empty store, never a crash of the client library."""
        missing = open_store("s3://no-such-bucket-anywhere/store")
        assert missing.runs() == []
        with pytest.raises(OSError, match="bucket"):
            missing.stage(RUN, 1)


LOST = Fault(500, "InternalError", carried_out=True)
SLOW_DOWN = Fault(503, "SlowDown")


class TestLostAnswers:
    """What was carried out though the answer says otherwise is recognised, whatever object it was."""

    @pytest.mark.parametrize("ending", [*FILES, MANIFEST_NAME])
    def test_of_a_commit(self, s3, s3_server, ending):  # noqa: F811
        """The request is sent again, and refused since the object is there: it is our own."""
        s3_server.faults.append(once("PUT", ending, LOST))
        check(commit(s3, 7))
        assert s3_server.faults == []

    def test_of_a_whole_checkpoint(self, s3, s3_server):  # noqa: F811
        """Files that PyTorchCheckpoint writes: torch's metadata, and tensors."""
        s3_server.faults += [once("PUT", f"/{name}", LOST) for name in (".metadata", "__0_0.distcp")]
        PyTorchCheckpoint(torch.nn.Linear(2, 2)).save(s3.url, step=1, run=RUN)
        assert s3_server.faults == []
        assert s3.latest(RUN).step == 1

    @pytest.mark.parametrize("query", ["uploads", "partNumber=1", ""])
    def test_of_an_upload_in_parts(self, s3, s3_server, query):  # noqa: F811
        """The beginning, a part and the end of an upload of many parts."""
        place, data = s3.root / "large", bytes(range(256)) * (80 << 10)

        def rule(environ):
            asked, method = environ.get("QUERY_STRING", ""), environ["REQUEST_METHOD"]
            ends = method == "POST" and asked.startswith("uploadId=")
            return LOST if (query in asked if query else ends) and method in {"PUT", "POST"} else None

        s3_server.faults.append(rule)
        sink = durable.create(place)
        sink.write(memoryview(data))
        sink.seal()
        assert s3_server.faults == []
        assert place.read_bytes() == data

    @pytest.mark.parametrize("begin", [b"other", b"mine!"])
    def test_of_an_object_that_is_anothers(self, s3, begin):
        """An object with other bytes is no answer that was lost: it stays, and that is an error."""
        place = s3.root / "file"
        objects.write(place, begin)
        for write in (lambda: durable.write_new(place, b"mine."), lambda: self.send(place, b"mine.")):
            with pytest.raises(FileExistsError):
                write()
        assert objects.read(place) == begin

    def send(self, place, data):
        """Write an object as the ranks do."""
        sink = durable.create(place)
        try:
            sink.write(memoryview(data))
            sink.seal()
        finally:
            sink.close()

    def test_a_busy_server(self, s3, s3_server):  # noqa: F811
        """Requests that are refused because there are too many are sent again."""
        commit(s3, 1)
        s3_server.faults += [
            once(method, ending, SLOW_DOWN)
            for method, ending in (
                ("PUT", FILES[0]),
                ("PUT", MANIFEST_NAME),
                ("GET", MANIFEST_NAME),
                ("POST", "?delete"),
            )
        ]
        commit(s3, 2)
        check(s3.latest(RUN))
        assert s3.prune(RUN, NEWEST) == Pruned(deleted=(1,))
        assert s3_server.faults == []

    def test_a_key_that_is_not_deleted(self, s3, s3_server):  # noqa: F811
        """S3 answers 200 where it refuses to delete some of many objects: that is told, and done the next time."""
        for step in (1, 2):
            commit(s3, step)
        prefix = "<?xml version='1.0'?><DeleteResult xmlns='http://s3.amazonaws.com/doc/2006-03-01/'><Error>"
        body = f"{prefix}<Key>k</Key><Code>AccessDenied</Code><Message>locked</Message></Error></DeleteResult>"
        refused = Fault(200, "", content=body.encode())
        for _ in range(2):  # the manifests, then the files
            s3_server.faults.append(lambda e: refused if e["REQUEST_METHOD"] == "POST" else None)
            (error,) = s3.prune(RUN, NEWEST).errors
            assert "AccessDenied" in error
        assert s3.prune(RUN, NEWEST).errors == ()
        assert len(everything(s3)) == len(FILES) + 1


class TestConditions:
    """A store that ignores `If-None-Match` is noticed."""

    def test_two_writers(self, s3, s3_server, caplog):  # noqa: F811
        """Of two that commit the same step one wins all the same: they look for each other's notes."""
        s3_server.heeds_conditions = False
        other = open_store(s3.url)
        first, second = s3.stage(RUN, 7), other.stage(RUN, 7)
        manifests = fill(first, 7, writer=1), fill(second, 7, writer=2)
        barrier, told = threading.Barrier(2), []

        def race(store, staging, manifest):
            barrier.wait()
            try:
                staging.commit(manifest)
            except StepExistsError:
                told.append(staging)
            store.release(staging)

        threads = [
            threading.Thread(target=race, args=each)
            for each in ((s3, first, manifests[0]), (other, second, manifests[1]))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(told) == 1
        check(s3.latest(RUN), writer=2 if told[0] is first else 1)
        assert len(everything(s3)) == len(FILES) + 1
        assert len([r for r in s3_server.requests if "/.probe-" in r.path and r.method == "PUT"]) <= 4

    def test_what_has_no_notes(self, s3, s3_server):  # noqa: F811
        """Where only the condition would keep two writers apart, the write is refused, and nothing is written."""
        s3_server.heeds_conditions = False
        with pytest.raises(CommitError, match="If-None-Match"):
            objects.create(s3.root / "record", b"x")
        assert everything(s3) == {}

    def test_it_is_tried_once(self, s3, s3_server):  # noqa: F811
        """Whether a bucket heeds it is found out once in a process, and leaves nothing."""
        for step in (1, 2, 3):
            commit(open_store(s3.url), step)
        tries = [r.method for r in s3_server.requests if "/.probe-" in r.path]
        assert tries == ["PUT", "PUT", "DELETE"]
        assert len(everything(s3)) == 3 * (len(FILES) + 1)

    def test_other_protocols(self):
        """Plugins that look first and write then are not trusted with it."""
        assert not objects.is_conditional(SimpleNamespace(fs=None, protocol="sftp", path="x"))


class TestCost:
    """How many requests are sent."""

    @pytest.fixture
    def many(self, s3, s3_server):  # noqa: F811
        """A run of 60 steps."""
        found = {}
        for step in range(60):
            files = {"x": record_bytes(b"x")}
            manifest = Manifest(run=RUN, step=step, time="", world_size=1, files=files, directory="d")
            base = f"{s3.root.path}/{RUN}/{step_name(step)}"
            found |= {f"{base}/d/x": b"x", f"{base}/{MANIFEST_NAME}": manifest.to_bytes()}
        s3.root.fs.pipe(found)
        s3_server.requests.clear()
        return s3

    def asked(self, s3_server, ask):  # noqa: F811
        """Do something; return its result, and how many requests it sent."""
        s3_server.requests.clear()
        return ask(), len(s3_server.requests)

    def test_many_steps(self, many, s3_server):  # noqa: F811
        """Steps are listed together, each manifest is read once, whoever lists again; steps are deleted together."""
        for store, most in ((many, 62), (many, 2), (open_store(many.url), 3)):
            found, requests = self.asked(s3_server, lambda store=store: store.list(RUN))
            assert steps(found) == list(range(60))
            assert requests <= most
        pruned, requests = self.asked(s3_server, lambda: many.prune(RUN, Retention(keep_last=10)))
        assert pruned == Pruned(deleted=tuple(range(50)))
        assert requests <= 50
        assert steps(open_store(many.url).list(RUN)) == list(range(50, 60))
        assert len(everything(many)) == 20 + 1

    def test_a_cache_that_is_none(self, s3, monkeypatch):
        """What is no cache of manifests is not used; nor is what it says of a step that has other bytes now."""
        monkeypatch.setattr(manifest_cache, "_WORTH_WRITING", 1)
        monkeypatch.setattr(manifest_cache, "_WORTH_READING", 1)
        for step in (1, 2):
            commit(s3, step)
        s3.list(RUN)
        place = s3.root / RUN / manifest_cache.NAME
        stored = objects.read(place)
        for content in (b"", b"{", b"[]", b"null", b'{"step_0000000001": 1}', b"[" * 100_000):
            objects.write(place, content)
            assert steps(open_store(s3.url).list(RUN)) == [1, 2]
        objects.write(place, stored)
        objects.write(s3.root / RUN / step_name(1) / MANIFEST_NAME, b"{")
        assert steps(open_store(s3.url).list(RUN)) == [2]

    def test_more_than_a_page(self, s3, monkeypatch):
        """What S3 lists and deletes with several requests is listed and deleted as a whole."""
        monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "3")
        monkeypatch.setattr(objects, "_BATCH", 2)
        for step in (1, 2, 3):
            commit(s3, step)
        assert steps(s3.list(RUN)) == [1, 2, 3]
        assert s3.prune(RUN, NEWEST) == Pruned(deleted=(1, 2))
        assert len(everything(s3)) == len(FILES) + 1


class TestExpiry:
    """Who died is told by the time."""

    def test_a_dead_writers_files(self, store, clock):
        """What a dead writer left goes a day and an hour later, with the next stage or prune, and not before."""
        fill(store.stage(RUN, 7), 7)
        fill(store.stage(RUN, 7), 7)
        assert len(everything(store)) == 2 * (len(FILES) + 1)
        clock(DAY)
        commit(store, 1)
        assert len(everything(store)) == 2 * (len(FILES) + 1) + len(FILES) + 1
        clock(DAY + 3700)
        store.prune(RUN, NEWEST)
        assert len(everything(store)) == len(FILES) + 1

    def test_a_writer_that_is_too_late(self, store, clock):
        """A writer whose files may be taken for debris does not commit."""
        staging = store.stage(RUN, 7)
        manifest = fill(staging, 7)
        clock(DAY + 1)
        with pytest.raises(CommitError, match="began more than 24 hours ago"):
            staging.commit(manifest)
        store.release(staging)
        assert everything(store) == {}

    def test_a_writer_that_died_after_the_commit(self, store, clock):
        """The note of a writer that died between its commit and its release goes, the step stays."""
        staging = store.stage(RUN, 7)
        staging.commit(fill(staging, 7))
        clock(2 * DAY)
        store.prune(RUN, NEWEST)
        check(store.latest(RUN))
        assert len(everything(store)) == len(FILES) + 1

    def test_a_dead_readers_lease(self, store, clock):
        """A reader that died keeps a step for a day; then it can be pruned, and the lease goes too."""
        first = commit(store, 1)
        commit(store, 2)
        lease = first.lease()
        lease.__enter__()
        assert store.prune(RUN, NEWEST) == Pruned(leased=(1,))
        clock(DAY + 3700)
        assert store.prune(RUN, NEWEST) == Pruned(deleted=(1,))
        assert len(everything(store)) == len(FILES) + 1
        lease.__exit__(None, None, None)

    def test_a_dead_pruners_lock(self, store, clock, monkeypatch):
        """Who died while it pruned locks the run for ten minutes; the error says until when."""
        monkeypatch.setattr(records, "_LOCK_WAIT_S", 0.1)
        commit(store, 1)
        records.write(store.root / RUN / records.LOCKS, "run", records.LOCK_S)
        with pytest.raises(CheckpointError, match=r"by somebody else .* UTC"):
            store.pin(RUN, "best", 1)
        clock(records.LOCK_S + 1)
        store.pin(RUN, "best", 1)
        assert store.pins(RUN) == {"best": 1}


class TestUnreadableManifests:
    """What is not known to be debris stays, and stops nothing else."""

    def spoil(self, place):
        """Make a manifest one of a later version."""
        place.write_bytes(place.read_bytes().replace(b'"format_version": 1', b'"format_version": 99'))

    def test_under_a_dead_writers_note(self, store, clock):
        """Files that a manifest that cannot be read may name stay, which is told; saving and pruning go on."""
        staging = store.stage(RUN, 7)
        self.spoil(staging.commit(fill(staging, 7)).path / MANIFEST_NAME)
        clock(2 * DAY)
        commit(store, 1)
        commit(store, 2)
        pruned = store.prune(RUN, NEWEST)
        assert pruned.deleted == (1,)
        assert len(pruned.errors) == 1
        assert "update ckptflow" in pruned.errors[0]
        assert any("left as it is" in sentence for sentence in store.repair(RUN))
        assert set(everything(store)) >= {f"{RUN}/{step_name(7)}/{staging.path.name}/{name}" for name in FILES}

    def test_that_is_none_under_a_dead_writers_note(self, store, clock):
        """A damaged step whose writer died can be set aside, though its note cannot be acted upon before."""
        staging = store.stage(RUN, 7)
        (staging.commit(fill(staging, 7)).path / MANIFEST_NAME).write_bytes(b"{")
        clock(2 * DAY)
        assert any("set aside" in sentence for sentence in store.repair(RUN))
        store.prune(RUN, NEWEST)
        assert all(name.startswith(f"{RUN}/.damaged-") for name in everything(store))
        assert len(everything(store)) == len(FILES) + 1

    def test_on_release(self, store):
        """A writer whose step another committed, unreadable here, is told of its own error, not of that."""
        first, second = store.stage(RUN, 7), store.stage(RUN, 7)
        manifest = fill(first, 7)
        self.spoil(second.commit(fill(second, 7)).path / MANIFEST_NAME)
        store.release(second)

        def save():
            try:
                first.commit(manifest)
            finally:
                store.release(first)

        with pytest.raises(StepExistsError):
            save()

    def test_in_the_trash(self, store):
        """What a pruner left stays if it cannot be read, and the rest of the run is pruned and repaired."""
        cut, _, _ = [commit(store, step) for step in (1, 2, 3)]
        trash = store.root / RUN / ".trash-0"
        (trash / "manifests.json").write_bytes(b"{")
        (cut.root / FILES[0]).write_bytes(b"cut")
        pruned = store.prune(RUN, NEWEST)
        assert pruned.deleted == (2,)
        assert trash.name in pruned.errors[0]
        said = store.repair(RUN)
        assert any("left as it is: what a pruner has yet to delete is not known" in sentence for sentence in said)
        assert (cut.root / FILES[1]).exists()


class TestInterrupted:
    """What Ctrl-C leaves."""

    def test_while_the_manifest_is_sent(self, store, monkeypatch, clock):
        """A commit that is interrupted while its manifest is sent keeps the data: the manifest may still come."""
        real, sent = objects.create, []

        def interrupted(place, data):
            sent.append((place, data))
            raise KeyboardInterrupt

        monkeypatch.setattr(objects, "create", interrupted)
        with pytest.raises(KeyboardInterrupt):
            commit(store, 7)
        real(*sent[0])
        check(store.latest(RUN))
        clock(2 * DAY)
        store.prune(RUN, NEWEST)
        check(store.latest(RUN))
        assert len(everything(store)) == len(FILES) + 1

    @pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("no network")])
    def test_while_others_locks_are_listed(self, store, monkeypatch, error):
        """Who wrote its note, and could not look for others', takes it back: nobody waits for it."""
        commit(store, 1)
        real = records.records_in

        def fail(directory):
            if directory.name == records.LOCKS:
                raise error
            return real(directory)

        with monkeypatch.context() as patch:
            patch.setattr(records, "records_in", fail)
            with pytest.raises(error if isinstance(error, type) else OSError):
                store.pin(RUN, "best", 1)
        assert records.records_in(store.root / RUN / records.LOCKS) == []


class TestPruners:
    """Readers, pruners and pins between each other's steps."""

    def test_a_reader_between_the_manifest_and_the_files(self, store, monkeypatch):
        """A reader that leased a step just before its manifest went keeps the files; they go with the next prune."""
        first = commit(store, 1)
        commit(store, 2)
        lease = first.lease()
        real = records.leased_keys
        looked = itertools.count()

        def leased_meanwhile(run):
            found = real(run)
            if next(looked) == 0:  # after the first look, before the manifest goes
                lease.__enter__()
            return found

        monkeypatch.setattr(records, "leased_keys", leased_meanwhile)
        assert store.prune(RUN, NEWEST) == Pruned(deleted=(1,))
        check(first)
        assert steps(store.list(RUN)) == [2]
        lease.__exit__(None, None, None)
        assert store.prune(RUN, NEWEST) == Pruned()
        assert len(everything(store)) == len(FILES) + 1

    @pytest.mark.parametrize("deleted", [False, True])
    def test_a_pruner_that_died(self, store, monkeypatch, deleted):
        """A pruner that died before the manifest went deleted nothing; after it, the next one finishes."""
        commit(store, 1)
        commit(store, 2)

        class DiedError(BaseException):
            pass

        def die(*_):
            raise DiedError

        target = "ckpt_core.store.debris.empty" if deleted else "ckpt_core.store.objects.delete_all"
        with monkeypatch.context() as patch:
            patch.setattr(target, die)
            with pytest.raises(DiedError):
                store.prune(RUN, NEWEST)
        for record in records.records_in(store.root / RUN / records.LOCKS):
            record.delete()
        assert steps(store.list(RUN)) == ([2] if deleted else [1, 2])
        before = everything(store)
        planned = store.repair(RUN, dry_run=True)
        assert everything(store) == before
        done = store.repair(RUN)
        assert planned == [sentence.replace(": removed;", ": would be removed;") for sentence in done]
        assert len(done) == 1
        assert steps(store.list(RUN)) == ([2] if deleted else [1, 2])
        assert len(everything(store)) == len(steps(store.list(RUN))) * (len(FILES) + 1)

    def test_saved_again_under_a_lease(self, store):
        """A step that was pruned and saved again is another one: it is not what was listed before."""
        listed = commit(store, 1)
        commit(store, 2)
        store.prune(RUN, NEWEST)
        commit(store, 1)
        with pytest.raises(NotACheckpointError), listed.lease():
            pytest.fail("leased")

    def test_a_pin_that_comes_between(self, store, monkeypatch):
        """A step that is pinned after the policy was applied, and before the manifest goes, stays."""
        commit(store, 1)
        commit(store, 2)
        real = RemoteStore._bury
        monkeypatch.setattr(RemoteStore, "_bury", lambda *given: (store.pin(RUN, "best", 1), real(*given))[1])
        assert store.prune(RUN, NEWEST) == Pruned(leased=(1,))
        assert steps(store.list(RUN)) == [1, 2]

    def test_a_reader_without_the_right_to_write(self, store, monkeypatch, caplog):
        """Who may only read does so without a lease, and is told."""
        checkpoint = commit(store, 1)

        def refuse(*_):
            raise PermissionError("AccessDenied")

        monkeypatch.setattr("ckpt_core.store.objects.write", refuse)
        with checkpoint.lease():
            check(checkpoint)
        assert "read without a lease" in caplog.text

    @pytest.mark.parametrize("error", [OSError(errno.EROFS, "Read-only file system"), NotImplementedError()])
    def test_a_reader_of_what_cannot_be_written(self, store, monkeypatch, caplog, error):
        """On a file system that is read-only, or that fsspec cannot write to, a step is read without a lease."""
        checkpoint = commit(store, 1)

        def refuse(*_, **__):
            raise error

        monkeypatch.setattr(type(store.root.fs), "pipe_file", refuse)
        with checkpoint.lease():
            check(checkpoint)
        assert "read without a lease" in caplog.text

    def test_a_lease_that_fails(self, store, monkeypatch):
        """Where a lease could be written, but was not, nothing is read without it."""
        checkpoint = commit(store, 1)

        def fail(*_, **__):
            raise OSError("no network")

        monkeypatch.setattr(type(store.root.fs), "pipe_file", fail)
        with pytest.raises(OSError, match="no network"), checkpoint.lease():
            pytest.fail("leased")

    def test_an_answer_that_does_not_come(self, store, monkeypatch):
        """Where a store cannot say whether a manifest is there, that is an error, and not taken for no."""
        checkpoint = commit(store, 1)

        def fail(*_, **__):
            raise OSError("no network")

        monkeypatch.setattr(type(store.root.fs), "info", fail)
        for ask in (lambda: objects.exists(checkpoint.path / MANIFEST_NAME), lambda: is_newer(checkpoint.path)):
            with pytest.raises(OSError, match="no network"):
                ask()

    def test_a_commit_during_a_repair(self, store, monkeypatch):
        """A step that is committed just after a repair looked for its manifest stays as it is."""
        staging = store.stage(RUN, 7)
        manifest = fill(staging, 7)
        real = debris.open_remote

        def late(path):
            try:
                return real(path)
            finally:
                staging.commit(manifest)

        monkeypatch.setattr(debris, "open_remote", late)
        assert store.repair(RUN) == []
        store.release(staging)
        check(store.latest(RUN))

    def test_a_failed_deletion_in_the_background(self, store, monkeypatch):
        """What went wrong in the background is told by `wait`, once; the next prune finishes it."""
        commit(store, 1)
        commit(store, 2)

        real = objects.delete_all

        def fail(directory, names):
            if not all(name.endswith(MANIFEST_NAME) for name in names):
                raise OSError("no network")
            real(directory, names)

        with monkeypatch.context() as patch:
            patch.setattr("ckpt_core.store.objects.delete_all", fail)
            assert store.prune(RUN, NEWEST, background=True) == Pruned(deleted=(1,))
            (error,) = store.wait()
        assert "no network" in error
        assert store.wait() == ()
        assert store.prune(RUN, NEWEST) == Pruned()
        assert len(everything(store)) == len(FILES) + 1


class TestManifest:
    """The field that only stores without renames write."""

    def test_the_schema_knows_it(self, store):
        """A remote step's manifest names the directory of its files, as the schema has it."""
        checkpoint = commit(store, 1)
        schema = json.loads(files("ckpt_core.format").joinpath("manifest.schema.json").read_bytes())
        document = json.loads((checkpoint.path / MANIFEST_NAME).read_bytes())
        jsonschema.validate(document, schema)
        assert checkpoint.root == checkpoint.path / document["directory"]

    @pytest.mark.parametrize("directory", ["..", "../x", "/x", "a//b", "a/./b", "a\0", "file:/x", "s3://b/x", 1])
    def test_a_directory_that_leads_elsewhere(self, store, directory):
        """A manifest whose files would lie elsewhere than below the step is refused, though its digest is right."""
        checkpoint = commit(store, 1)
        damaged = replace(checkpoint.manifest, directory=directory)
        (checkpoint.path / MANIFEST_NAME).write_bytes(damaged.to_bytes())
        with pytest.raises(DamagedError, match="not a manifest"):
            open_checkpoint(checkpoint.url)
        assert store.latest(RUN) is None

    def test_one_that_is_too_large(self, store, monkeypatch):
        """A manifest of an absurd size is refused before it is read."""
        checkpoint = commit(store, 1)
        monkeypatch.setattr("ckpt_core.store.checkpoint.MAX_BYTES", 10)
        monkeypatch.setattr("ckpt_core.store.objects.read", lambda *_: pytest.fail("read"))
        with pytest.raises(DamagedError, match="larger than 10 bytes"):
            open_checkpoint(checkpoint.url)


class TestPlaces:
    """Where a remote store may be, and what may lie there."""

    def test_a_directory_that_was_uploaded(self, store, tmp_path):
        """A local store's step that was copied up as it is can be read, listed and pruned there."""
        for step in (1, 2):
            path = commit(open_store(tmp_path), step).path
            for name in (*FILES, MANIFEST_NAME):
                (store.root / RUN / path.name / name).write_bytes((path / name).read_bytes())
        check(store.latest(RUN))
        with store.list(RUN)[0].lease():
            assert store.prune(RUN, NEWEST) == Pruned(leased=(1,))
        assert store.prune(RUN, NEWEST) == Pruned(deleted=(1,))
        assert len(everything(store)) == len(FILES) + 1

    def test_names_that_are_patterns(self, store):
        """Files whose names hold `*`, `?` or `[` are deleted as they are, and no others with them."""
        staging = store.stage(RUN, 1)
        for name in ("a*", "ab", "[b]"):
            (staging.path / name).write_bytes(b"")
        (store.root / RUN / "note").write_bytes(b"")
        store.release(staging)
        assert list(everything(store)) == [f"{RUN}/note"]

    @pytest.mark.parametrize("url", ["memory://x/y/", "memory://x/y"])
    def test_a_slash_at_the_end(self, url):
        """A slash at the end of a URL names no other place."""
        assert RemoteStore(url).url == "memory://x/y"

    @pytest.mark.parametrize("url", ["nosuch://bucket/x", "http://[x"])
    def test_urls_that_lead_nowhere(self, url):
        """A URL of an unknown scheme is refused, and what is missing is named."""
        with pytest.raises(ArgumentError, match=r"no store that can be reached"):
            open_store(url)

    def test_what_others_write_is_seen(self, store, s3_server):  # noqa: F811
        """Listings are not remembered: what another client wrote or deleted meanwhile shows."""
        store = open_store(f"{s3_server.new_bucket()}/store")
        other = fsspec.filesystem("s3", skip_instance_cache=True)
        assert store.list(RUN) == []
        commit(store, 1)
        assert steps(store.list(RUN)) == [1]
        other.rm(f"{store.root.path}/{RUN}/{step_name(1)}/{MANIFEST_NAME}")
        assert store.list(RUN) == []
