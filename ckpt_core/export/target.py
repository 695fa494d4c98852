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
    from ckpt_core.urls import Place

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}


def check_target(directory: Place, target: Path, *, overwrite: bool) -> None:
    """Check that an export of what is in `directory` may be written to `target`.

    Raises:
        ExportExistsError (a FileExistsError): it exists.
        ArgumentError: it lies in the source, around it, or in a committed step.
    """
    target = target.parent.resolve() / target.name
    check_free(target, overwrite=overwrite)
    directory = directory.resolve()
    if isinstance(directory, Path) and (target.is_relative_to(directory) or directory.is_relative_to(target)):
        raise ArgumentError(f"{target}: one of source and target lies in the other; give a directory apart.")
    for parent in target.parents:
        if (parent / MANIFEST_NAME).is_file():
            raise ArgumentError(
                f"{target}: lies in the committed step {parent.name}, which never changes; give a directory apart."
            )


def check_free(target: Path, *, overwrite: bool) -> None:
    """Check that nothing has the name `target`, or that it may be replaced.

    Raises:
        ExportExistsError (a FileExistsError): it exists.
    """
    if os.path.lexists(target) and not overwrite:
        raise ExportExistsError(f"{target}: exists; give another directory, or pass overwrite to replace it.")


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
def disk_errors(target: Path) -> Generator[None]:
    """Say what a full disk, or one that failed, means.

    Raises:
        ExportError: in place of the error of the system.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise ExportError(
            f"{target}: {os.strerror(error.errno)} while it was written; nothing is left of it. Make room, or give a "
            "directory on another disk."
        ) from error
