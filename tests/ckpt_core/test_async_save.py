"""Saving in the background: what is written, when it is committed, and how a failure is told."""

import os
import signal
import time
from pathlib import Path

import async_training
import pytest
from async_training import HeldStore, arguments, files, of
from gloo_ranks import fork, run_ranks, values
from sharded_training import Training
from small_models import assert_same

from ckpt_core import AsyncSaver, PyTorchCheckpoint, async_save, open_store
from ckpt_core.errors import ArgumentError, CommitError


def steps(store):
    """Return the committed steps."""
    return [checkpoint.step for checkpoint in open_store(store).list("default")]


def left(store):
    """Return what lies in the run's directory."""
    run = Path(store) / "default"
    return sorted(path.name for path in run.iterdir()) if run.exists() else []


def assert_same_stores(directory):
    """Assert that both stores hold two steps, with the same bytes."""
    for step in ("step_0000000001", "step_0000000002"):
        at_once, background = (files(directory / name / "default" / step) for name in ("at_once", "background"))
        assert len(at_once) >= 8
        assert background == at_once


def test_what_was_copied_is_written(tmp_path):
    """What changes after `save` returned does not reach the step: its bytes are those of a save that was at once."""
    async_training.train_on(tmp_path)
    assert_same_stores(tmp_path)


def test_two_ranks_write_what_they_copied(tmp_path):
    """With FSDP2 on two ranks, too, a step holds the bytes of a save at once, and one process restores it."""
    values(run_ranks(2, async_training.train_on, tmp_path))
    assert_same_stores(tmp_path)
    one, other = Training(seed=1), Training(seed=2)
    for name, training in (("at_once", one), ("background", other)):
        checkpoint = PyTorchCheckpoint.from_url(tmp_path / name / "default" / "step_0000000002")
        checkpoint.restore(training.model, training.optimizer, scheduler=training.scheduler)
    assert_same(other.whole(), one.whole())


def test_a_save_waits_for_the_one_before(tmp_path):
    """While a step is written the next save waits, and tells how long apart from its own copy."""
    training, store = Training(seed=0), HeldStore(tmp_path, seconds=0.5)
    with AsyncSaver(store) as saver:
        first = saver.save(of(training), **arguments(training, 1))
        assert saver.committed is None
        second = saver.save(of(training), **arguments(training, 2))
        assert saver.committed.step == 1
        assert first.waited_s < 0.1
        assert second.waited_s > 0.4
        assert second.blocked_s < 0.4
        assert saver.wait().step == 2
        assert saver.wait().step == 2
        assert steps(tmp_path) == [1, 2]


def test_the_committed_checkpoint_is_a_reference(tmp_path):
    """`wait` returns a checkpoint that knows its URL and loads on demand: not the model, which is another by now."""
    training = Training(seed=0)
    with AsyncSaver(tmp_path, run="nightly") as saver:
        assert saver.wait() is None
        saver.save(of(training), **arguments(training, 4))
        expected = {name: value.clone() for name, value in training.model.state_dict().items()}
        training.train(1)
        checkpoint = saver.wait()
    assert checkpoint.url == (tmp_path / "nightly" / "step_0000000004").as_uri()
    assert checkpoint["epochs"] == 5
    assert checkpoint.module is None
    assert_same(checkpoint["module_state_dict"], expected)
    assert PyTorchCheckpoint.from_json(checkpoint.to_json()) == checkpoint


def test_a_failure_is_told_by_the_next_save(tmp_path):
    """A write that failed is an error of the next save, which does nothing else; the one after that works."""
    training = Training(seed=0)
    (tmp_path / "default").write_text("in the way")
    with AsyncSaver(tmp_path) as saver:
        saver.save(of(training), **arguments(training, 1))
        training.train(1)
        with pytest.raises(CommitError, match=r"step 1 of run 'default': not committed: FileExistsError"):
            saver.save(of(training), **arguments(training, 2))
        (tmp_path / "default").unlink()
        saver.save(of(training), **arguments(training, 3))
    assert steps(tmp_path) == [3]


@pytest.mark.parametrize("last", ["wait", "close"])
def test_a_failure_is_told_at_the_end(tmp_path, last):
    """`wait` and `close` raise what failed, with its cause, once."""
    training, saver = Training(seed=0), AsyncSaver(tmp_path)
    of(training).save(tmp_path, step=1)
    saver.save(of(training), step=1)
    with pytest.raises(CommitError, match=r"step 1 of run 'default', saved .*is committed") as caught:
        getattr(saver, last)()
    assert isinstance(caught.value.__cause__, FileExistsError)
    saver.close()


def test_an_error_of_one_rank_is_told_by_all(tmp_path):
    """What one rank cannot write or copy is an error of every rank, and what is repaired works; training goes on."""
    for said in values(run_ranks(2, async_training.fail, tmp_path)):
        assert said["save"].value.step == 1
        assert said["trained on"].value == 2
        for call, step in (("next save", 1), ("close", 3)):
            assert said[call].errors[0] == "CommitError"
            assert f"step {step} of run 'default': not committed: OSError: [Errno 27] File too large" in said[call].text
        assert said["save again"].value.step == 3
        assert said["cannot copy"].errors[0] == "ArgumentError"
        assert said["at last"].value == 5
    assert left(tmp_path) == ["step_0000000005"]


@pytest.mark.parametrize("last", ["wait", "close"])
def test_a_write_that_takes_too_long_is_given_up(tmp_path, last):
    """When time is up the error names the step; it never will be committed, the saver is closed, and others save."""
    training, store = Training(seed=0), HeldStore(tmp_path)
    saver = AsyncSaver(store)
    saver.save(of(training), **arguments(training, 7))
    began = time.monotonic()
    with pytest.raises(CommitError, match=r"step 7 of run 'default': not committed: given up .* time was up"):
        getattr(saver, last)(timeout=0.3)
    assert time.monotonic() - began < 2
    with pytest.raises(ArgumentError, match="closed"):
        saver.save(of(training), **arguments(training, 8))
    store.go.set()
    with AsyncSaver(tmp_path) as other:
        other.save(of(training), **arguments(training, 8))
    assert steps(tmp_path) == [8]
    deadline = time.monotonic() + 10  # the thread that was given up removes what it wrote
    while left(tmp_path) != ["step_0000000008"] and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left(tmp_path) == ["step_0000000008"]


def test_a_killed_write_is_swept(tmp_path):
    """What a write left that was killed in the middle is removed by the next save in the background."""
    (tmp_path / "default" / ".staging-step_0000000001-0").mkdir(parents=True)
    training = Training(seed=0)
    with AsyncSaver(tmp_path) as saver:
        saver.save(of(training), step=1)
    assert left(tmp_path) == ["step_0000000001"]


@pytest.mark.parametrize("bounds", [[0.5, 0.5], [0.5, 20.0], [20.0, 0.5]], ids=str)
def test_a_rank_gives_up_for_all(tmp_path, bounds):
    """If time is up on one rank, the step is committed by none, all of them say so, and none hangs."""
    for outcome, seconds in values(run_ranks(2, async_training.give_up, tmp_path, bounds)):
        assert outcome.errors[0] == "CommitError", outcome
        assert "step 1 of run 'default'" in outcome.text
        assert "given up" in outcome.text
        assert seconds < 8
    assert steps(tmp_path) == []
    PyTorchCheckpoint(Training(seed=0).model).save(tmp_path, step=2)
    assert left(tmp_path) == ["step_0000000002"]


def test_the_death_of_a_rank_is_told(tmp_path):
    """If a rank dies while a step is written, the others say at once that the step is not committed."""
    with pytest.raises(EOFError):  # that rank has nothing to say
        run_ranks(2, async_training.die, tmp_path / "store", tmp_path / "told")
    assert "step 1 of run 'default': not committed" in (tmp_path / "told").read_text()
    assert steps(tmp_path / "store") == []


def test_an_error_in_training_is_not_hidden(tmp_path):
    """A rank that ends with an error of its own finishes its part of the write first, and waits for nobody's close."""
    other, failed = run_ranks(2, async_training.leave_alone, tmp_path)
    assert failed.value.errors[0] == "ZeroDivisionError"
    assert other.value.errors == ()
    assert steps(tmp_path) == [1]


def test_the_end_of_the_process_finishes_a_write(tmp_path):
    """A process that ends without `close` commits what it was writing."""
    process = fork(async_training.end_without_close, tmp_path, 0.5, 20.0, tmp_path / "errors")
    process.join(30)
    assert process.exitcode == 0
    assert steps(tmp_path) == [1]
    assert (tmp_path / "errors").read_text() == ""


def test_the_end_of_the_process_tells_what_it_gave_up(tmp_path):
    """A process that ends without `close` waits no longer than the bound, and says which step is not committed."""
    process = fork(async_training.end_without_close, tmp_path, 20.0, 0.5, tmp_path / "errors")
    process.join(10)
    assert process.exitcode == 0
    assert left(tmp_path) == []
    assert "step 1 of run 'default': not committed: given up" in (tmp_path / "errors").read_text()


@pytest.mark.parametrize(("seconds", "code", "committed"), [(0.5, 143, [1]), (20.0, 1, [])], ids=["slow", "too slow"])
def test_term_ends_within_its_bound(tmp_path, seconds, code, committed):
    """After TERM a slow write is finished within the bound, and a slower one given up; nothing half is visible."""
    ready = tmp_path / "ready"
    process = fork(async_training.train_until_term, tmp_path / "store", seconds, 3.0, ready)
    while not ready.exists():
        time.sleep(0.01)
    began = time.monotonic()
    os.kill(process.pid, signal.SIGTERM)
    process.join(20)
    assert process.exitcode == code
    assert time.monotonic() - began < 6
    assert steps(tmp_path / "store") == committed
    assert ("not committed" in ready.read_text()) == (not committed)


def test_a_save_ends_on_the_ranks_that_it_began_on(tmp_path):
    """Whatever becomes of the default group, before, meanwhile or after, each step has every rank's part."""
    for rank in ("0", "1"):
        (tmp_path / rank).mkdir()
    (states, right), (_, right_too) = values(run_ranks(2, async_training.save_across_groups, tmp_path))
    assert right
    assert right_too
    assert steps(tmp_path / "store") == [1, 2]
    for step, state in enumerate(states, 1):
        training = Training(seed=7)
        checkpoint = PyTorchCheckpoint.from_url(tmp_path / "store" / "default" / f"step_{step:010d}")
        checkpoint.restore(training.model, training.optimizer, scheduler=training.scheduler)
        assert_same(training.whole(), state)


@pytest.mark.parametrize(("seconds", "timeout", "committed"), [(1.0, 20.0, [1]), (30.0, 0.5, [])], ids=["slow", "late"])
def test_term_without_a_handler_finishes_a_write(tmp_path, seconds, timeout, committed):
    """A script that handles no signals ends by TERM, as ever, but finishes what it writes, or gives it up in time."""
    ready = tmp_path / "ready"
    process = fork(async_training.wait_for_term, tmp_path / "store", seconds, timeout, ready)
    while not ready.exists():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    os.kill(process.pid, signal.SIGTERM)
    process.join(20)
    assert process.exitcode == -signal.SIGTERM
    assert steps(tmp_path / "store") == committed


def test_term_is_handled_while_something_is_written(tmp_path):
    """The handler is there from a save to its end, in no forked child, and takes no other handler's place."""
    training, store, found = Training(seed=0), HeldStore(tmp_path), [signal.signal(signal.SIGTERM, signal.SIG_DFL)]
    try:
        with AsyncSaver(store) as saver:
            saver.save(of(training), step=1)
            assert callable(signal.getsignal(signal.SIGTERM))
            child = os.fork()
            if child == 0:
                os._exit(0 if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL and not async_save._open else 1)
            assert os.waitpid(child, 0)[1] == 0
            store.go.set()
            saver.wait()
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
            signal.signal(signal.SIGTERM, found.append)
            saver.save(of(training), step=2)
            assert signal.getsignal(signal.SIGTERM) == found.append
        assert signal.getsignal(signal.SIGTERM) == found.append
    finally:
        signal.signal(signal.SIGTERM, found[0])


def test_memory_is_kept_from_save_to_save(tmp_path):
    """The second save copies into the memory of the first one."""
    training = Training(seed=0)
    training.train(1)
    with AsyncSaver(tmp_path) as saver:
        places = []
        for step in (1, 2):
            saver.save(of(training), **arguments(training, step))
            saver.wait()
            places.append([buffer.local.data_ptr() for buffer in saver._buffers._held.values()])
    assert places[0] == places[1]
    assert len(places[0]) > 10


def test_mistakes_are_told(tmp_path):
    """A closed saver, a bound that is none and what cannot be saved are the caller's errors; nothing is written."""
    training = Training(seed=0)
    with pytest.raises(ArgumentError, match="timeout=-1"):
        AsyncSaver(tmp_path, timeout=-1)
    with AsyncSaver(tmp_path) as saver:
        for call in (saver.wait, saver.close):
            with pytest.raises(ArgumentError, match="timeout=inf"):
                call(float("inf"))
        with pytest.raises(ArgumentError, match="hyperparameters"):
            saver.save(PyTorchCheckpoint(training.model, {"a": object()}), step=1)
    with pytest.raises(ArgumentError, match="step 1: this AsyncSaver was closed"):
        saver.save(of(training), step=1)
    saver.close()
    assert list(tmp_path.iterdir()) == []
