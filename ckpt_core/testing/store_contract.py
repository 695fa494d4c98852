"""What every store promises, as tests: subclass `StoreContract` in a test module, and give it a store. Needs pytest.

class TestMyStore(StoreContract):
    @pytest.fixture
    def store(self):
        return MyStore(...)      # empty, and the test's own
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import pytest

from ckpt_core import durable
from ckpt_core.errors import ArgumentError, DamagedError, NotACheckpointError, StepExistsError
from ckpt_core.format.manifest import MANIFEST_NAME, Manifest, record_bytes
from ckpt_core.retention import Retention
from ckpt_core.store import MAX_STEP, Checkpoint, Pruned, Staging, Store, open_checkpoint, open_store, step_name
from ckpt_core.urls import place_of

RUN = "contract"
FILES = ("model/a.bin", "model/b.bin", "trainer/state.json")
NEWEST = Retention(keep_last=1)


def content(step: int, name: str, writer: int = 0) -> bytes:
    """Return what a writer puts into a file of a step: it repeats the step's number, so that a mix of two shows."""
    return f"{writer}:{step:010d}".encode() * (1 + (step * 7 + len(name)) % 500)


def fill(staging: Staging, step: int, writer: int = 0) -> Manifest:
    """Write the files of a step; return the manifest to commit it with."""
    for name in FILES:
        durable.make_parents(staging.path / name)
        durable.write_new(staging.path / name, content(step, name, writer))
    files = {name: record_bytes(content(step, name, writer)) for name in FILES}
    return Manifest(run=RUN, step=step, time="2026-01-01", world_size=1, metrics={"loss": -step}, files=files)


def commit(store: Store, step: int, run: str = RUN, writer: int = 0) -> Checkpoint:
    """Write and commit a step."""
    staging = store.stage(run, step)
    try:
        return staging.commit(fill(staging, step, writer))
    finally:
        store.release(staging)


def check(checkpoint: Checkpoint, writer: int = 0) -> None:
    """Read all files of a step, and compare them with what was written."""
    for name in FILES:
        assert (checkpoint.root / name).read_bytes() == content(checkpoint.step, name, writer), name


def steps(checkpoints: Iterable[Checkpoint]) -> list[int]:
    """Return the numbers of steps."""
    return [checkpoint.step for checkpoint in checkpoints]


def everything(store: Store) -> Mapping[str, bytes]:
    """Return the bytes of all that lies in a store, by path."""
    return {name: place.read_bytes() for name, place in durable.files_below(place_of(store.url))}


def cut(checkpoint: Checkpoint) -> None:
    """Damage a step: one of its files is shorter now."""
    (checkpoint.root / FILES[0]).write_bytes(b"cut")


class StoreContract:
    """The promises of `ckpt_core.store.Store`."""

    @pytest.fixture
    def store(self) -> Store:
        """Return an empty store; override this."""
        raise NotImplementedError("give the contract a store: override the fixture `store`")

    def another(self, store: Store) -> Store:
        """Return the same store as another process has it; override it if `open_store` does not know its URL."""
        return open_store(store.url)

    def test_nothing_is_there(self, store: Store) -> None:
        """An empty store has no runs, and any run of it no steps, no pins and nothing to prune or repair."""
        assert (store.runs(), store.list(RUN), store.latest(RUN), store.pins(RUN)) == ([], [], None, {})
        assert store.prune(RUN, NEWEST) == Pruned()
        assert store.repair(RUN) == []
        assert store.wait() == ()

    def test_a_staged_step_is_invisible(self, store: Store) -> None:
        """Until its commit a step is neither listed nor the latest, nor can it be opened."""
        staging = store.stage(RUN, 7)
        fill(staging, 7)
        assert (store.runs(), store.list(RUN), store.latest(RUN)) == ([], [], None)
        for place in (staging.path, staging.target):
            with pytest.raises(NotACheckpointError):
                open_checkpoint(place)
        store.release(staging)

    def test_a_commit_is_visible_whole(self, store: Store) -> None:
        """A committed step is there at once, with all its files, for every process, and under its URL."""
        committed = commit(store, 7)
        for seen in (store, self.another(store)):
            assert (seen.runs(), steps(seen.list(RUN))) == ([RUN], [7])
            latest = seen.latest(RUN)
            assert latest is not None
            assert (latest.run, latest.step, latest.url) == (RUN, 7, committed.url)
            assert latest.manifest == committed.manifest
            check(latest)
            assert latest.component("model") is not None
            assert latest.component("optimizer") is None
        check(open_checkpoint(committed.url))

    def test_a_step_is_committed_once(self, store: Store) -> None:
        """A committed step cannot be staged again, and the attempt changes nothing."""
        commit(store, 7)
        before = everything(store)
        with pytest.raises(StepExistsError, match="never changes"):
            store.stage(RUN, 7)
        assert everything(store) == before

    def test_of_two_writers_one_wins(self, store: Store) -> None:
        """Of two that write the same step at the same time, the first to commit has it, whole; the other is told."""
        other = self.another(store)
        first, second = store.stage(RUN, 7), other.stage(RUN, 7)
        manifests = fill(first, 7, writer=1), fill(second, 7, writer=2)
        second.commit(manifests[1])
        with pytest.raises(StepExistsError):
            first.commit(manifests[0])
        store.release(first)
        other.release(second)
        (only,) = store.list(RUN)
        check(only, writer=2)
        assert len(everything(store)) == len(FILES) + 1

    def test_release_leaves_nothing(self, store: Store) -> None:
        """A staged step that is not committed leaves nothing; releasing a committed one leaves it whole."""
        staging = store.stage(RUN, 7)
        fill(staging, 7)
        store.release(staging)
        assert everything(store) == {}
        commit(store, 7)
        assert len(everything(store)) == len(FILES) + 1

    def test_steps_are_listed_by_number(self, store: Store) -> None:
        """Whatever the order of the commits, steps are listed by number, each run for itself."""
        for step in (10, 9, 100, 0):
            commit(store, step)
        commit(store, 5, "another")
        assert steps(store.list(RUN)) == [0, 9, 10, 100]
        latest = store.latest(RUN)
        assert latest is not None
        assert latest.step == max(steps(store.list(RUN)))
        assert store.runs() == ["another", RUN]

    def test_latest_skips_what_is_damaged(self, store: Store) -> None:
        """A step with a file cut short, or with a manifest that is none, is left out; opening it names the damage."""
        checkpoints = [commit(store, step) for step in range(3)]
        cut(checkpoints[2])
        (checkpoints[1].path / MANIFEST_NAME).write_bytes(b"{")
        assert steps(store.list(RUN)) == [0]
        latest = store.latest(RUN)
        assert latest is not None
        assert latest.step == 0
        with pytest.raises(DamagedError, match=r"model/a\.bin: 3 bytes, the manifest says"):
            open_checkpoint(checkpoints[2].url)
        with pytest.raises(DamagedError, match="not a manifest"):
            open_checkpoint(checkpoints[1].url)

    def test_prune_keeps_what_the_policy_says(self, store: Store) -> None:
        """The policy's steps stay, the others are deleted with all their bytes; doing it again does nothing."""
        for step in range(7):
            commit(store, step)
        best = Retention(keep_last=2, keep_best=1, metric="loss", mode="max", keep_every=3)
        assert store.prune(RUN, best) == Pruned(deleted=(1, 2, 4))
        assert steps(store.list(RUN)) == [0, 3, 5, 6]
        assert store.prune(RUN, best) == Pruned()
        assert len(everything(store)) == 4 * (len(FILES) + 1)

    def test_prune_in_the_background(self, store: Store) -> None:
        """Deleted in the background, steps are gone at once, and after `wait` their bytes are; nothing went wrong."""
        for step in range(3):
            commit(store, step)
        assert store.prune(RUN, NEWEST, background=True) == Pruned(deleted=(0, 1))
        assert steps(store.list(RUN)) == [2]
        assert store.wait() == ()
        assert len(everything(store)) == len(FILES) + 1

    def test_a_leased_step_stays_readable(self, store: Store) -> None:
        """What somebody reads is not pruned, however many read it; after the last it is."""
        first = commit(store, 1)
        commit(store, 2)
        pruner = self.another(store)
        with first.lease():
            with first.lease():
                assert pruner.prune(RUN, NEWEST) == Pruned(leased=(1,))
            assert pruner.prune(RUN, NEWEST, background=True) == Pruned(leased=(1,))
            assert pruner.wait() == ()
            check(first)
        assert pruner.prune(RUN, NEWEST) == Pruned(deleted=(1,))
        assert len(everything(store)) == len(FILES) + 1

    def test_what_is_gone_cannot_be_leased(self, store: Store) -> None:
        """A step that was pruned between listing and leasing is an error, also where it was saved again since."""
        listed = commit(store, 1)
        commit(store, 2)
        store.prune(RUN, NEWEST)
        with pytest.raises(NotACheckpointError, match="pruner"), listed.lease():
            pytest.fail("leased")
        again = commit(store, 1, writer=1)
        with pytest.raises(NotACheckpointError, match="pruner"), listed.lease():
            pytest.fail("leased")
        with again.lease():
            check(again, writer=1)

    def test_a_step_saved_again_is_not_the_pruners(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        """A pruner that listed a step, which others pruned and saved again since, leaves the new one alone."""
        commit(store, 1)
        commit(store, 2)
        pruner, other = self.another(store), self.another(store)
        real = pruner.pins

        def late(run: str) -> dict[str, int]:
            monkeypatch.undo()
            assert other.prune(RUN, NEWEST) == Pruned(deleted=(1,))
            commit(other, 1, writer=1)
            return real(run)

        monkeypatch.setattr(pruner, "pins", late)
        assert pruner.prune(RUN, NEWEST) == Pruned()
        first, _ = store.list(RUN)
        check(first, writer=1)

    def test_a_manifest_that_cannot_be_read_stops_nothing(self, store: Store) -> None:
        """Beside a step whose manifest a later version wrote, others are saved, pruned and repaired."""
        later = commit(store, 1).path / MANIFEST_NAME
        later.write_bytes(later.read_bytes().replace(b'"format_version": 1', b'"format_version": 99'))
        commit(store, 2)
        commit(store, 3)
        damaged = commit(store, 4)
        cut(damaged)
        assert store.prune(RUN, NEWEST) == Pruned(deleted=(2,))
        kept, aside = store.repair(RUN)
        assert "left as it is" in kept
        assert "set aside" in aside
        assert b'"format_version": 99' in later.read_bytes()

    def test_a_live_writer_is_left_alone(self, store: Store) -> None:
        """Neither a prune, nor a repair, nor another writer's stage touches what is being written."""
        staging = store.stage(RUN, 7)
        manifest = fill(staging, 7)
        other = self.another(store)
        commit(other, 1)
        assert other.prune(RUN, NEWEST) == Pruned()
        assert other.repair(RUN) == []
        staging.commit(manifest)
        store.release(staging)
        assert steps(other.list(RUN)) == [1, 7]

    def test_pins_keep_steps(self, store: Store) -> None:
        """A pinned step stays until it is unpinned; a pin moves; several may name one step; any process sees them."""
        for step in range(5):
            commit(store, step)
        store.pin(RUN, "champion", 0)
        store.pin(RUN, "paper", 0)
        store.pin(RUN, "paper", 2)
        assert self.another(store).pins(RUN) == {"champion": 0, "paper": 2}
        assert self.another(store).prune(RUN, NEWEST) == Pruned(deleted=(1, 3))
        store.unpin(RUN, "paper")
        assert store.pins(RUN) == {"champion": 0}
        assert store.prune(RUN, NEWEST) == Pruned(deleted=(2,))
        assert steps(store.list(RUN)) == [0, 4]

    def test_what_cannot_be_pinned(self, store: Store) -> None:
        """A step that is not committed, or damaged, cannot be pinned; a pin that is not there cannot be taken away."""
        damaged = commit(store, 1)
        cut(damaged)
        with pytest.raises(NotACheckpointError):
            store.pin(RUN, "best", 2)
        with pytest.raises(DamagedError):
            store.pin(RUN, "best", 1)
        with pytest.raises(ArgumentError, match="none of that name"):
            store.unpin(RUN, "best")
        assert store.pins(RUN) == {}

    def test_a_pin_that_says_nothing_stops_pruning(self, store: Store) -> None:
        """Where a pin does not name a step, nothing is deleted: it might be the one that must stay."""
        first = commit(store, 1)
        commit(store, 2)
        store.pin(RUN, "best", 1)
        (first.path.parent / "pins" / "best").write_bytes(b"step_1\n")
        for ask in (lambda: store.pins(RUN), lambda: store.prune(RUN, NEWEST)):
            with pytest.raises(DamagedError, match="expected the name of a step"):
                ask()
        assert steps(store.list(RUN)) == [1, 2]

    def test_damaged_steps_are_neither_counted_nor_deleted(self, store: Store) -> None:
        """Pruning leaves a damaged step as it is, and keeps as many whole ones as it was asked to."""
        checkpoints = [commit(store, step) for step in range(4)]
        cut(checkpoints[3])
        assert store.prune(RUN, NEWEST) == Pruned(deleted=(0, 1))
        assert (checkpoints[3].root / FILES[1]).read_bytes() == content(3, FILES[1])

    def test_repair_sets_damaged_steps_aside(self, store: Store) -> None:
        """Damaged steps lose their name but not a byte, and can be saved again; whole ones are left alone."""
        checkpoints = [commit(store, step) for step in range(4)]
        cut(checkpoints[1])
        (checkpoints[2].path / MANIFEST_NAME).unlink()
        (checkpoints[3].path / MANIFEST_NAME).write_bytes(b"{")
        before = everything(store)
        planned = store.repair(RUN, dry_run=True)
        assert [step_name(step) in sentence for step, sentence in zip((1, 2, 3), planned, strict=True)] == [True] * 3
        assert everything(store) == before
        done = store.repair(RUN)
        assert [step_name(step) in sentence for step, sentence in zip((1, 2, 3), done, strict=True)] == [True] * 3
        assert sorted(everything(store).values()) == sorted(before.values())
        assert steps(store.list(RUN)) == [0]
        check(checkpoints[0])
        assert store.repair(RUN) == []
        for step in (1, 2, 3):
            check(commit(store, step))
        assert steps(store.list(RUN)) == [0, 1, 2, 3]

    def test_repair_leaves_what_a_later_version_wrote(self, store: Store) -> None:
        """A step whose manifest has a later format is no damage: it is left as it is, and the reason is told."""
        place = commit(store, 1).path / MANIFEST_NAME
        place.write_bytes(place.read_bytes().replace(b'"format_version": 1', b'"format_version": 99'))
        before = everything(store)
        (said,) = store.repair(RUN)
        assert "left as it is" in said
        assert "update ckptflow" in said
        assert everything(store) == before

    @pytest.mark.parametrize(
        "name", ["", ".", "..", "a/b", "../a", ".hidden", "a b", "ü", "a\0", "a\n", "x" * 65, "-a"]
    )
    def test_odd_names(self, store: Store, name: str) -> None:
        """A run's or a pin's name that could lead elsewhere, or hide, is refused by every method."""
        commit(store, 1)
        before = everything(store)
        for ask in (
            lambda: store.list(name),
            lambda: store.latest(name),
            lambda: store.stage(name, 1),
            lambda: store.prune(name, NEWEST),
            lambda: store.repair(name),
            lambda: store.pins(name),
            lambda: store.pin(name, "best", 1),
            lambda: store.pin(RUN, name, 1),
            lambda: store.unpin(RUN, name),
        ):
            with pytest.raises(ArgumentError, match=r"expected 1 to 64 letters"):
                ask()
        assert everything(store) == before

    @pytest.mark.parametrize("step", [-1, MAX_STEP + 1])
    def test_steps_have_ten_digits(self, store: Store, step: int) -> None:
        """A step that its name could not hold is refused."""
        for ask in (lambda: store.stage(RUN, step), lambda: store.pin(RUN, "best", step)):
            with pytest.raises(ArgumentError, match="expected 0 to"):
                ask()
