"""Every error that this library raises on purpose.

CkptError
├── CheckpointError            something is wrong with a checkpoint
│   ├── NotACheckpointError      no checkpoint there                (FileNotFoundError)
│   ├── StepExistsError          a committed step never changes     (FileExistsError)
│   ├── DamagedError             bytes, digests or structure        (ValueError)
│   ├── UntrustedError           reading it could run code          (ValueError)
│   ├── UnsupportedError         sound, but of a form not read here (ValueError)
│   ├── MismatchError            does not fit the model or config   (ValueError)
│   └── CommitError              not committed, or not surely       (RuntimeError)
├── ArgumentError              a caller's mistake                   (TypeError, ValueError)
├── ExportExistsError          an export's target is taken          (FileExistsError)
├── ExportError                an export could not be written       (OSError)
└── HubError                   a publication did not happen         (RuntimeError)
    ├── HubAuthError             no token, or one without the right
    ├── HubConflictError         somebody else moved the branch
    └── HubContentError          the Hub holds other bytes than were sent

Each message says where, what was found, what was expected and what to do; each error survives pickling.
"""

import errno
import os

from ckpt_core.printable import printable

_REMEDIES = {
    errno.ENOSPC: "make room there, or give a directory on another disk",
    errno.EDQUOT: "your quota there is used up: make room, or give a directory elsewhere",
    errno.EFBIG: "the file system or a limit of this process allows no larger file",
    errno.EROFS: "the file system is mounted read-only: give a directory elsewhere",
    errno.EACCES: "this user has no right to do that: ask the owner, or give a directory elsewhere",
    errno.EPERM: "this user has no right to do that: ask the owner, or give a directory elsewhere",
    errno.ENAMETOOLONG: "file systems take 255 bytes a name, and 4,096 a path: give a shorter one",
    errno.ELOOP: "its symbolic links lead to each other: remove one",
    errno.EIO: "the disk or the network file system failed: check it, and copy what can still be read",
    errno.ESTALE: "the network file system lost it: mount that again",
    errno.EMFILE: "this process has too many files open: raise `ulimit -n`",
}
"""What a user can do about an error of the system."""


class CkptError(Exception):
    """The root: catch this to catch all of them."""

    def __str__(self) -> str:
        """Return the message, in which names from a checkpoint cannot pass for anything else."""
        return printable(super().__str__())


class CheckpointError(CkptError):
    """Something is wrong with a checkpoint."""


class NotACheckpointError(CheckpointError, FileNotFoundError):
    """There is no checkpoint where one was expected."""


class StepExistsError(CheckpointError, FileExistsError):
    """A step that is committed already was about to be written again."""


class DamagedError(CheckpointError, ValueError):
    """Bytes, digests or structure are not what they must be."""


class UntrustedError(CheckpointError, ValueError):
    """Reading this could run code that the file names."""


class UnsupportedError(CheckpointError, ValueError):
    """Nothing is wrong with it, as far as can be known, but this library does not read what is stored in this form."""


class MismatchError(CheckpointError, ValueError):
    """The checkpoint and the model, optimizer or config do not fit each other."""


class CommitError(CheckpointError, RuntimeError):
    """A step was not committed, or its durability is not certain; the message says which."""


class ArgumentError(CkptError, TypeError, ValueError):
    """A caller's mistake, found before anything was read or written."""


class ExportExistsError(CkptError, FileExistsError):
    """The directory that an export was to be written to exists."""


class ExportError(CkptError, OSError):
    """An export could not be written: the disk is full, or failed."""


class HubError(CkptError, RuntimeError):
    """A publication did not happen, or was not confirmed."""


class HubAuthError(HubError):
    """The Hub did not accept the token, or there is none."""


class HubConflictError(HubError):
    """Somebody else changed the repository meanwhile."""


class HubContentError(HubError):
    """What the Hub serves is not what was sent."""


def describe(error: OSError) -> str:
    """Return a sentence for an error of the system: where, what, and what to do."""
    # Errors of network clients have numbers that are not the system's, or a text that names what was asked.
    if error.errno is None or error.errno not in errno.errorcode or type(error).__str__ is not OSError.__str__:
        return str(error) or type(error).__name__
    where = "" if error.filename is None else f"{_text(error.filename)}: "
    remedy = _REMEDIES.get(error.errno)
    return f"{where}{os.strerror(error.errno)}{'; ' + remedy if remedy else ''}."


def _text(filename: object) -> str:
    return os.fsdecode(filename) if isinstance(filename, bytes) else str(filename)


def with_remedy(error: OSError, path: object) -> OSError:
    """Return an error of the same class that names a path, and what to do about it; one that does already as it is."""
    remedy = _REMEDIES.get(error.errno or 0)
    if remedy is None or (error.strerror or "").endswith(remedy):
        return error
    where = str(path) if error.filename is None else error.filename
    return OSError(error.errno, f"{os.strerror(error.errno or 0)}; {remedy}", where, None, error.filename2)
