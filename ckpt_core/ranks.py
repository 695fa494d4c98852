"""Ranks that act together: values and errors exchanged so that all of them succeed or all of them fail.

They are the ranks of the default process group, or of the group that `within` names. Without a process group there is
one rank, and nothing is exchanged.

Every exchange has one form, so a rank that fails between two exchanges meets the others in their next one, whichever
that is, and all of them raise. So any body of exchanges can be run by `together`.
"""

# torch.distributed's object collectives carry no type annotations.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false

from __future__ import annotations

import pickle
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple, TypeVar, cast

import torch.distributed as dist

from ckpt_core.errors import ArgumentError

T = TypeVar("T")
S = TypeVar("S")


class _Known(NamedTuple):
    """The errors of the exchanges inside the `each` that runs: every rank of its group raises them already."""

    group: dist.ProcessGroup | None
    errors: list[BaseException]


_group: ContextVar[dist.ProcessGroup | Literal["default"] | None] = ContextVar("group", default="default")
_known: ContextVar[_Known | None] = ContextVar("known", default=None)


@contextmanager
def within(group: dist.ProcessGroup | None) -> Generator[None]:
    """Let the ranks of `group` act together inside this, in this thread; None means this process alone.

    The group can be used after `destroy_process_group`, too: what began on it ends on it.
    """
    token = _group.set(group)
    try:
        yield
    finally:
        _group.reset(token)


def group() -> dist.ProcessGroup | None:
    """Return the group that acts; None for this process alone."""
    chosen = _group.get()
    if chosen != "default":
        return chosen
    # The group itself: tests of trainers patch `is_initialized` and make none, and nothing can be exchanged then.
    return dist.group.WORLD if dist.is_available() else None


def rank() -> int:
    """Return this process's rank in the group, 0 without one."""
    acting = group()
    return 0 if acting is None else acting.rank()


def world_size() -> int:
    """Return the number of ranks in the group, 1 without one."""
    acting = group()
    return 1 if acting is None else acting.size()


def gather(value: T) -> list[T]:
    """Collective: return every rank's value, in order of rank."""
    return each(lambda: value)


def each(function: Callable[[], T]) -> list[T]:
    """Collective: run `function` on every rank and return all results; if one rank fails, every rank raises.

    The error raised is the rank's own, or else that of the lowest rank that failed. An error that an exchange inside
    `function` raised on every rank is raised again without another exchange.
    """
    result: Any = None
    error: BaseException | None = None
    inside = _Known(group(), [])
    token = _known.set(inside)
    try:
        result = function()
    except BaseException as raised:  # noqa: BLE001 - carried to every rank, then raised: an interrupt too
        error = raised
    finally:
        _known.reset(token)
    if error is None or not _is_known(error, inside.errors):
        sent = error if error is None or group() is None else _portable(error)
        outcomes = _exchange((result, sent))
        if error is None:
            error = _first_error([failure for _, failure in outcomes])
        if error is None:
            return [cast("T", value) for value, _ in outcomes]
    outside = _known.get()
    if outside is not None and outside.group is inside.group:
        outside.errors.append(error)
    raise error


def together(function: Callable[[], T]) -> T:
    """Collective: run `function` on every rank and return its result there; if one rank fails, every rank raises."""
    kept: list[T] = []
    each(lambda: kept.append(function()))
    return kept[0]


def first(function: Callable[[], T]) -> T:
    """Collective: run `function` on rank 0 alone; every rank returns its result or raises its error."""
    return cast("T", each(lambda: function() if rank() == 0 else None)[0])


def spread(local: Callable[[], T], combine: Callable[[list[T]], Sequence[S]]) -> S:
    """Collective: have rank 0 make one result for each rank of what `local` returned on all; return this rank's.

    Both travel to and from rank 0 only.
    """
    gathered = _gather_on_first(together(local))
    made: list[Any] = []
    together(lambda: None if gathered is None else made.extend(combine(gathered)))
    acting = group()
    if acting is None:
        return made[0]
    received: list[Any] = [None]
    dist.scatter_object_list(received, made or None, group_src=0, group=acting)
    return cast("S", received[0])


def reduce(local: Callable[[], T], combine: Callable[[list[T]], S]) -> S:
    """Collective: have rank 0 make one result of what `local` returned on all ranks; every rank returns it."""
    gathered = _gather_on_first(together(local))
    return first(lambda: combine(cast("list[T]", gathered)))


def agree(facts: Mapping[str, object], action: str, error: type[Exception] = ArgumentError) -> None:
    """Collective: compare facts by their names; an error names the first one that is not equal on all ranks."""
    gathered = gather(dict(facts))
    for name in dict.fromkeys(name for rank_facts in gathered for name in rank_facts):
        values = [rank_facts.get(name) for rank_facts in gathered]
        for number, value in enumerate(values):
            if value != values[0]:
                raise error(
                    f"{action}: the ranks disagree on {name}: rank 0 has {_shown(values[0])}, rank {number} has "
                    f"{_shown(value)}; nothing was done. Call it on every rank with the same arguments."
                )


def _gather_on_first(value: T) -> list[T] | None:
    """Collective: return every rank's value on rank 0. An exchange that went well comes right before it."""
    acting = group()
    if acting is None:
        return [value]
    gathered: list[Any] | None = [None] * acting.size() if acting.rank() == 0 else None
    dist.gather_object(value, gathered, group_dst=0, group=acting)
    return gathered


def _shown(value: object) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 80 else f"{text[:80]}..."  # noqa: PLR2004 - as much as a line of a log shows


def _exchange(outcome: tuple[Any, BaseException | None]) -> list[tuple[Any, BaseException | None]]:
    acting = group()
    if acting is None:
        return [outcome]
    outcomes: list[Any] = [None] * acting.size()
    dist.all_gather_object(outcomes, outcome, group=acting)
    return outcomes


def _is_known(error: BaseException, known: list[BaseException]) -> bool:
    """Whether `error` is one of them, or was raised because of one of them."""
    cause: BaseException | None = error
    while cause is not None:
        if any(cause is one for one in known):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def _first_error(errors: Sequence[BaseException | None]) -> BaseException | None:
    """Return the error of the lowest rank that has one, with a note that names the rank."""
    for number, error in enumerate(errors):
        if error is not None:
            error.add_note(f"This happened on rank {number}.")
            return error
    return None


def _portable(error: BaseException) -> BaseException:
    """Return `error` as other processes can receive it: itself, or its text where it cannot be carried.

    Only its own rank is interrupted or exits: for the others an interrupt is an error like any other.
    """
    try:
        if isinstance(error, Exception):
            pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
            return error
    except Exception:  # noqa: BLE001, S110 - pickling runs the error's own code, which may raise anything
        pass
    return RuntimeError(f"{type(error).__name__}: {error}")
