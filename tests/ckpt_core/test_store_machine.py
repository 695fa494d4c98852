"""Any order of stage, commit, crash, prune, pin, read, lease, damage and repair, against a model in memory."""

import itertools
import shutil
import tempfile
import time
import uuid
from dataclasses import dataclass, field
from unittest import mock

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, precondition, rule

from ckpt_core.errors import NotACheckpointError, StepExistsError
from ckpt_core.retention import Retention, StepFacts, kept
from ckpt_core.store import LocalStore, records
from ckpt_core.store.remote import RemoteStore
from ckpt_core.testing.store_contract import FILES, RUN, check, cut, everything, fill, steps

STEPS = st.integers(0, 5)
NAMES = st.sampled_from(["champion", "best", "paper"])
WEEK = 7 * 24 * 3600


@dataclass
class Model:
    """What the store should hold."""

    whole: dict[int, int] = field(default_factory=dict)
    """Who wrote each committed step."""

    damaged: set[int] = field(default_factory=set)
    pins: dict[str, int] = field(default_factory=dict)
    leased: list[int] = field(default_factory=list)
    aside: int = 0
    """How many steps were set aside."""


class StoreMachine(RuleBasedStateMachine):
    """One store, used by writers, readers, pruners and those who pin, one at a time."""

    staged = Bundle("staged")
    leases = Bundle("leases")

    def make(self):
        """Return the store, empty."""
        raise NotImplementedError

    def die(self, staging):
        """End a writer as a killed process ends."""

    def __init__(self):
        super().__init__()
        self.store = self.make()
        self.model = Model()
        self.writers = itertools.count(1)
        self.alive, self.held = [], []

    @rule(target=staged, step=STEPS)
    def stage(self, step):
        """A step is staged and written, unless it is committed."""
        if step in self.model.whole or step in self.model.damaged:
            with pytest.raises(StepExistsError):
                self.store.stage(RUN, step)
            return multiple()
        staging, writer = self.store.stage(RUN, step), next(self.writers)
        self.alive.append(staging)
        return staging, step, writer, fill(staging, step, writer)

    @rule(written=consumes(staged))
    def commit(self, written):
        """The first to commit a step has it; any other is told."""
        staging, step, writer, manifest = written
        if step in self.model.whole or step in self.model.damaged:
            with pytest.raises(StepExistsError):
                staging.commit(manifest)
        else:
            staging.commit(manifest)
            self.model.whole[step] = writer
        self._release(staging)

    @rule(written=consumes(staged))
    def give_up(self, written):
        """A writer releases what it staged, without a commit."""
        self._release(written[0])

    @rule(written=consumes(staged))
    def crash(self, written):
        """A writer dies before its commit."""
        self._crash(written[0])

    @rule(written=consumes(staged))
    def crash_after_commit(self, written):
        """A writer dies after its commit, before it lets go."""
        staging, step, writer, manifest = written
        if step not in self.model.whole and step not in self.model.damaged:
            staging.commit(manifest)
            self.model.whole[step] = writer
        self._crash(staging)

    @rule(last=st.integers(1, 3), best=st.integers(0, 2), every=st.none() | st.integers(2, 4), background=st.booleans())
    def prune(self, last, best, every, background):
        """What the policy does not keep goes, except what is pinned or read."""
        retention = Retention(keep_last=last, keep_best=best, metric="loss" if best else None, keep_every=every)
        facts = [StepFacts(step, {"loss": -step}) for step in self.model.whole]
        keep = kept(facts, retention, pinned=set(self.model.pins.values()))
        old = sorted(set(self.model.whole) - keep)
        pruned = self.store.prune(RUN, retention, background=background)
        assert pruned.leased == tuple(step for step in old if step in self.model.leased)
        assert pruned.deleted == tuple(step for step in old if step not in self.model.leased)
        assert pruned.errors == ()
        assert self.store.wait() == ()
        for step in pruned.deleted:
            del self.model.whole[step]

    @rule(name=NAMES, step=STEPS)
    def pin(self, name, step):
        """A whole step can be pinned, no other."""
        if step in self.model.whole:
            self.store.pin(RUN, name, step)
            self.model.pins[name] = step
        elif step not in self.model.damaged:
            with pytest.raises(NotACheckpointError):
                self.store.pin(RUN, name, step)

    @precondition(lambda self: self.model.pins)
    @rule(data=st.data())
    def unpin(self, data):
        """A pin is taken away."""
        name = data.draw(st.sampled_from(sorted(self.model.pins)))
        self.store.unpin(RUN, name)
        del self.model.pins[name]

    @precondition(lambda self: self.model.whole)
    @rule(target=leases, data=st.data())
    def lease(self, data):
        """A reader takes hold of a step."""
        step = data.draw(st.sampled_from(sorted(self.model.whole)))
        (checkpoint,) = [c for c in self.store.list(RUN) if c.step == step]
        lease = checkpoint.lease()
        lease.__enter__()
        self.model.leased.append(step)
        self.held.append(lease)
        return checkpoint, lease, self.model.whole[step]

    @rule(held=consumes(leases))
    def let_go(self, held):
        """A reader reads what it leased, whatever happened meanwhile, and lets go."""
        checkpoint, lease, writer = held
        check(checkpoint, writer)
        lease.__exit__(None, None, None)
        self.held.remove(lease)
        self.model.leased.remove(checkpoint.step)

    @precondition(lambda self: set(self.model.whole) - set(self.model.leased))
    @rule(data=st.data())
    def damage(self, data):
        """A file of a step that nobody reads is cut short."""
        step = data.draw(st.sampled_from(sorted(set(self.model.whole) - set(self.model.leased))))
        (checkpoint,) = [c for c in self.store.list(RUN) if c.step == step]
        cut(checkpoint)
        del self.model.whole[step]
        self.model.damaged.add(step)

    @rule()
    def repair(self):
        """Damaged steps are set aside."""
        done = [sentence for sentence in self.store.repair(RUN) if "set aside" in sentence]
        assert len(done) == len(self.model.damaged)
        self.model.aside += len(done)
        self.model.damaged.clear()

    @invariant()
    def what_is_read(self):
        """The store holds the model's steps, whole, of one writer each, and its pins."""
        found = self.store.list(RUN)
        assert steps(found) == sorted(self.model.whole)
        for checkpoint in found:
            check(checkpoint, self.model.whole[checkpoint.step])
        latest = self.store.latest(RUN)
        assert (latest and latest.step) == max(self.model.whole, default=None)
        assert self.store.pins(RUN) == self.model.pins

    def _release(self, staging):
        self.alive.remove(staging)
        self.store.release(staging)

    def _crash(self, staging):
        self.alive.remove(staging)
        self.die(staging)

    def teardown(self):
        """When all are dead, a repair leaves the steps, the pins and what was set aside, and nothing else."""
        for staging in self.alive:
            self.die(staging)
        for lease in self.held:
            lease.__exit__(None, None, None)
        real = time.time
        later = mock.patch.object(records.time, "time", lambda: real() + WEEK)  # noqa: PT008 - it goes on
        with later:
            self.store.repair(RUN)
        left = len(self.model.whole) + len(self.model.damaged) + self.model.aside
        assert len(everything(self.store)) == left * (len(FILES) + 1) + len(self.model.pins)


class LocalMachine(StoreMachine):
    """In a directory."""

    def make(self):  # noqa: D102
        self.directory = tempfile.mkdtemp()
        return LocalStore(self.directory)

    def die(self, staging):  # noqa: D102
        self.store._locks.pop(staging.path).release()  # as the system does for a dead process; the lock file stays

    def teardown(self):  # noqa: D102
        super().teardown()
        shutil.rmtree(self.directory)


class MemoryMachine(StoreMachine):
    """In an object store."""

    def make(self):  # noqa: D102
        return RemoteStore(f"memory://{uuid.uuid4().hex}/store")

    def teardown(self):  # noqa: D102
        super().teardown()
        if self.store.root.exists():
            self.store.root.fs.rm(self.store.root.path, recursive=True)


# Without shrinking, which takes minutes here: a failure shows its steps as they were.
SETTINGS = settings(
    max_examples=20,
    stateful_step_count=25,
    deadline=None,
    phases=(Phase.generate,),
    suppress_health_check=[HealthCheck.too_slow],
)
TestLocalMachine = LocalMachine.TestCase
TestLocalMachine.settings = SETTINGS
TestMemoryMachine = MemoryMachine.TestCase
TestMemoryMachine.settings = SETTINGS
