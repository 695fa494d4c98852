"""Every error that this library raises on purpose.

CkptError
├── CheckpointError            something is wrong with a checkpoint
│   ├── NotACheckpointError      no checkpoint there                (FileNotFoundError)
│   ├── StepExistsError          a committed step never changes     (FileExistsError)
│   ├── DamagedError             bytes, digests or structure        (ValueError)
│   ├── UntrustedError           reading it would run code          (ValueError)
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


class CkptError(Exception):
    """The root: catch this to catch all of them."""


class CheckpointError(CkptError):
    """Something is wrong with a checkpoint."""


class NotACheckpointError(CheckpointError, FileNotFoundError):
    """There is no checkpoint where one was expected."""


class StepExistsError(CheckpointError, FileExistsError):
    """A step that is committed already was about to be written again."""


class DamagedError(CheckpointError, ValueError):
    """Bytes, digests or structure are not what they must be."""


class UntrustedError(CheckpointError, ValueError):
    """Reading this would run code that the file brings along."""


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
