"""The ranks that act together: values and errors exchanged so that all of them succeed or all of them fail.

They are those of the default process group, or of another one `within` which they act. Without a process group there
is one rank, and nothing is exchanged.
"""

# torch.distributed's object collectives carry no type annotations.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import pickle
from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar, cast

import torch.distributed as dist

T = TypeVar("T")
_group: ContextVar[dist.ProcessGroup | None] = ContextVar("group", default=None)


@contextmanager
def within(group: dist.ProcessGroup | None) -> Generator[None]:
    """Let the ranks of `group` act together inside this, in this thread; None is the default group."""
    token = _group.set(group)
    try:
        yield
    finally:
        _group.reset(token)


def group() -> dist.ProcessGroup | None:
    """Return the group that acts, None for the default one."""
    return _group.get()


def rank() -> int:
    """Return this process's rank in the group, 0 without one."""
    return dist.get_rank(group()) if initialized() else 0


def world_size() -> int:
    """Return the number of ranks in the group, 1 without one."""
    return dist.get_world_size(group()) if initialized() else 1


def initialized() -> bool:
    """Whether there is a default process group."""
    # The group itself: tests of trainers patch `is_initialized` and make none, and nothing can be exchanged then.
    return dist.is_available() and dist.GroupMember.WORLD is not None


def gather(value: T) -> list[T]:
    """Collective: return every rank's value, in order of rank."""
    if not initialized():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=group())
    return cast("list[T]", values)


def each(function: Callable[[], T]) -> list[T]:
    """Collective: run `function` on every rank and return all results; if one rank fails, every rank raises.

    The error raised is the rank's own, or else that of the lowest rank that failed.
    """
    try:
        outcome: tuple[T | None, Exception | None] = (function(), None)
    except Exception as error:  # noqa: BLE001 - carried to every rank, then raised
        outcome = (None, _portable(error) if initialized() else error)
    outcomes = gather(outcome)
    failure = next((error for _, error in (outcome, *outcomes) if error is not None), None)
    if failure is not None:
        raise failure
    return [cast("T", result) for result, _ in outcomes]


def together(function: Callable[[], T]) -> T:
    """Collective: run `function` on every rank and return its result there; if one rank fails, every rank raises."""
    kept: list[T] = []
    each(lambda: kept.append(function()))
    return kept[0]


def first(function: Callable[[], T]) -> T:
    """Collective: run `function` on rank 0 alone; every rank returns its result or raises its error."""
    return cast("T", each(lambda: function() if rank() == 0 else None)[0])


def _portable(error: Exception) -> Exception:
    """Return `error` as other processes can receive it: itself, or its text where it cannot be pickled."""
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
    except Exception:  # noqa: BLE001 - pickling runs the error's own code, which may raise anything
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
