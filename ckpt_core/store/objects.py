"""Objects below a URL, through fsspec: always read fresh, listed many at a time, and created only once."""

# fsspec is not annotated.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import time
import uuid
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, cast

from ckpt_core.errors import CkptError, CommitError, StepExistsError

if TYPE_CHECKING:
    from upath import UPath

_BATCH = 1000
_CONFLICT, _PRECONDITION_FAILED, _NOT_IMPLEMENTED = 409, 412, 501
_PASSING = {"InternalError", "ServiceUnavailable", "SlowDown"}
_CONDITIONAL = {"abfs", "abfss", "adl", "az", "gcs", "gs", "memory", "s3", "s3a"}
"""Protocols with a request that writes an object only if there is none. The plugins of others look first and write
then, so that of two writers at the same time both may succeed."""

_TRIES = 6
_FIRST_WAIT_S = 0.1


def names_in(directory: UPath) -> list[str]:
    """Return the names directly below a directory, sorted; none where there is no such directory."""
    try:
        paths = cast("list[str]", _call(directory, "ls", detail=False))
    except FileNotFoundError:
        return []
    base = directory.path.rstrip("/") + "/"
    names = {path.rstrip("/").removeprefix(base) for path in paths if path.rstrip("/").startswith(base)}
    return sorted(names - {""})


def sizes_below(directory: UPath) -> dict[str, int]:
    """Return the size in bytes of each object below a directory, by its path relative to it, from one listing."""
    return {name: int(entry["size"]) for name, entry in entries_below(directory).items()}


def entries_below(directory: UPath) -> dict[str, dict[str, Any]]:
    """Return what the store tells of each object below a directory, by its path relative to it, from one listing."""
    base = directory.path.rstrip("/") + "/"
    found = cast("dict[str, dict[str, Any]]", _call(directory, "find", detail=True))
    return {
        path.removeprefix(base): entry
        for path, entry in found.items()
        if path.startswith(base) and not path.endswith("/")  # a console's mark of an empty directory
    }


def exists(place: UPath) -> bool:
    """Whether there is an object; one that cannot be asked for is an OSError."""
    try:
        size(place)
    except FileNotFoundError:
        return False
    return True


def size(place: UPath) -> int:
    """Return an object's size in bytes.

    Raises:
        FileNotFoundError: there is none.
    """
    entry = cast("dict[str, Any]", _call(place, "info"))
    if entry["type"] != "file":
        raise FileNotFoundError(f"{place}: no object.")
    return int(entry["size"])


def read(place: UPath, size: int | None = None) -> bytes:
    """Return an object's bytes; of a known size with one request, where s3fs would ask for the size first."""
    known = {"start": 0, "end": size} if size else {}
    return bytes(_call(place, "cat_file", **known))


def write(place: UPath, data: bytes) -> None:
    """Give an object new bytes, whether or not it exists."""
    try:
        _call(place, "pipe_file", data)
    except OSError:
        if not _holds(place, data):  # else it was carried out, and the answer was lost
            raise


def copy(source: UPath, target: UPath) -> None:
    """Copy an object within the store; one that exists at the target is replaced."""
    _call(source, "cp_file", target.path)


def move(source: UPath, target: UPath) -> None:
    """Copy an object within the store, then delete the first."""
    copy(source, target)
    delete(source)


def delete(place: UPath) -> None:
    """Delete an object; one that is gone is fine."""
    with suppress(FileNotFoundError):
        _call(place, "rm_file")


def delete_all(directory: UPath, names: Iterable[str]) -> None:
    """Delete objects below a directory, many in a request; those that are gone are fine."""
    ordered = sorted(names)
    for batch in (ordered[i : i + _BATCH] for i in range(0, len(ordered), _BATCH)):
        try:
            _delete_many(directory, batch)
        except FileNotFoundError:  # somebody else deletes the same
            for name in batch:
                delete(directory / name)


def _delete_many(directory: UPath, names: list[str]) -> None:
    base = directory.path.rstrip("/")
    if set("*?[") & set("".join([base, *names])):  # fsspec would take them for patterns
        for name in names:
            delete(directory / name)
    else:
        files: Any = directory.fs
        paths = [f"{base}/{name}" for name in names]
        with plain_errors(directory):
            if hasattr(files, "call_s3"):
                _delete_many_of_s3(files, paths)
            else:
                files.rm(paths)


def _delete_many_of_s3(files: Any, paths: list[str]) -> None:
    """Delete objects with one request; s3fs's own `rm` does not look at the errors in its answer.

    Raises:
        OSError: some of them were not deleted.
    """
    parts = [files.split_path(path) for path in paths]
    wanted = {"Objects": [{"Key": key} for _, key, _ in parts], "Quiet": True}
    errors: list[dict[str, str]] = []
    for _ in range(_TRIES):
        answer = files.call_s3("delete_objects", Bucket=parts[0][0], Delete=wanted)
        errors = answer.get("Errors", [])
        if not errors:
            return
        wanted["Objects"] = [{"Key": error["Key"]} for error in errors]
        if not all(error.get("Code") in _PASSING for error in errors):
            break
        time.sleep(_FIRST_WAIT_S)
    first = errors[0]
    raise OSError(
        f"{parts[0][0]}/{first.get('Key')}: not deleted ({first.get('Code')}: {first.get('Message')}), nor were "
        f"{len(errors) - 1} other objects."
    )


def create(place: UPath, data: bytes) -> None:
    """Write an object that must not exist yet: of several writers at the same time, one succeeds.

    Raises:
        StepExistsError: it exists; nothing was changed.
        CommitError: whether it was written is not known; or others' attempts kept it from being written; or the store
            writes over what exists.
    """
    if not is_conditional(place.parent):
        raise CommitError(
            f"{place}: not written; this store ignores the condition that nothing exists there (If-None-Match), so two "
            "writers could overwrite each other. Use a store that heeds it."
        )
    for number in range(_TRIES):
        try:
            _call(place, "pipe_file", data, mode="create")
        except OSError as error:
            status = _http_status(error)
            if isinstance(error, FileExistsError) or status == _PRECONDITION_FAILED:
                if _holds(place, data):  # an attempt of ours, whose answer was lost
                    return
                raise StepExistsError(
                    f"{place}: exists; a committed step never changes. Save under another step or run."
                ) from None
            if status != _CONFLICT:
                if _holds(place, data):
                    return
                raise CommitError(
                    f"{place}: whether it was written is not known ({error}). Save the same step again: if it was, "
                    "that is a StepExistsError."
                ) from error
        else:
            return
        time.sleep(_FIRST_WAIT_S * 2**number)
    raise CommitError(f"{place}: not written, the store told of conflicting writes {_TRIES} times; save again.")


def create_alone(place: UPath, data: bytes) -> None:
    """Write an object that must not exist yet; the caller keeps all others from writing it meanwhile.

    Raises:
        StepExistsError: it exists; nothing was changed.
        CommitError: whether it was written is not known.
    """
    if exists(place):
        if _holds(place, data):
            return
        raise StepExistsError(f"{place}: exists; a committed step never changes. Save under another step or run.")
    try:
        write(place, data)
    except OSError as error:
        raise CommitError(
            f"{place}: whether it was written is not known ({error}). Save the same step again."
        ) from error


def is_conditional(directory: UPath) -> bool:
    """Whether the store refuses to create an object that exists: tried once for each bucket, with a new object.

    Some that speak S3 ignore the condition (`If-None-Match: *`) and overwrite.
    """
    files: Any = directory.fs
    if directory.protocol not in _CONDITIONAL:
        return False
    found: dict[str, bool] = vars(files).setdefault("_ckpt_conditional", {})
    bucket = directory.path.strip("/").partition("/")[0]
    if bucket not in found:
        found[bucket] = _try_condition(directory / f".probe-{uuid.uuid4().hex}")
    return found[bucket]


def _try_condition(probe: UPath) -> bool:
    try:
        for _ in range(2):
            _call(probe, "pipe_file", b"probe", mode="create")
    except OSError as error:
        if isinstance(error, FileExistsError) or _http_status(error) == _PRECONDITION_FAILED:
            return True
        if _http_status(error) == _NOT_IMPLEMENTED:
            return False
        raise
    finally:
        with suppress(OSError):
            delete(probe)
    return False


def _holds(place: UPath, data: bytes) -> bool:
    try:
        return read(place) == data
    except OSError:
        return False


def _http_status(error: OSError) -> int | None:
    """Return the status that an object store answered with, where fsspec's error tells."""
    response = getattr(error.__cause__, "response", None)
    if isinstance(response, dict):
        metadata = cast("dict[str, dict[str, Any]]", response).get("ResponseMetadata", {})
        return metadata.get("HTTPStatusCode")
    return None


def _call(place: UPath, method: str, *arguments: Any, **options: Any) -> Any:
    """Call fsspec about a place, without what it remembers of it."""
    files: Any = place.fs
    files.invalidate_cache()
    with plain_errors(place):
        return getattr(files, method)(place.path, *arguments, **options)


@contextmanager
def plain_errors(place: UPath) -> Generator[None]:
    """Make an OSError, like all the rest, of what fsspec's plugins raise of their own where a network fails."""
    try:
        yield
    except (OSError, CkptError):
        raise
    except Exception as error:
        raise OSError(f"{place}: {type(error).__name__}: {error}") from error
