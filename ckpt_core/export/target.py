"""Where an export or import is written to: whether it may be, and what a full disk there means."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ckpt_core import durable
from ckpt_core.errors import ArgumentError, ExportError, ExportExistsError, StepExistsError, describe
from ckpt_core.format.manifest import MANIFEST_NAME
from ckpt_core.printable import printable_logger

if TYPE_CHECKING:
    from upath import UPath

    from ckpt_core.urls import Place

_log = printable_logger(__name__)
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


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
    names = objects.sizes_below(target).keys() - (begun.files if begun and not begun.apart else ())
    return bool(names) or objects.exists(target)


def give_name(made: Path, target: Path, *, overwrite: bool) -> None:
    """Flush a directory that was made, and give it the name `target`; with `overwrite` it may replace what is there.

    What is replaced ends at `made`, or is deleted. Until the new directory has the name, the old content is kept.

    Raises:
        ExportExistsError (a FileExistsError): the name is taken.
    """
    durable.sync_tree(made)
    if overwrite and os.path.lexists(target):
        with suppress(FileNotFoundError):  # another process deleted the target in this moment
            if not durable.exchange(made, target):
                _replace_by_two_renames(made, target)
            return
    try:
        durable.rename_new(made, target)
    except StepExistsError:
        raise ExportExistsError(f"{target}: appeared while its content was being written; it was left alone.") from None


def recover_replaced(target: Path) -> None:
    """Finish or undo a replacement of `target` that was stopped between its two renames; the caller has the lock."""
    for entry in target.parent.iterdir():
        match = _KEPT_NAME.fullmatch(entry.name)
        if match is None or match["name"] != target.name:
            continue
        if not os.path.lexists(target):
            entry.rename(target)
            durable.sync_directory(target.parent)
        elif entry == _kept_path(target, target):
            _delete(entry)
        else:  # another process made something of that name in between: only a person knows which one is wanted
            _log.warning("%s: what %s was before it was to be replaced; delete it if nobody needs it.", entry, target)


def _replace_by_two_renames(made: Path, target: Path) -> None:
    """Replace `target` where names cannot be exchanged: the old content has another name until the new one is there."""
    kept = _kept_path(target, made)
    target.rename(kept)
    try:
        durable.rename_new(made, target)
    except StepExistsError:
        raise ExportExistsError(
            f"{target}: appeared while it was being replaced; it was left alone. What it was before is {kept}."
        ) from None
    except BaseException:
        if not os.path.lexists(target):
            kept.rename(target)
        raise
    _delete(kept)


_KEPT_NAME = re.compile(r"\.replaced-[0-9]+-[0-9]+-(?P<name>.+)", re.DOTALL)


def _kept_path(target: Path, new: Path) -> Path:
    """Return where the old content of `target` is while `new` takes its name.

    The inode of `new` in that name shows after a kill whether it did.
    """
    status = new.lstat()
    return target.with_name(f".replaced-{status.st_dev}-{status.st_ino}-{target.name}")


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        durable.remove_tree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def disk_errors(target: Place) -> Generator[None]:
    """Say what a target that is full, failed or may not be written to means; errors of other files stay as they are.

    An object store's errors say it themselves.

    Raises:
        ExportError: in place of the error of the system.
    """
    try:
        yield
    except OSError as error:
        if not isinstance(target, Path) or not _is_about(error, target):
            raise
        raise ExportError(f"{target}: could not be written, and nothing is left of it: {describe(error)}") from error


def _is_about(error: OSError, target: Path) -> bool:
    """Whether an error of the system is about a target, or what is made beside it, and not about what is read."""
    if error.errno is None or isinstance(error, FileNotFoundError | FileExistsError):
        return False
    if error.filename is None:  # of a copy by the kernel, which fails by lack of room at the target alone
        return error.errno in _FULL
    path, parent = os.fsdecode(str(error.filename)), target.parent
    own = (target, parent / f".converting-{target.name}", parent / f".importing-{target.name}")
    return any(Path(path).is_relative_to(each) for each in own)
