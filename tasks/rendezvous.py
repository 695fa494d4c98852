"""torchrun's own rendezvous, for the agents of several nodes: one that ends a job on all of them when it ends on one.

Imported by `tasks.agent` alone, since it imports torch.
"""

import math
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from torch._C._distributed_c10d import Store
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousError,
    RendezvousGracefulExitError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousTimeoutError,
    rendezvous_handler_registry,
)
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import create_backend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler, create_handler

BACKEND = "ckptflow"
LEAVE_S = 5.0
"""How long the host waits at its end for the others to have left the rendezvous, which goes with it."""

ANSWER_S = 30.0
"""How long the host may take to answer; a network that is gone is no error by itself."""


class EndedElsewhereError(Exception):
    """The ranks of this node have to end, for a reason that lies on another node; the message says which."""


class Patience:
    """Ends this process, and so its ranks by its reaper, when a call lasts too long: nothing can interrupt one."""

    def __init__(self) -> None:
        self._deadline = math.inf
        threading.Thread(target=self._watch, daemon=True).start()

    @contextmanager
    def of(self, seconds: float) -> Iterator[None]:
        """Have patience for so long."""
        self._deadline = time.monotonic() + seconds
        try:
            yield
        finally:
            self._deadline = math.inf

    def _watch(self) -> None:
        while time.monotonic() < self._deadline:
            time.sleep(1)
        sys.stderr.write("the node that started the job does not answer; ending this node's ranks\n")
        sys.stderr.flush()
        os._exit(1)


class Rendezvous(RendezvousHandler):
    """c10d's rendezvous, and what torchrun's agents do not do with it by themselves.

    They do not look whether it was closed, so that ranks would wait for those that are gone until their collective
    times out: with NCCL after minutes. And they number nodes by their addresses: here the host's ranks come first, so
    that what rank 0 prints is seen where the job was started.
    """

    def __init__(self, inner: DynamicRendezvousHandler, *, host: bool) -> None:
        self._inner, self._host = inner, host
        self._nodes: int = inner.settings.max_nodes
        self._store: Store | None = None
        self._patience = Patience()

    def get_backend(self) -> str:
        """Return the name that this is registered under."""
        return BACKEND

    @property
    def use_agent_store(self) -> bool:
        """Whether ranks find each other through the store of an agent."""
        return self._inner.use_agent_store

    def next_rendezvous(self) -> RendezvousInfo:
        """Meet the other nodes.

        Raises:
            EndedElsewhereError: the job needs no further node, or not enough of them came in time.
        """
        wait_s = self._inner.settings.timeout.join.total_seconds()
        try:
            with self._patience.of(wait_s + ANSWER_S):
                info = self._inner.next_rendezvous()
        except (RendezvousClosedError, RendezvousGracefulExitError):
            raise EndedElsewhereError("the job has ended, and was run by other nodes") from None
        except RendezvousTimeoutError:
            raise EndedElsewhereError(f"fewer than {self._nodes} nodes came within {wait_s:.0f} s") from None
        self._store = info.store
        if self._host:
            info.store.set("host", str(info.rank))
        first = int(info.store.get("host"))
        rank = 0 if info.rank == first else info.rank + (info.rank < first)
        assert info.bootstrap_store_info is not None
        return RendezvousInfo(info.store, rank, info.world_size, info.bootstrap_store_info)

    def num_nodes_waiting(self) -> int:
        """Return 0: no node is taken in under way. The agent asks this between two looks at its ranks.

        Raises:
            EndedElsewhereError: the job ended on another node, or a node is gone.
        """
        try:
            with self._patience.of(ANSWER_S):
                closed = self.is_closed()
        except RendezvousConnectionError:
            raise EndedElsewhereError("the node that started the job is gone, or has ended it") from None
        if closed:
            raise EndedElsewhereError("the job has ended on another node")
        if self._present() < self._nodes:
            raise EndedElsewhereError("a node gave no sign of life any more")
        return 0

    def _present(self) -> int:
        """Return how many nodes are in the rendezvous; one leaves it after 15 s without a sign of life."""
        return len(self._inner._state_holder.state.participants)  # pyright: ignore[reportPrivateUsage] - there is no public way to see it

    def is_closed(self) -> bool:
        """Return whether the job has ended somewhere."""
        return self._inner.is_closed()

    def set_closed(self) -> None:
        """Tell all that the job has ended."""
        self._inner.set_closed()

    def get_run_id(self) -> str:
        """Return the job's id."""
        return self._inner.get_run_id()

    def shutdown(self) -> bool:
        """Tell all that the job has ended, and leave: the host last, if the others are there."""
        with self._patience.of(ANSWER_S + LEAVE_S):
            return self._leave()

    def _leave(self) -> bool:
        closed = self._inner.shutdown()
        if self._store is not None:
            with suppress(RuntimeError):  # the host is gone already
                left, deadline = self._store.add("left", 1), time.monotonic() + LEAVE_S
                while self._host and left < self._nodes and time.monotonic() < deadline:
                    time.sleep(0.1)
                    left = self._store.add("left", 0)
        return closed


_made: list[Rendezvous] = []


def close_all() -> None:
    """Tell the other nodes that this process is told to stop; torchrun's agent does not, and they would only wait."""
    for rendezvous in _made:
        with suppress(RendezvousError):
            rendezvous.set_closed()


def _make(parameters: RendezvousParameters) -> Rendezvous:
    try:
        backend, store = create_backend(parameters)
    except RendezvousError as error:
        role = "host the rendezvous at" if parameters.get_as_bool("is_host") else "reach the rendezvous at"
        raise EndedElsewhereError(f"cannot {role} {parameters.endpoint}: {error.__cause__ or error}") from None
    _made.append(Rendezvous(create_handler(store, backend, parameters), host=bool(parameters.get_as_bool("is_host"))))
    return _made[-1]


rendezvous_handler_registry.register(BACKEND, _make)
