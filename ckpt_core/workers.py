"""Threads that read: Python waits for none of them while bytes are copied, digested or on their way."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import TypeVar

T = TypeVar("T")

_SHARE_BYTES = 32 << 20
_REMOTE_WORKERS = 16
_MOST_WORKERS = 8
_M_ARENA_MAX = -8  # of glibc's malloc.h


def count_workers(*, remote: bool = False) -> int:
    """Return how many threads this process should read with: its share of the cores that its machine's ranks have.

    Elsewhere than on a local file system there are more, as each waits for answers most of its time.
    """
    if remote:
        return _REMOTE_WORKERS
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(_MOST_WORKERS, len(os.sched_getaffinity(0)) // ranks))


def share_heap() -> None:
    """Let all threads of this process allocate from one heap; with glibc each keeps some 10 MB in one of its own."""
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def run_all(calls: Sequence[Callable[[], T]], workers: int, *, name: str) -> list[T]:
    """Run calls, several at once, until one fails: its error is raised, and what was not begun is left.

    Args:
        calls: in the order of their results.
        workers: how many threads.
        name: what the threads are called.
    """
    with ThreadPoolExecutor(workers, thread_name_prefix=name) as pool:
        futures = [pool.submit(call) for call in calls]
        try:
            return [future.result() for future in futures]
        finally:
            pool.shutdown(cancel_futures=True)


def in_parallel(
    read: Callable[[Sequence[T]], None], items: Sequence[T], sizes: Sequence[int], *, remote: bool = False
) -> None:
    """Call `read` with shares of the items, neighbours in one thread, until one fails: its error is raised.

    Args:
        read: what to do with neighbours.
        items: in the order in which they lie in their files.
        sizes: of each, in bytes.
        remote: more threads, as each waits for answers most of its time.
    """
    share_bytes = min(_SHARE_BYTES, sum(sizes) // _REMOTE_WORKERS) if remote else _SHARE_BYTES
    shares = list(_shares(items, sizes, share_bytes))
    workers = min(len(shares), count_workers(remote=remote))
    if workers <= 1:
        read(items)
        return
    run_all([partial(read, share) for share in shares], workers, name="ckpt-read")


def _shares(items: Sequence[T], sizes: Sequence[int], share_bytes: int) -> Iterator[list[T]]:
    share: list[T] = []
    taken = 0
    for item, size in zip(items, sizes, strict=True):
        share.append(item)
        taken += size
        if taken >= share_bytes:
            yield share
            share, taken = [], 0
    if share:
        yield share
