"""What processes and ranks do in the tests of saving in the background, and a store that can be held up."""

import os
import resource
import signal
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from gloo_ranks import Outcome, attempt
from sharded_training import Training, seed_generators

from ckpt_core import AsyncSaver, PyTorchCheckpoint, async_save
from ckpt_core.store import LocalStore

UNLIMITED = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)


class HeldStore(LocalStore):
    """A local store in which no save begins to write until `go` is set, or `seconds` are over."""

    def __init__(self, root: str | Path, *, seconds: float = 30.0) -> None:
        super().__init__(root)
        self.go = threading.Event()
        self._seconds = seconds

    def stage(self, run: str, step: int) -> Any:
        """Wait, then make a staging directory."""
        self.go.wait(self._seconds)
        return super().stage(run, step)


def arguments(training: Training, step: int) -> dict[str, Any]:
    """Return what is saved beside module and optimizer."""
    return {"step": step, "scheduler": training.scheduler, "trainer": {"step": step}, "metrics": {"loss": 1.5}}


def of(training: Training) -> PyTorchCheckpoint:
    """Return what is saved."""
    return PyTorchCheckpoint(training.model, {"epochs": 5}, training.optimizer)


def files(directory: Path) -> dict[str, bytes]:
    """Return what a step's files hold, but for its manifest, which tells the time."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }


def train_on(directory: Path) -> None:
    """Save at once and in the background, go on training, and save again; the stores are `at_once`, `background`."""
    training = Training(seed=0)
    store = HeldStore(directory / "background")
    with AsyncSaver(store) as saver:
        for step in (1, 2):
            training.train(1)
            seed_generators(step)
            of(training).save(directory / "at_once", **arguments(training, step))
            store.go.clear()
            saver.save(of(training), **arguments(training, step))
            training.train(1)
            training.optimizer.param_groups[0]["lr"] = 9.0
            store.go.set()


def fail(directory: Path) -> dict[str, Outcome]:
    """Save, in the background, what rank 1 can neither write nor copy; return what each call says on this rank."""
    training, said = Training(seed=0), {}
    saver = AsyncSaver(directory)
    one = dist.get_rank() == 1
    if one:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
    said["save"] = attempt(saver.save, of(training), **arguments(training, 1))
    training.train(2)
    said["trained on"] = Outcome(int(training.model.count))
    said["next save"] = attempt(saver.save, of(training), **arguments(training, 2))
    said["save again"] = attempt(saver.save, of(training), **arguments(training, 3))
    said["close"] = attempt(saver.close)
    dist.barrier()
    resource.setrlimit(resource.RLIMIT_FSIZE, UNLIMITED)
    with AsyncSaver(directory) as other:
        if one:
            training.optimizer.param_groups[0]["lr"] = fail
        said["cannot copy"] = attempt(other.save, of(training), **arguments(training, 4))
        training.optimizer.param_groups[0]["lr"] = 0.1
        other.save(of(training), **arguments(training, 5))
    said["at last"] = Outcome(other.committed.step if other.committed else None)
    return said


def give_up(directory: Path, bounds: list[float]) -> tuple[Outcome, float]:
    """Close while the store is held up, each rank with its own bound; return what it says, and how long it took."""
    training = Training(seed=0)
    saver = AsyncSaver(HeldStore(directory, seconds=3.0))
    saver.save(of(training), **arguments(training, 1))
    began = time.monotonic()
    outcome = attempt(saver.close, bounds[dist.get_rank()])
    return outcome, time.monotonic() - began


def die(directory: Path, told: Path) -> None:
    """Wait for a write during which the other rank dies."""
    training = Training(seed=0)
    saver = AsyncSaver(HeldStore(directory, seconds=0.5))
    saver.save(of(training), **arguments(training, 1))
    if dist.get_rank() == 1:
        os._exit(1)
    told.write_text(attempt(saver.wait).text)


def leave_alone(directory: Path) -> Outcome:
    """End with an error of rank 1's own while a write is under way; the other rank closes."""
    training = Training(seed=0)

    def body() -> None:
        with AsyncSaver(HeldStore(directory, seconds=0.5), timeout=4) as saver:
            saver.save(of(training), **arguments(training, 1))
            if dist.get_rank() == 1:
                raise ZeroDivisionError

    return attempt(body)


def end_without_close(directory: Path, seconds: float, timeout: float, errors: Path) -> None:
    """Begin a save and let the process end."""
    sys.stderr.flush()
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    training = Training(seed=0)
    training.train(1)
    AsyncSaver(HeldStore(directory, seconds=seconds), timeout=timeout).save(of(training), **arguments(training, 1))


def train_until_term(directory: Path, seconds: float, bound: float, ready: Path) -> None:
    """Train until TERM, save, and exit: with 143 if the save ended within its bound, else with 1."""
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    training = Training(seed=0)
    saver = AsyncSaver(HeldStore(directory, seconds=seconds))
    ready.touch()
    while not stop.is_set():
        training.train(1)
    saver.save(of(training), **arguments(training, 1))
    outcome = attempt(saver.close, bound)
    ready.write_text(outcome.text)
    os._exit(1 if outcome.errors else 143)


def begin_group(path: Path) -> None:
    """Collective: begin a default group of two ranks, at a new file, in place of the one that there is."""
    rank = int(path.parent.name)
    store = dist.FileStore(str(path.parent.parent / path.name), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=30))


def save_across_groups(directory: Path) -> tuple[list[list[Any]], bool]:
    """Save with one saver: made without a group, over one that ends meanwhile, over the next one, without a close.

    Returns:
        The whole states that were saved, and whether each sum of training's own was right while a step was written.
    """
    rank = dist.get_rank()
    dist.destroy_process_group()
    saver = AsyncSaver(store := HeldStore(directory / "store"), timeout=30)
    states: list[list[Any]] = []
    for step in (1, 2):
        begin_group(directory / str(rank) / f"group_{step}")
        training = Training(seed=step)
        training.train(1)
        saver.save(of(training), **arguments(training, step))
        states.append(training.whole())
        sums = [torch.full((5,), float(rank)) for _ in range(50)]
        store.go.set()
        for one in sums:
            dist.all_reduce(one)
        store.go.clear()
        if step == 1:
            dist.destroy_process_group()
    dist.destroy_process_group()
    store.go.set()
    async_save._finish_all()
    assert saver.committed is not None
    return states, all(torch.equal(one, torch.ones(5)) for one in sums)


def wait_for_term(directory: Path, seconds: float, timeout: float, ready: Path) -> None:
    """Save, and train until the process is ended from outside."""
    training = Training(seed=0)
    saver = AsyncSaver(HeldStore(directory, seconds=seconds), timeout=timeout)
    saver.save(of(training), **arguments(training, 1))
    ready.touch()
    time.sleep(60)
