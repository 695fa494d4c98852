"""Saving in the background: training goes on while the copy of its last state is written and committed.

with AsyncSaver(store_url, run="nightly") as saver:
    for step in ...:
        ...
        saver.save(PyTorchCheckpoint(model, hyperparameters, optimizer), step=step)
"""

# torch.distributed is only partly annotated.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

# Registers the end of thread pools before `_finish_all` is registered, and so comes after it.
import concurrent.futures.thread  # noqa: F401  # pyright: ignore[reportUnusedImport]
import logging
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch.distributed as dist

from ckpt_core import commit, ranks
from ckpt_core.buffers import HostBuffers
from ckpt_core.checkpoint import PyTorchCheckpoint, collect
from ckpt_core.errors import ArgumentError, CkptError, CommitError
from ckpt_core.flight import Flight
from ckpt_core.store import open_store

if TYPE_CHECKING:
    from types import FrameType

    from ckpt_core.store import Store
    from ckpt_core.urls import AnyPath

_PATIENCE = timedelta(minutes=30)
"""How long a rank that has written its part waits for one that has not."""

_SKEW_S = 5.0
"""How much later than another one a rank may come to `close`."""

_log = logging.getLogger(__name__)
_open: weakref.WeakSet[AsyncSaver] = weakref.WeakSet()


@dataclass(frozen=True)
class SaveTimes:
    """How long a save kept training from going on."""

    step: int
    waited_s: float
    """For the write before it to end."""

    blocked_s: float
    """For the copy of the state."""


@dataclass(frozen=True)
class _Groups:
    """The process groups of the saves that begin on one default group; None each for a process alone."""

    acting: dist.ProcessGroup | None
    """The ranks that act, as they are when a save begins."""

    agreeing: dist.ProcessGroup | None
    """For what the caller's thread exchanges."""

    writing: dist.ProcessGroup | None
    """For what the writing thread exchanges."""

    @classmethod
    def make(cls) -> _Groups:
        """Collective: make them of the ranks that act."""
        return cls(ranks.group(), _new_group(), _new_group())

    def destroy(self) -> None:
        """Close their connections."""
        for group in (self.agreeing, self.writing):
            if group is not None:
                with suppress(ValueError):  # destroy_process_group destroyed it together with the default group
                    dist.destroy_process_group(group)


class AsyncSaver:
    """Commits steps to a store while training goes on; one at a time. Collective, and so are `save`, `wait`, `close`.

    `save` copies the state into host memory, which is kept for the next one, and returns. A thread then writes and
    commits the copy, over gloo groups of its own. A save belongs to the ranks that it began on: it is finished by all
    of them, also after `destroy_process_group`. The next one takes the process group that there is then. A write that
    failed is an error of the next call, before that does anything, on every rank.

    At the end of the process, what was not closed is finished, or given up within `timeout`. So it is on TERM, where
    that has its default effect and the saves come from the main thread: while a save is open, a handler finishes it or
    gives it up, and then ends the process by the same signal. A handler of your own stays; let it lead to `close`.

    Args:
        store: the store, or its URL; steps are committed as `<url>/<run>/step_NNNNNNNNNN`.
        run: the lineage that the steps belong to.
        timeout: seconds that the last write may take from the call of `close`, the end of the process, or TERM. Then
            it is given up: the step is not committed, nothing of it is visible, and the next save removes what it left.
    """

    def __init__(self, store: str | Path | Store, *, run: str = "default", timeout: float = 600.0) -> None:
        _check_timeout(timeout)
        self._store = cast("Store", store) if hasattr(store, "stage") else open_store(cast("AnyPath", store))
        self._run, self._timeout = run, timeout
        self._buffers = HostBuffers()
        self._flight: Flight[PyTorchCheckpoint] | None = None
        self._committed: PyTorchCheckpoint | None = None
        self._closed = False
        self._groups = _Groups.make()
        _open.add(self)

    def __enter__(self) -> AsyncSaver:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.close()
            return
        self._finish_quietly(
            time.monotonic()
        )  # the other ranks may not come to `close`; and it is that error that is to be seen
        self._release()

    @property
    def committed(self) -> PyTorchCheckpoint | None:
        """The newest checkpoint that this rank knows to be committed, to be loaded on demand. Not collective."""
        flight = self._flight
        return self._committed if flight is None else flight.committed or self._committed

    def save(
        self,
        checkpoint: PyTorchCheckpoint,
        *,
        step: int,
        scheduler: Any | None = None,
        trainer: Mapping[str, Any] | None = None,
        assets: str | Path | None = None,
        metrics: Mapping[str, Any] | None = None,
        lineage: Mapping[str, Any] | None = None,
    ) -> SaveTimes:
        """Copy the state, and begin to write it; a write that is under way is waited for first. Collective.

        The arguments are those of `PyTorchCheckpoint.save`. When this returns, module, optimizer and scheduler may
        change; the files in `assets` may not, until the step is committed.

        Raises:
            CommitError: the step before this was not committed, or not surely; nothing of this one was done.
            ArgumentError: something cannot be saved; nothing was written.
        """
        if self._closed:
            raise ArgumentError(f"save of step {step}: this AsyncSaver was closed; make a new one.")
        began = time.monotonic()
        self._settle_before_save()
        if self._closed:
            raise CommitError(
                f"step {step}: not saved: the ranks lost each other; make a new AsyncSaver on those left."
            )
        waited = time.monotonic()
        described = partial(
            collect, checkpoint, run=self._run, step=step, scheduler=scheduler, trainer=trainer, assets=assets,
            metrics=metrics, lineage=lineage,
        )  # fmt: skip

        def copy() -> commit.Content:
            parts, _ = commit.agree(described, lambda: self._store)
            content = ranks.together(lambda: commit.stage(parts, self._buffers))
            commit.check_state(content)
            return content

        with ranks.within(self._groups.agreeing):
            content = ranks.together(copy)
        _finish_on_term()
        self._flight = Flight(f"step {step} of run {self._run!r}", partial(self._write, self._groups.writing, content))
        times = SaveTimes(step, waited - began, time.monotonic() - waited)
        _log.info("step %d: waited %.3f s for the write before it, copied in %.3f s", *asdict(times).values())
        return times

    def wait(self, timeout: float | None = None) -> PyTorchCheckpoint | None:
        """Wait until nothing is being written; return the last checkpoint that was committed, or None. Collective.

        Args:
            timeout: seconds after which the write is given up; that closes the saver.

        Raises:
            CommitError: the step that was being written was not committed, or not surely; the message says which.
        """
        if timeout is not None:
            _check_timeout(timeout)
        self._settle(timeout)
        return self._committed

    def close(self, timeout: float | None = None) -> None:
        """Finish the last write, or give it up, and release memory and process groups. Collective.

        Args:
            timeout: seconds that it may take; by default what the constructor was given.

        Raises:
            CommitError: the step that was being written was not committed, or not surely; the message says which.
        """
        seconds = self._timeout if timeout is None else timeout
        _check_timeout(seconds)
        try:
            self._settle(seconds)
        finally:
            self._release()

    def _write(
        self, group: dist.ProcessGroup | None, content: commit.Content, permit: Callable[[], None]
    ) -> PyTorchCheckpoint:
        """Collective, in the thread: write and commit what was copied."""
        with ranks.within(group):
            reference = commit.commit(self._store, content, permit)
        manifest = content.manifest
        types = {"hyperparameter_types": manifest.hyperparameter_types}
        return PyTorchCheckpoint.from_dict({**asdict(reference), "hyperparameters": manifest.hyperparameters, **types})

    def _settle_before_save(self) -> None:
        """Collective: end the write that is under way, and have groups of the ranks that act now."""
        if self._groups.acting is ranks.group():
            self._settle()
            return
        former, groups = self._groups, _Groups.make()
        with ranks.within(groups.agreeing):
            try:
                ranks.together(self._settle)  # the ranks that are there now may not be those that the write has
            finally:
                former.destroy()
                self._groups = groups

    def _settle(self, timeout: float | None = None) -> None:
        """Collective: end the write that is under way, with one outcome for all ranks."""
        if self._flight is None:
            return
        flight, deadline = self._flight, None if timeout is None else time.monotonic() + timeout
        flight.join(timeout)
        if deadline is not None:
            flight.give_up()
        try:
            self._agree(flight, deadline)
        finally:
            self._flight, self._committed = None, flight.committed or self._committed
            _restore_term()

    def _agree(self, flight: Flight[PyTorchCheckpoint], deadline: float | None) -> None:
        """Collective: raise what any rank has to say against the step's being committed."""
        try:
            with ranks.within(self._groups.agreeing):
                if deadline is not None:
                    self._meet(max(0.0, deadline - time.monotonic()) + _SKEW_S)
                if not all(ranks.each(flight.outcome)):  # time was up when a rank had agreed to the commit already
                    ranks.each(flight.named)
        except CommitError:
            if deadline is not None:  # a thread that was given up may still use the process group
                self._release()
            raise
        except RuntimeError as error:
            _log.warning("a rank is gone, or did not come in time: %s", error)
            self._release()
            flight.end()

    def _meet(self, seconds: float) -> None:
        """Collective: wait for the other ranks; a RuntimeError if they do not come in time."""
        group: Any = self._groups.agreeing
        if group is not None:  # torch's own function does not take a group after destroy_process_group
            group.monitored_barrier(timedelta(seconds=seconds))

    def _finish_alone(self, timeout: float) -> None:
        """End the write that is under way without asking the other ranks: without this one, nothing is committed."""
        if self._flight is None:
            return
        flight, self._flight = self._flight, None
        try:
            flight.join(timeout)
            flight.end()
        finally:
            flight.give_up()  # an interrupt ends the waiting
            self._committed = flight.committed or self._committed

    def _finish_quietly(self, began: float) -> None:
        """Finish the write, or give it up when the timeout has passed since `began`; log an error."""
        try:
            self._finish_alone(max(0.0, began + self._timeout - time.monotonic()))
        except CkptError as error:
            _log.error("%s", error)

    def _release(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._buffers = HostBuffers()
        _open.discard(self)
        self._groups.destroy()
        _restore_term()


def _new_group() -> dist.ProcessGroup | None:
    """Collective: return a gloo group of the ranks that act; None for a process alone."""
    acting = ranks.group()
    if acting is None:
        return None
    group = dist.new_group(
        dist.get_process_group_ranks(acting),
        timeout=_PATIENCE,
        backend="gloo",
        use_local_synchronization=acting is not dist.group.WORLD,  # the others do not take part
    )
    return cast("dist.ProcessGroup", group)


def _check_timeout(timeout: float) -> None:
    if not 0 <= timeout <= threading.TIMEOUT_MAX:
        raise ArgumentError(f"timeout={timeout}: expected seconds, 0 or more, and finite.")


def _finish_all() -> None:
    """At the end of the process: finish what was not closed, or give it up."""
    began = time.monotonic()
    for saver in list(_open):
        saver._finish_quietly(began)  # pyright: ignore[reportPrivateUsage] - this module's own


def _finish_on_term() -> None:
    """Have TERM finish what is being written, where it would end the process at once."""
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _end_by_signal)


def _restore_term() -> None:
    """Give TERM its default effect back, once nothing is being written."""
    writing = any(saver._flight is not None for saver in _open)  # pyright: ignore[reportPrivateUsage]
    if not writing and threading.current_thread() is threading.main_thread():
        _default_term()


def _default_term() -> None:
    if signal.getsignal(signal.SIGTERM) is _end_by_signal:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _end_by_signal(number: int, _frame: FrameType | None) -> None:
    """Finish what is being written, or give it up, then end as the signal does by default."""
    signal.signal(number, signal.SIG_IGN)  # a launcher may send it to the process group and to the process
    try:
        _finish_all()
    finally:
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)


def _forget() -> None:
    """In a forked child, such as a worker of a DataLoader: it has no thread that writes, and no signal to handle."""
    _open.clear()
    _default_term()


os.register_at_fork(after_in_child=_forget)
# `atexit` would be too late: no thread pool takes work then, and a write may use one.
threading._register_atexit(_finish_all)  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
