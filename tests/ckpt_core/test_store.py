"""A store keeps whole steps: committed by one rename, never changed, listed, leased and pruned."""

import errno
import fcntl
import logging
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from object_stores import s3_server  # noqa: F401 - a fixture
from programs import store_racer
from programs.store_racer import FILES, RUN, commit, content

from ckpt_core import durable, locks
from ckpt_core.errors import ArgumentError, CommitError, DamagedError, NotACheckpointError, StepExistsError
from ckpt_core.format.manifest import MANIFEST_NAME, Manifest, record_file
from ckpt_core.retention import Retention
from ckpt_core.store import (
    MAX_STEP,
    LocalStore,
    Pruned,
    local,
    local_path,
    open_checkpoint,
    open_store,
    parse_step,
    step_name,
)

PROGRAMS = Path(store_racer.__file__).parent
ENVIRONMENT = {"PYTHONPATH": str(PROGRAMS.parents[2])}


@pytest.fixture
def store(tmp_path):
    """An empty store."""
    return LocalStore(tmp_path / "store")


def names(store):
    """All entries of the run's directory."""
    return sorted(path.name for path in (store.root / RUN).iterdir())


def steps(store):
    """The committed steps."""
    return [checkpoint.step for checkpoint in store.list(RUN)]


def opened(handle):
    """The path that a file descriptor was opened by."""
    return Path(f"/proc/self/fd/{handle}").readlink()


@contextmanager
def holder(kind, store):
    """A process that holds a lease or a staging directory; gives it and what it printed."""
    process = subprocess.Popen(
        [sys.executable, str(PROGRAMS / "store_holder.py"), kind, str(store.root)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **ENVIRONMENT},
    )  # fmt: skip
    try:
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.communicate()


class TestCommit:
    """Staged, then named."""

    def test_a_step(self, store):
        """A committed step has its name, its files and its manifest; nothing else is left."""
        commit(store, 7)
        assert names(store) == ["step_0000000007"]
        checkpoint = store.latest(RUN)
        assert (checkpoint.run, checkpoint.step) == (RUN, 7)
        assert {name for name, _ in durable.files_below(checkpoint.path)} == {*FILES, MANIFEST_NAME}
        assert checkpoint.component("model") == checkpoint.path / "model"
        assert checkpoint.component("optimizer") is None

    def test_it_is_not_there_before(self, store):
        """Until the rename a step is neither listed nor the latest, nor can it be opened."""
        staging = store.stage(RUN, 7)
        (staging.path / MANIFEST_NAME).write_bytes(Manifest(run=RUN, step=7, time="", world_size=1).to_bytes())
        assert store.list(RUN) == []
        assert store.latest(RUN) is None
        assert store.runs() == []
        with pytest.raises(NotACheckpointError, match="never committed"):
            open_checkpoint(staging.path)
        store.release(staging)
        assert names(store) == []

    def test_a_step_is_committed_once(self, store):
        """A second commit of a step is an error, before anything is written, and the first stays as it was."""
        commit(store, 7)
        before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for _, p in durable.files_below(store.root)}
        with pytest.raises(StepExistsError, match="never changes"):
            store.stage(RUN, 7)
        assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for _, p in durable.files_below(store.root)} == before
        assert names(store) == ["step_0000000007"]

    def test_of_two_writers_one_wins(self, store):
        """Two writers that both staged a step: the second one's commit is an error, and its files go."""
        first, second = store.stage(RUN, 7), LocalStore(store.root).stage(RUN, 7)
        first.commit(Manifest(run=RUN, step=7, time="", world_size=1))
        with pytest.raises(StepExistsError):
            second.commit(Manifest(run=RUN, step=7, time="", world_size=2))
        assert store.latest(RUN).manifest.world_size == 1

    @pytest.mark.parametrize("make", [Path.touch, lambda path: path.symlink_to("/nowhere")])
    def test_a_target_that_is_something_else(self, store, make):
        """A file or link with the step's name is left alone."""
        staging = store.stage(RUN, 7)
        make(staging.target)
        with pytest.raises(StepExistsError):
            staging.commit(Manifest(run=RUN, step=7, time="", world_size=1))
        assert os.path.lexists(staging.target)
        store.release(staging)

    def test_an_uncertain_commit_is_told_apart(self, store, monkeypatch):
        """Renamed, but the parent's flush failed: a CommitError says that it may not survive a power cut."""
        staging = store.stage(RUN, 7)
        real = os.fsync

        def failing(handle):
            if opened(handle).name == RUN:
                raise OSError(5, "Input/output error")
            real(handle)

        monkeypatch.setattr(os, "fsync", failing)
        with pytest.raises(CommitError, match="may not survive a power cut"):
            staging.commit(Manifest(run=RUN, step=7, time="", world_size=1))
        store.release(staging)
        assert steps(store) == [7]

    def test_everything_is_flushed_before_the_name(self, store, monkeypatch):
        """The manifest and each directory are flushed before the rename, and the run's directory after it."""
        events = []
        fsync, rename = os.fsync, Path.rename
        monkeypatch.setattr(os, "fsync", lambda handle: (events.append(opened(handle).name), fsync(handle)))
        monkeypatch.setattr(Path, "rename", lambda self, to: (events.append("RENAME"), rename(self, to))[1])
        staging = store.stage(RUN, 7)
        (staging.path / "model").mkdir()
        events.clear()
        staging.commit(Manifest(run=RUN, step=7, time="", world_size=1))
        store.release(staging)
        assert events == [MANIFEST_NAME, "model", staging.path.name, "RENAME", RUN]

    @pytest.mark.parametrize("step", [-1, MAX_STEP + 1])
    def test_steps_have_ten_digits(self, store, step):
        """A step that its name could not hold is refused."""
        with pytest.raises(ArgumentError):
            store.stage(RUN, step)

    @pytest.mark.parametrize("run", ["", ".", "..", "a/b", "../a", ".hidden", "a b", "ü", "a\0", "a\n", "x" * 65, "-a"])
    def test_odd_names_of_runs(self, store, run):
        """A run's name that could lead elsewhere, or hide, is refused by every method."""
        for method in (
            store.list,
            store.latest,
            lambda r: store.stage(r, 1),
            lambda r: store.prune(r, Retention(keep_last=1)),
        ):
            with pytest.raises(ArgumentError, match="run "):
                method(run)
        assert not store.root.exists()


class TestListing:
    """What is there, and what is skipped."""

    def test_order(self, store):
        """Steps are listed by number, whatever the order of their commits; the latest is the largest."""
        for step in (10, 9, 100, 0):
            commit(store, step)
        assert steps(store) == [0, 9, 10, 100]
        assert store.latest(RUN).step == 100
        assert store.runs() == [RUN]

    def test_nothing(self, store):
        """A store, or a run, that does not exist is empty, and is not made by asking."""
        assert (store.runs(), store.list(RUN), store.latest(RUN), store.prune(RUN, Retention(keep_last=1))) == (
            [],
            [],
            None,
            Pruned(),
        )
        assert not store.root.exists()

    def test_what_is_no_step(self, store):
        """Names that only look like steps, and runs with odd names, are left out."""
        commit(store, 7)
        for name in ("step_7", "step_00000000070", "step_000000000x", "xstep_0000000008", "step_0000000008 ", "notes"):
            shutil.copytree(store.root / RUN / "step_0000000007", store.root / RUN / name)
        shutil.copytree(store.root / RUN, store.root / ".hidden")
        (store.root / "file").touch()
        assert steps(store) == [7]
        assert store.runs() == [RUN]

    @pytest.mark.parametrize("spoil", [
        lambda p: (p / MANIFEST_NAME).unlink(),
        lambda p: (p / MANIFEST_NAME).write_bytes(b"{"),
        lambda p: os.truncate(p / MANIFEST_NAME, 100),
        lambda p: (p / FILES[0]).unlink(),
        lambda p: os.truncate(p / FILES[0], 3),
        lambda p: (p / FILES[0]).write_bytes(b""),
        lambda p: shutil.rmtree(p / "model"),
        lambda p: (shutil.rmtree(p), p.touch()),
        lambda p: ((p / FILES[0]).unlink(), os.mkfifo(p / FILES[0])),
        lambda p: (p.rename(p.with_name("step_0000000009")), p.with_name("step_0000000007")),
    ])  # fmt: skip
    def test_a_damaged_newest_step_is_skipped(self, store, caplog, spoil):
        """Where the newest step is damaged the one before is the latest, and a log line says why."""
        commit(store, 7)
        commit(store, 8)
        spoil(store.root / RUN / "step_0000000008")
        with caplog.at_level(logging.WARNING, logger="ckpt_core.store"):
            assert store.latest(RUN).step == 7
        assert "skipped" in caplog.text
        assert "step_000000000" in caplog.text
        assert steps(store) == [7]

    def test_opening_names_the_damage(self, store):
        """`open_checkpoint` tells a step that is not there from one that is damaged."""
        commit(store, 7)
        path = store.root / RUN / "step_0000000007"
        with pytest.raises(NotACheckpointError):
            open_checkpoint(path.with_name("step_0000000008"))
        os.truncate(path / FILES[0], 3)
        with pytest.raises(DamagedError, match=r"model/a\.bin: 3 bytes, the manifest says"):
            open_checkpoint(path)

    def test_a_step_under_another_number(self, store):
        """A step that was copied to another number is damaged: its manifest knows better."""
        commit(store, 7)
        shutil.copytree(store.root / RUN / "step_0000000007", store.root / RUN / "step_0000000008")
        with pytest.raises(DamagedError, match="manifest is that of step 7"):
            open_checkpoint(store.root / RUN / "step_0000000008")
        shutil.copytree(store.root / RUN / "step_0000000007", store.root / "restored")
        assert open_checkpoint(store.root / "restored").step == 7

    def test_a_thousand_steps(self, store, capsys):
        """A thousand steps are listed, and the latest of them found without reading the others."""
        commit(store, 0)
        template = store.root / RUN / step_name(0)
        for step in range(1, 1000):
            target = store.root / RUN / step_name(step)
            shutil.copytree(template, target, copy_function=os.link)
            manifest = (
                Manifest(run=RUN, step=step, time="", world_size=1, files=store.list(RUN)[0].manifest.files)
                if step == 1
                else manifest_of(store, step)
            )
            (target / MANIFEST_NAME).unlink()
            (target / MANIFEST_NAME).write_bytes(manifest.to_bytes())
        start = time.perf_counter()
        assert store.latest(RUN).step == 999
        middle = time.perf_counter()
        assert steps(store) == list(range(1000))
        end = time.perf_counter()
        with capsys.disabled():
            print(f"\n1,000 steps: latest {1000 * (middle - start):.1f} ms, list {1000 * (end - middle):.0f} ms")


def manifest_of(store, step):
    """The manifest of a step with the files of step 0."""
    files = open_checkpoint(store.root / RUN / step_name(0)).manifest.files
    return Manifest(run=RUN, step=step, time="", world_size=1, files=files)


class TestPrune:
    """Old steps go; what is read, written or new stays."""

    def test_keep_last(self, store):
        """The newest steps stay, the deleted ones are returned, oldest first, and nothing is left of them."""
        for step in range(5):
            commit(store, step)
        assert store.prune(RUN, Retention(keep_last=2)) == Pruned((0, 1, 2))
        assert store.prune(RUN, Retention(keep_last=2)) == Pruned()
        assert names(store) == ["step_0000000003", "step_0000000004"]

    def test_only_whole_steps_count(self, store):
        """A damaged step is neither counted nor deleted: it may be all that is left of something."""
        for step in range(4):
            commit(store, step)
        os.truncate(store.root / RUN / step_name(3) / FILES[0], 1)
        assert store.prune(RUN, Retention(keep_last=1)).deleted == (0, 1)
        assert names(store) == ["step_0000000002", "step_0000000003"]

    @pytest.mark.parametrize("dry_run", [False, True])
    def test_what_is_read_before_others_go(self, store, dry_run):
        """Newest steps with flipped bits stay, do not count, and are named; sound ones before them stay, too."""
        for step in range(5):
            commit(store, step)
        for step in (3, 4):
            path = store.root / RUN / step_name(step) / FILES[1]
            path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
        pruned = store.prune(RUN, Retention(keep_last=1), dry_run=dry_run)
        assert pruned.deleted == (0, 1)
        assert [step_name(step) in error for step, error in zip((4, 3), pruned.errors, strict=True)] == [True, True]
        assert steps(store) == ([0, 1, 2, 3, 4] if dry_run else [2, 3, 4])

    def test_where_nothing_is_sound(self, store):
        """The last copies stay, though none is as it was saved."""
        for step in range(3):
            commit(store, step)
            (store.root / RUN / step_name(step) / FILES[0]).write_bytes(content(step, FILES[0])[::-1])
        pruned = store.prune(RUN, Retention(keep_last=1))
        assert (pruned.deleted, len(pruned.errors)) == ((), 2)
        assert steps(store) == [0, 1, 2]

    def test_a_file_that_cannot_be_read(self, store, monkeypatch):
        """A newest step on a bad disk does not count, either."""
        for step in range(3):
            commit(store, step)
        real = record_file

        def failing(place, algorithm):
            if step_name(2) in str(place):
                raise OSError(5, "Input/output error", str(place))
            return real(place, algorithm)

        monkeypatch.setattr("ckpt_core.store.checkpoint.record_file", failing)
        pruned = store.prune(RUN, Retention(keep_last=1))
        assert (pruned.deleted, len(pruned.errors)) == ((0,), 1)
        assert "Input/output error" in pruned.errors[0]

    def test_nothing_is_read_where_nothing_goes(self, store, monkeypatch):
        """A prune that deletes nothing costs no reading."""
        commit(store, 1)
        monkeypatch.setattr("ckpt_core.store.checkpoint.record_file", lambda *_: pytest.fail("read"))
        assert store.prune(RUN, Retention(keep_last=1)) == Pruned()

    def test_links_are_left_alone(self, store, tmp_path):
        """A run that is a link is refused; a step that is one stays as it is, and does not count."""
        other = LocalStore(tmp_path / "other")
        for step in (1, 2):
            commit(other, step)
        (store.root).mkdir()
        (store.root / "alias").symlink_to(other.root / RUN)
        for ask in (lambda: store.prune("alias", Retention(keep_last=1)), lambda: store.repair("alias")):
            with pytest.raises(ArgumentError, match="symbolic link"):
                ask()
        for step in (0, 1):
            commit(store, step)
        (store.root / RUN / step_name(2)).symlink_to(other.root / RUN / step_name(2))
        assert store.prune(RUN, Retention(keep_last=1)) == Pruned((0,))
        assert (steps(store), steps(other)) == ([1, 2], [1, 2])

    def test_a_metric_that_no_step_has(self, store):
        """A policy that cannot rank the steps is an error before anything is deleted, debris included."""
        for step in range(3):
            commit(store, step)
        trash = store.root / RUN / f".trash-{step_name(9)}-x"
        trash.mkdir()
        with pytest.raises(ArgumentError, match="the steps have no metrics"):
            store.prune(RUN, Retention(keep_last=1, keep_best=1, metric="accuracy"))
        assert steps(store) == [0, 1, 2]
        assert trash.exists()

    def test_a_leased_step_stays(self, store, caplog):
        """What another process reads is not deleted; once that process is dead, it is."""
        commit(store, 1)
        with holder("lease", store) as (process, said):
            assert said == "1"
            commit(store, 2)
            assert store.prune(RUN, Retention(keep_last=1)) == Pruned(leased=(1,))
            assert "being read, or pinned" in caplog.text
            assert steps(store) == [1, 2]
            process.kill()
            process.wait()
            assert store.prune(RUN, Retention(keep_last=1)) == Pruned((1,))

    def test_a_lease_in_the_same_process(self, store):
        """Several leases of one step can be held; it can be deleted after the last."""
        commit(store, 1)
        commit(store, 2)
        checkpoint = store.list(RUN)[0]
        with checkpoint.lease():
            with checkpoint.lease():
                pass
            assert store.prune(RUN, Retention(keep_last=1)) == Pruned(leased=(1,))
        assert store.prune(RUN, Retention(keep_last=1)) == Pruned((1,))

    def test_a_lease_of_what_is_gone(self, store):
        """A step that was deleted between listing and leasing is an error, not a half read."""
        commit(store, 1)
        commit(store, 2)
        checkpoint = store.list(RUN)[0]
        store.prune(RUN, Retention(keep_last=1))
        with pytest.raises(NotACheckpointError, match="pruner"), checkpoint.lease():
            pass

    def test_pruned_while_it_is_opened(self, store, monkeypatch):
        """A step that is pruned between the look at its manifest and that at its files is gone, not damaged."""
        commit(store, 1)
        commit(store, 2)
        real = durable.file_size

        def late(place):
            monkeypatch.undo()
            store.prune(RUN, Retention(keep_last=1))
            return real(place)

        monkeypatch.setattr(durable, "file_size", late)
        with pytest.raises(NotACheckpointError, match="pruner"):
            open_checkpoint(store.root / RUN / step_name(1))

    def test_latest_looks_again(self, store, monkeypatch):
        """Where all listed steps were pruned meanwhile, a newer one was committed: it is found."""
        commit(store, 1)
        real = locks.os.listdir
        once = []

        def listed(path):
            found = real(path)
            if not once:
                once.append(True)
                commit(store, 2)
                shutil.rmtree(store.root / RUN / step_name(1))
            return found

        monkeypatch.setattr("os.listdir", listed)
        assert store.latest(RUN).step == 2


class TestDebris:
    """What dead writers leave is removed, what live ones write is not."""

    def test_of_a_dead_writer(self, store):
        """The staging directory of a killed process goes with the next step, or with a prune."""
        for sweep in (lambda: commit(store, 1), lambda: store.prune(RUN, Retention(keep_last=1))):
            with holder("stage", store) as (process, path):
                process.kill()
                process.wait()
            assert (Path(path) / "half").exists()
            sweep()
            assert names(store) == ["step_0000000001"]

    def test_of_a_live_writer(self, store):
        """The staging directory of a live process stays."""
        with holder("stage", store) as (_, path):
            commit(store, 1)
            store.prune(RUN, Retention(keep_last=1))
            assert (Path(path) / "half").read_bytes() == b"half"
        assert names(store) == sorted(["step_0000000001", Path(path).name, f"{Path(path).name}.lock"])

    def test_of_a_dead_pruner(self, store):
        """What a killed pruner had renamed is deleted by the next."""
        commit(store, 1)
        shutil.copytree(store.root / RUN / step_name(1), store.root / RUN / ".trash-step_0000000000-x")
        store.prune(RUN, Retention(keep_last=1))
        assert names(store) == ["step_0000000001"]

    def test_a_directory_that_two_delete(self, tmp_path, monkeypatch):
        """Files that another process deletes at the same time do not stop a deletion half way."""
        for number in range(5):
            (tmp_path / "x" / str(number)).mkdir(parents=True)
            (tmp_path / "x" / str(number) / "file").touch()
        real = os.unlink

        def unlink(path, **options):
            real(path, **options)
            monkeypatch.undo()
            raise FileNotFoundError(path)

        monkeypatch.setattr(os, "unlink", unlink)
        durable.remove_tree(tmp_path / "x")
        assert not (tmp_path / "x").exists()

    def test_what_is_not_the_stores_own(self, store):
        """Hidden directories of other programs stay, though their names begin as a store's do."""
        for name in (".trash-1000", ".staging-weights-0123", ".staging-step_7-x"):
            (store.root / RUN / name / "kept").mkdir(parents=True)
        commit(store, 1)
        commit(store, 2)
        assert store.prune(RUN, Retention(keep_last=1)) == Pruned((1,))
        assert store.repair(RUN) == []
        assert len(list((store.root / RUN).glob(".*/kept"))) == 3

    def test_of_a_writer_that_died_after_its_commit(self, store):
        """The lock file that it left goes with the next step; the step stays."""
        staging = store.stage(RUN, 1)
        staging.commit(Manifest(run=RUN, step=1, time="", world_size=1))
        store._locks.pop(staging.path).release()
        assert len(names(store)) == 2
        commit(store, 2)
        assert names(store) == [step_name(1), step_name(2)]

    def test_trash_is_left_to_pruners(self, store, monkeypatch):
        """A save waits for no pruner: what one deletes in the background is skipped."""
        commit(store, 1)
        commit(store, 2)
        real, begun, go_on = durable.remove_tree, threading.Event(), threading.Event()

        def slow(path):
            if path.name.startswith(".trash-"):
                begun.set()
                assert go_on.wait(60)
            real(path)

        monkeypatch.setattr(durable, "remove_tree", slow)
        assert store.prune(RUN, Retention(keep_last=1), background=True).deleted == (1,)
        assert begun.wait(60)
        commit(store, 3)
        assert [name for name in names(store) if name.startswith(".trash-")] != []
        go_on.set()
        assert store.wait() == ()
        assert names(store) == [step_name(2), step_name(3)]


@contextmanager
def worker():
    """A process that was forked here, as DataLoader's workers are, and that lives until the end of the block."""
    (reading, writing), (ready, begun) = os.pipe(), os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of threads; the child only reads
        child = os.fork()
    if child == 0:
        os.close(writing)
        os.write(begun, b"x")
        os.read(reading, 1)
        os._exit(0)
    os.read(ready, 1)
    for handle in (reading, ready, begun):
        os.close(handle)
    try:
        yield
    finally:
        os.close(writing)
        os.waitpid(child, 0)


@contextmanager
def forked_by_others():
    """Without the hook that closes locks in a forked child: C libraries that fork do not call it."""
    taken = dict(locks._taken)
    locks._taken.clear()
    with worker():
        locks._taken.update(taken)
        yield


class TestLocks:
    """Locks end with their owner, and only files are locked, for writing where they have to be."""

    @pytest.mark.parametrize("fork", [worker, forked_by_others])
    def test_a_forked_worker_keeps_no_lease(self, store, fork):
        """A lease that is over is over, whoever was forked while it was held."""
        commit(store, 1)
        commit(store, 2)
        with ExitStack() as stack:
            with store.list(RUN)[0].lease():
                stack.enter_context(fork())
                assert store.prune(RUN, Retention(keep_last=1)) == Pruned(leased=(1,))
            assert store.prune(RUN, Retention(keep_last=1)) == Pruned((1,))

    def test_a_worker_that_outlives_a_trainer(self, store):
        """What a killed trainer was writing is debris, though a worker of it is still there."""
        staging = store.stage(RUN, 1)
        with worker():
            os.close(store._locks[staging.path].handle)  # as the system does when the trainer dies
            store._locks.pop(staging.path).handle = -1
            commit(store, 2)
            assert names(store) == [step_name(2)]
        locks._taken.clear()

    def test_a_fork_during_the_commit(self, store, monkeypatch):
        """Nothing of a committed step stays locked: it can be set aside while a worker lives."""
        with ExitStack() as stack:
            real = local.rename_new
            monkeypatch.setattr(local, "rename_new", lambda *a: (stack.enter_context(worker()), real(*a)))
            commit(store, 1)
            os.truncate(store.root / RUN / step_name(1) / FILES[0], 1)
            assert "set aside" in store.repair(RUN)[0]

    def test_a_child_does_not_unlock_for_its_parent(self, store):
        """A forked child that leaves the block of a lease takes nothing from its parent."""
        commit(store, 1)
        commit(store, 2)
        with store.list(RUN)[0].lease():
            lock = next(iter(locks._taken.values()))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                child = os.fork()
            if child == 0:
                lock.release()
                os._exit(0)
            os.waitpid(child, 0)
            assert store.prune(RUN, Retention(keep_last=1)) == Pruned(leased=(1,))

    @pytest.fixture
    def nfs(self, monkeypatch):
        """Locks as NFS has them: exclusive ones need a writable handle, and those of directories nobody else sees."""
        real = fcntl.flock

        def flock(handle, mode):
            if stat.S_ISDIR(os.fstat(handle).st_mode):
                pytest.fail("a directory was locked")
            if mode & fcntl.LOCK_EX and fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
                raise OSError(errno.EBADF, "Bad file descriptor")
            real(handle, mode)

        monkeypatch.setattr(fcntl, "flock", flock)

    def test_over_nfs(self, store, nfs):
        """Steps are written, pinned, read, pruned and repaired with locks that all clients of NFS see."""
        for step in (1, 2, 3):
            commit(store, step)
        store.pin(RUN, "best", 1)
        writing = LocalStore(store.root).stage(RUN, 9)
        commit(store, 4)
        assert writing.path.is_dir()
        with store.list(RUN)[1].lease():
            assert store.prune(RUN, Retention(keep_last=1)) == Pruned((3,), (2,))
        os.truncate(store.root / RUN / step_name(2) / FILES[0], 1)
        assert "set aside" in store.repair(RUN)[0]
        assert steps(store) == [1, 4]

    def test_a_manifest_that_cannot_be_locked_over_nfs(self, store, nfs, monkeypatch):
        """Without the right to write a manifest its step stays over NFS, and the error says why; the others go."""
        for step in (1, 2, 3):
            commit(store, step)
        real = os.open

        def read_only(path, flags, *rest, **options):
            if str(path).endswith(f"{step_name(1)}/{MANIFEST_NAME}") and flags & os.O_RDWR:
                raise PermissionError(errno.EACCES, "Permission denied")
            return real(path, flags, *rest, **options)

        monkeypatch.setattr(os, "open", read_only)
        pruned = store.prune(RUN, Retention(keep_last=1))
        assert pruned.deleted == (2,)
        assert "open for writing" in pruned.errors[0]

    @pytest.mark.parametrize("number", sorted(locks.UNSUPPORTED))
    def test_a_file_system_without_locks(self, store, monkeypatch, number):
        """Where nothing can be locked nothing is written or deleted, and the error names the mount option."""
        commit(store, 1)
        commit(store, 2)

        def flock(*_):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "flock", flock)
        before = names(store)
        for ask in (
            lambda: store.stage(RUN, 3),
            lambda: store.pin(RUN, "best", 1),
            lambda: store.repair(RUN),
            lambda: store.prune(RUN, Retention(keep_last=1)),
            lambda: store.list(RUN)[0].lease().__enter__(),
        ):
            with pytest.raises(OSError, match="-o flock") as caught:
                ask()
            assert caught.value.errno == number
        assert names(store) == before
        monkeypatch.setattr(os, "access", lambda *_, **__: False)  # an archive that is mounted read-only
        with store.list(RUN)[0].lease():
            pass

    @pytest.mark.parametrize("number", [errno.ESTALE, errno.ENOENT])
    def test_a_step_that_another_client_deleted(self, store, monkeypatch, number):
        """NFS may call what another client deleted stale: it is gone, and no error of the rest."""
        commit(store, 1)
        commit(store, 2)
        real = Path.stat

        def stale(self, **options):
            if self.parent.name == step_name(2) or self.parent.parent.name == step_name(2):
                raise OSError(number, os.strerror(number))
            return real(self, **options)

        monkeypatch.setattr(Path, "stat", stale)
        assert store.latest(RUN).step == 1
        assert steps(store) == [1]


@contextmanager
def user(number, umask):
    """Do what is in the block as another user."""
    before = os.umask(umask)
    os.seteuid(number)
    try:
        yield
    finally:
        os.seteuid(0)
        os.umask(before)


ANNE, BERT = (20001, 0o077), (20002, 0o022)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be other users")
class TestUsers:
    """Several users of one store: what one of them may not read is skipped and named, and stops nothing."""

    @pytest.fixture
    def store(self):
        """A store where everybody may write."""
        root = Path(tempfile.mkdtemp())
        (root / RUN).mkdir()
        for path in (root, root / RUN):
            path.chmod(0o777)
        yield LocalStore(root)
        shutil.rmtree(root)

    def test_what_is_private(self, store, caplog):
        """Beside a private step, and a private one that was never finished, others are saved, listed and pruned."""
        with user(*ANNE):
            commit(store, 7)
            store._locks.pop(store.stage(RUN, 5).path).release()
        with user(*BERT):
            for step in (6, 8, 9):
                commit(store, step)
            os.truncate(store.root / RUN / step_name(9) / FILES[0], 1)
            assert (steps(store), store.latest(RUN).step, store.runs()) == ([6, 8], 8, [RUN])
            assert store.prune(RUN, Retention(keep_last=1)) == Pruned((6,))
            private, aside = store.repair(RUN)
            assert f"{step_name(7)}: left as it is" in private
            assert "set aside" in aside
            with pytest.raises(StepExistsError):
                store.stage(RUN, 7)
        for name in (step_name(7), f".staging-{step_name(5)}"):
            assert name in caplog.text
        with user(*ANNE):
            assert steps(store) == [7, 8]
            commit(store, 10)
        assert [name for name in names(store) if name.startswith(".staging-")] == []

    def test_a_private_run(self, store, caplog):
        """A run that is another's alone is left out of the runs, and asking for it is an error, not an empty answer."""
        with user(*ANNE):
            staging = store.stage("private", 1)
            staging.commit(Manifest(run="private", step=1, time="", world_size=1))
            store.release(staging)
        with user(*BERT):
            commit(store, 1)
            assert store.runs() == [RUN]
            assert "private" in caplog.text
            for ask in (store.list, store.latest, lambda run: store.prune(run, Retention(keep_last=1))):
                with pytest.raises(PermissionError):
                    ask("private")

    def test_pins_are_everybodys(self, store):
        """Pins can be read by all who prune, whatever the umask: else they could not know what stays."""
        with user(*BERT):
            for step in (1, 2, 3):
                commit(store, step)
        with user(*ANNE):
            store.pin(RUN, "best", 1)
        with user(*BERT):
            assert store.prune(RUN, Retention(keep_last=1)) == Pruned((2,))
            store.pin(RUN, "paper", 3)
            store.pin(RUN, "best", 3)
            assert store.pins(RUN) == {"best": 3, "paper": 3}

    def test_what_another_may_not_delete(self, store):
        """A step whose files this user may not delete keeps its name, and the error names the directory."""
        for step in (1, 2):
            with user(*BERT):
                commit(store, step)
        with user(ANNE[0], 0o022):
            pruned = store.prune(RUN, Retention(keep_last=1))
        assert (pruned.deleted, len(pruned.errors)) == ((), 1)
        assert str(store.root / RUN / step_name(1)) in pruned.errors[0]
        assert names(store) == [step_name(1), step_name(2)]

    def test_a_store_that_is_read_only(self, store):
        """Whoever may only read can list and load."""
        with user(*BERT):
            commit(store, 1)
        for path in (store.root / RUN, store.root):
            path.chmod(0o555)
        with user(ANNE[0], 0o022):
            assert (store.runs(), steps(store)) == ([RUN], [1])
            with store.latest(RUN).lease():
                assert (store.latest(RUN).root / FILES[0]).read_bytes() == content(1, FILES[0])
            with pytest.raises(PermissionError):
                store.stage(RUN, 2)


class TestRepair:
    """What a repair does in a directory."""

    def test_debris(self, store):
        """What a dead writer, a dead pruner and a dead pinner left is removed, and each is told."""
        commit(store, 1)
        store.pin(RUN, "best", 1)
        (store.root / RUN / f".trash-{step_name(0)}-x").mkdir()
        (store.root / RUN / f".staging-{step_name(0)}-x").mkdir()
        (store.root / RUN / "pins" / ".best.1.tmp").touch()
        before = sorted(store.root.rglob("*"))
        planned = store.repair(RUN, dry_run=True)
        assert sorted(store.root.rglob("*")) == before
        done = store.repair(RUN)
        assert planned == [sentence.replace(": removed;", ": would be removed;") for sentence in done]
        assert len(done) == 3
        assert all("removed; a dead writer or pruner left it" in sentence for sentence in done)
        assert names(store) == ["pins", "step_0000000001"]
        assert store.pins(RUN) == {"best": 1}

    @pytest.mark.parametrize("make", [Path.touch, Path.mkdir, os.mkfifo], ids=["file", "directory", "fifo"])
    def test_what_only_has_a_steps_name(self, store, make):
        """A file, an empty directory or a FIFO with a step's name is set aside; nobody waits for it."""
        commit(store, 1)
        make(store.root / RUN / step_name(2))
        assert len(store.repair(RUN)) == 1
        commit(store, 2)
        assert steps(store) == [1, 2]
        with pytest.raises(NotACheckpointError, match="set aside"):
            open_checkpoint(next((store.root / RUN).glob(".damaged-*")))

    def test_two_that_repair(self, store, monkeypatch):
        """One at a time repairs a run: another one does nothing, and says so."""
        commit(store, 1)
        os.truncate(store.root / RUN / step_name(1) / FILES[0], 1)
        real, said = local.open_local, []

        def meanwhile(path):
            said.extend(LocalStore(store.root).repair(RUN))
            return real(path)

        monkeypatch.setattr(local, "open_local", meanwhile)
        assert "set aside" in store.repair(RUN)[0]
        assert ["being repaired by somebody else" in sentence for sentence in said] == [True]
        assert not [name for name in names(store) if not name.startswith(".damaged-")]

    def test_a_prune_while_a_step_is_checked(self, store, monkeypatch):
        """A whole step that others prune and save again while a repair checks it is not set aside, nor an error."""
        commit(store, 1)
        commit(store, 2)
        real = local.open_local

        def late(path):
            monkeypatch.setattr(local, "open_local", real)
            store.prune(RUN, Retention(keep_last=1))
            try:
                return real(path)
            except NotACheckpointError:
                commit(store, 1)
                raise

        monkeypatch.setattr(local, "open_local", late)
        assert store.repair(RUN) == []
        assert steps(store) == [1, 2]

    @pytest.mark.parametrize("again", [False, True])
    def test_a_prune_between_the_locks(self, store, monkeypatch, again):
        """A step that is pruned before its manifest is locked, and maybe saved again, is not set aside."""
        commit(store, 1)
        commit(store, 2)
        locked, real = locks.locked, local.open_local

        def prune_first(path, mode):
            if path == store.root / RUN / step_name(1) / MANIFEST_NAME:
                monkeypatch.setattr(locks, "locked", locked)
                assert store.prune(RUN, Retention(keep_last=1)).deleted == (1,)
                monkeypatch.setattr(local, "open_local", late)
            return locked(path, mode)

        def late(path):
            monkeypatch.setattr(local, "open_local", real)
            try:
                return real(path)
            finally:
                if again:
                    commit(store, 1)

        monkeypatch.setattr(locks, "locked", prune_first)
        assert store.repair(RUN) == []
        assert steps(store) == ([1, 2] if again else [2])

    def test_a_damaged_step_that_is_read(self, store):
        """A damaged step that somebody reads is left as it is, and that is told; later it is set aside."""
        commit(store, 1)
        checkpoint = store.latest(RUN)
        (checkpoint.path / FILES[0]).unlink()
        with checkpoint.lease():
            (said,) = store.repair(RUN)
        assert "somebody reads it" in said
        assert checkpoint.path.exists()
        assert "set aside" in store.repair(RUN)[0]


class TestDeletions:
    """What goes wrong with a deletion."""

    def fail(self, monkeypatch, store, what):
        """Let a call fail for what lies in the run's directory."""
        real = getattr(durable, what)

        def failing(path):
            if path.name.startswith(".trash") or path == store.root / RUN:
                raise OSError(5, "Input/output error")
            real(path)

        monkeypatch.setattr(durable, what, failing)

    @pytest.mark.parametrize("background", [False, True])
    def test_bytes_that_stay(self, store, monkeypatch, caplog, background):
        """A step whose bytes cannot be freed is gone all the same; that is told and logged, and done the next time."""
        commit(store, 1)
        commit(store, 2)
        with monkeypatch.context() as patch:
            self.fail(patch, store, "remove_tree")
            pruned = store.prune(RUN, Retention(keep_last=1), background=background)
            errors = pruned.errors + store.wait()
        assert pruned.deleted == (1,)
        assert len(errors) == 1
        assert "tries again" in errors[0]
        assert errors[0] in caplog.text
        assert store.wait() == ()
        assert len(names(store)) == 2
        assert store.prune(RUN, Retention(keep_last=1)) == Pruned()
        assert names(store) == [step_name(2)]

    def test_debris_does_not_stop_a_save(self, store, monkeypatch, caplog):
        """What cannot be removed is logged; the step is saved."""
        debris = store.root / RUN / f".staging-{step_name(0)}-x"
        debris.mkdir(parents=True)
        real = durable.remove_tree

        def failing(path):
            if path == debris:
                raise OSError(5, "Input/output error")
            real(path)

        monkeypatch.setattr(durable, "remove_tree", failing)
        commit(store, 1)
        assert steps(store) == [1]
        assert f"{debris.name}: not deleted" in caplog.text

    def test_one_error_does_not_stop_the_rest(self, store, monkeypatch):
        """A step that cannot be renamed is told, and the others go."""
        for step in range(3):
            commit(store, step)
        real = Path.rename

        def rename(self, target):
            if self.name == step_name(0):
                raise OSError(5, "Input/output error")
            return real(self, target)

        monkeypatch.setattr(Path, "rename", rename)
        pruned = store.prune(RUN, Retention(keep_last=1))
        assert pruned.deleted == (1,)
        assert len(pruned.errors) == 1
        assert step_name(0) in pruned.errors[0]
        assert steps(store) == [0, 2]

    def test_a_manifest_that_breaks_meanwhile(self, store, monkeypatch):
        """A step that is damaged between the list and its deletion stays, which is told, and the others go."""
        for step in range(4):
            commit(store, step)
        real = LocalStore._bury

        def spoiled(self, checkpoint):
            if checkpoint.step == 1:
                (checkpoint.path / MANIFEST_NAME).write_bytes(b"{")
            return real(self, checkpoint)

        monkeypatch.setattr(LocalStore, "_bury", spoiled)
        pruned = store.prune(RUN, Retention(keep_last=1))
        assert pruned.deleted == (0, 2)
        assert len(pruned.errors) == 1
        assert step_name(1) in pruned.errors[0]
        assert names(store) == [step_name(1), step_name(3)]

    def test_a_deletion_that_is_not_durable(self, store, monkeypatch):
        """Where the flush after the rename fails the step is deleted all the same; its bytes go after a flush."""
        commit(store, 1)
        commit(store, 2)
        with monkeypatch.context() as patch:
            self.fail(patch, store, "sync_directory")
            pruned = store.prune(RUN, Retention(keep_last=1))
            assert pruned.deleted == (1,)
            assert "Input/output error" in pruned.errors[0]
            assert len(store.prune(RUN, Retention(keep_last=1)).errors) == 1
            assert len(names(store)) == 2
        assert store.prune(RUN, Retention(keep_last=1)) == Pruned()
        assert names(store) == [step_name(2)]

    def test_an_unforeseen_error_hides_no_other(self, store, monkeypatch):
        """What nobody foresaw in a deletion in the background is told by `wait`, beside what went wrong with others."""
        for step in range(3):
            commit(store, step)
        failures = [RuntimeError("unforeseen"), OSError(5, "Input/output error")]

        def fail(_):
            raise failures.pop(0)

        with monkeypatch.context() as patch:
            patch.setattr(durable, "remove_tree", fail)
            assert store.prune(RUN, Retention(keep_last=1), background=True).deleted == (0, 1)
            first, second = store.wait()
        assert "unforeseen" in first
        assert "Input/output error" in second
        assert store.wait() == ()

    def test_a_pin_that_comes_between(self, store, monkeypatch):
        """A step that is pinned after the policy was applied, and before it is renamed, stays."""
        commit(store, 1)
        commit(store, 2)
        real = LocalStore._bury
        monkeypatch.setattr(LocalStore, "_bury", lambda self, c: (store.pin(RUN, "best", 1), real(self, c))[1])
        assert store.prune(RUN, Retention(keep_last=1)) == Pruned(leased=(1,))
        assert steps(store) == [1, 2]

    def test_two_pruners(self, store, monkeypatch):
        """A step that another pruner deleted meanwhile is neither counted nor an error."""
        commit(store, 1)
        commit(store, 2)
        real = LocalStore._bury

        def late(self, checkpoint):
            monkeypatch.undo()
            store.prune(RUN, Retention(keep_last=1))
            return real(self, checkpoint)

        monkeypatch.setattr(LocalStore, "_bury", late)
        assert store.prune(RUN, Retention(keep_last=1)) == Pruned()


WRITERS_AND_READERS = [("write", 2, 2), ("write", 3, 2), ("read", 0, 0), ("read", 0, 0)]


def race(url, seconds, roles):
    """Let processes race; return how often each did its work."""
    started = [
        subprocess.Popen(
            [sys.executable, str(PROGRAMS / "store_racer.py"), role, url, str(seconds), str(first), str(stride)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **ENVIRONMENT},
        )
        for role, first, stride in roles
    ]  # fmt: skip
    outcomes = [process.communicate(timeout=seconds + 60) for process in started]
    assert [process.returncode for process in started] == [0] * len(roles), [errors for _, errors in outcomes]
    return [int(out) for out, _ in outcomes]


class TestRaces:
    """Readers see whole steps of one number each and never an older one again, whatever writers and pruners do."""

    @pytest.mark.parametrize(
        ("seconds", "roles"),
        [
            (20, [*WRITERS_AND_READERS, ("prune", 0, 0)]),
            (3, [*WRITERS_AND_READERS, ("list", 0, 0), ("prune", 0, 0), ("prune", 0, 0)]),
        ],
    )
    def test_in_a_directory(self, store, capsys, seconds, roles):
        """Two writers and two readers, against a pruner for 20 s, and against two pruners and a lister."""
        commit(store, 1)
        counts = race(store.url, seconds, roles)
        assert min(counts) > 3
        with capsys.disabled():
            print(f"\nrace of {seconds} s: {list(zip([role for role, _, _ in roles], counts, strict=True))}")
        self.check_the_end(store)
        assert names(store) == [c.path.name for c in store.list(RUN)]

    def test_on_s3(self, s3_server, capsys):  # noqa: F811 - the fixture
        """Two writers, two readers and a pruner for 10 s, on a real HTTP server."""
        store = open_store(f"{s3_server.new_bucket()}/store")
        commit(store, 1)
        roles = [*WRITERS_AND_READERS, ("prune", 0, 0)]
        counts = race(store.url, 10, roles)
        with capsys.disabled():
            print(f"\nrace of 10 s on S3: {list(zip([role for role, _, _ in roles], counts, strict=True))}")
        assert min(counts) >= 1
        self.check_the_end(store)
        found = {name.split("/")[1] for name, _ in durable.files_below(store.root)}
        assert found == {c.path.name for c in store.list(RUN)}

    def check_the_end(self, store):
        """After a last prune two steps are left, whole, and no debris."""
        store.prune(RUN, Retention(keep_last=2))
        left = store.list(RUN)
        assert len(left) == 2
        for checkpoint in left:
            for name in FILES:
                assert (checkpoint.root / name).read_bytes() == content(checkpoint.step, name)


class TestNames:
    """Names and URLs, both ways."""

    @given(st.integers(0, MAX_STEP))
    def test_step_names(self, step):
        """`parse_step` is the inverse of `step_name`, and names sort as numbers do."""
        assert parse_step(step_name(step)) == step
        assert len(step_name(step)) == len("step_0000000500")

    @given(st.text(max_size=20) | st.from_regex(r"step_[0-9]{9,11}\n?"))
    def test_other_names(self, name):
        """Any text is either the one name of a step, or none."""
        step = parse_step(name)
        assert step is None or step_name(step) == name

    @pytest.mark.parametrize("name", ["plain", "with space", "grün", "a%20b", "a#b?c", "tab\t", "quote'\"", "\udcff"])
    def test_url_forms(self, tmp_path, name):
        """A path, its text, its `file://` URL and that with `localhost` name the same store, whatever its letters."""
        root = tmp_path / name
        uri = root.as_uri()
        for form in (root, str(root), uri, uri.replace("file://", "file://localhost"), uri.replace("file://", "file:")):
            assert local_path(form) == root
        store = open_store(uri)
        commit(store, 3)
        assert open_store(root).latest(RUN).path == root / RUN / step_name(3)
        assert open_checkpoint(store.latest(RUN).url).step == 3
        assert store.url == uri

    def test_relative_paths(self, tmp_path, monkeypatch):
        """A relative path is taken from where the process is, once."""
        monkeypatch.chdir(tmp_path)
        store = LocalStore("here")
        monkeypatch.chdir("/")
        commit(store, 1)
        assert (tmp_path / "here" / RUN / step_name(1)).is_dir()

    @pytest.mark.parametrize(
        "url",
        ["nosuch://bucket/x", "file://host/x", "file://relative", "http://[x", "file:///a?b", "file:///a#b",
         "a\0b", "file:///a%00b"],
    )  # fmt: skip
    def test_other_urls(self, url):
        """A URL that names no local path is refused, and not taken for one."""
        with pytest.raises(ArgumentError):
            open_store(url)

    def test_an_odd_local_path_is_no_url(self):
        """Text that only reminds of a URL is a path."""
        assert local_path("//[x") == Path("//[x")
        assert local_path("a:b") == Path.cwd() / "a:b"
