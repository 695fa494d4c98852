"""Where an export or import is written to: whether it may be, and what a full disk there means."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ckpt_core import durable
from ckpt_core.errors import ArgumentError, ExportError, ExportExistsError, StepExistsError
from ckpt_core.format.manifest import MANIFEST_NAME

if TYPE_CHECKING:
    from upath import UPath

    from ckpt_core.urls import Place

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}


def check_target(directory: Place, target: Place, *, overwrite: bool) -> None:
    """Check that an export of what is in `directory` may be written to `target`.

    Raises:
        ExportExistsError (a FileExistsError): it exists.
        ArgumentError: it lies in the source, around it, or in a committed step, or has no name.
    """
    if not target.name:
        raise ArgumentError(f"{target}: has no name; give a directory below it.")
    if isinstance(target, Path):
        target = target.parent.resolve() / target.name
    check_free(target, overwrite=overwrite)
    directory = directory.resolve()
    if _lies_in(target, directory) or _lies_in(directory, target):
        raise ArgumentError(f"{target}: one of source and target lies in the other; give a directory apart.")
    for parent in target.parents:
        if durable.file_size(parent / MANIFEST_NAME) is not None:
            raise ArgumentError(
                f"{target}: lies in the committed step {parent.name}, which never changes; give a directory apart."
            )


def check_free(target: Place, *, overwrite: bool) -> None:
    """Check that nothing has the name `target`, or that it may be replaced.

    In an object store, what a conversion that was stopped has put there does not count.

    Raises:
        ExportExistsError (a FileExistsError): it exists.
    """
    if not overwrite and (os.path.lexists(target) if isinstance(target, Path) else _holds_anything(target)):
        raise ExportExistsError(f"{target}: exists; give another directory, or pass overwrite to replace it.")


def _lies_in(inner: Place, outer: Place) -> bool:
    if isinstance(inner, Path) or isinstance(outer, Path):
        return isinstance(inner, Path) and isinstance(outer, Path) and inner.is_relative_to(outer)
    return inner.fs == outer.fs and f"{inner.path.rstrip('/')}/".startswith(f"{outer.path.rstrip('/')}/")


def _holds_anything(target: UPath) -> bool:
    """Whether there are objects that no conversion under way has put there."""
    from ckpt_core.export.begun import read_begun
    from ckpt_core.store import objects

    begun = read_begun(target)
    names = objects.sizes_below(target).keys() - (begun.files if begun else ())
    return bool(names) or objects.exists(target)


def give_name(made: Path, target: Path, aside: Path, *, overwrite: bool) -> None:
    """Flush a directory that was made, and give it the name `target`; what is to be replaced is put into `aside`.

    Raises:
        ExportExistsError (a FileExistsError): the name is taken.
    """
    durable.sync_tree(made)
    if overwrite:
        with suppress(FileNotFoundError):
            target.rename(aside / f"replaced-{uuid.uuid4().hex}")
    try:
        durable.rename_new(made, target)
    except StepExistsError:
        raise ExportExistsError(f"{target}: appeared while its content was being written; it was left alone.") from None


@contextmanager
def disk_errors(target: Place) -> Generator[None]:
    """Say what a full disk, or one that failed, means; an object store's errors say it themselves.

    Raises:
        ExportError: in place of the error of the system.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL or not isinstance(target, Path):
            raise
        raise ExportError(
            f"{target}: {os.strerror(error.errno)} while it was written; nothing is left of it. Make room, or give a "
            "directory on another disk."
        ) from error
