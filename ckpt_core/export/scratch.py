"""The directory of a conversion or an import under way, beside its target: locked, cleared, removed."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from ckpt_core import durable
from ckpt_core.errors import CommitError
from ckpt_core.export.target import recover_replaced
from ckpt_core.locks import EXCLUSIVE_NOW, SHARED, lock_file

PLAN_NAME = "plan.json"


@contextmanager
def held(directory: Path, target: Path) -> Generator[None]:
    """Make the directory, keep other processes from it, and recover `target` if its replacement was stopped.

    Raises:
        CommitError: another process has it.
    """
    durable.make_directory(directory)
    with lock_file(_lock_of(directory), EXCLUSIVE_NOW) as lock:
        if lock is None:
            raise CommitError(f"{directory}: another process is converting to the same place; wait for its end.")
        durable.make_directory(directory)  # again, where another one removed it before it was locked
        recover_replaced(target)
        yield


@contextmanager
def shared(directory: Path) -> Generator[None]:
    """Keep the conversion from being given up while a file of it is written.

    Raises:
        CommitError: it was given up.
    """
    lock = _lock_of(directory)
    if directory.is_dir():
        with lock_file(lock, SHARED):
            if directory.is_dir():
                yield
                return
            lock.unlink(missing_ok=True)
    raise CommitError(f"{directory}: gone; the conversion was finished or given up. Begin again.")


def _lock_of(directory: Path) -> Path:
    return directory.with_name(f"{directory.name}.lock")


def clear(directory: Path) -> None:
    """Delete all that the directory holds, its plan first."""
    for entry in sorted(directory.iterdir(), key=lambda path: path.name != PLAN_NAME):
        if entry.is_dir() and not entry.is_symlink():
            durable.remove_tree(entry)
        else:
            entry.unlink(missing_ok=True)


def remove(directory: Path) -> None:
    """Delete the directory."""
    clear(directory)
    with suppress(OSError):  # somebody else begins anew
        directory.rmdir()
