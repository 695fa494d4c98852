"""What a sender that was killed leaves in an object store: uploads in parts that nobody completes."""

# fsspec is not annotated.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ckpt_core.store import objects

if TYPE_CHECKING:
    from upath import UPath

_log = logging.getLogger(__name__)


def abort_uploads(directory: UPath, names: Iterable[str]) -> None:
    """Abort unfinished uploads to files of a directory, in S3, which else keeps their parts, and charges for them.

    Other stores let such uploads expire. Where the account may not list or abort them a warning says so: they are no
    files, and take nothing from what was converted.
    """
    files: Any = directory.fs
    if not hasattr(files, "list_multipart_uploads"):
        return
    bucket, prefix, _ = files.split_path(directory.path.rstrip("/") + "/")
    keys = {f"{prefix}{name}" for name in names}
    try:
        with objects.plain_errors(directory):
            for upload in [each for each in _unfinished(files, bucket, prefix) if each["Key"] in keys]:
                with suppress(FileNotFoundError):  # somebody else aborts the same
                    files.abort_mpu(bucket, upload["Key"], upload["UploadId"])
    except OSError as error:
        _log.warning(
            "%s: unfinished uploads of a process that died may be left, and could not be aborted (%s); a lifecycle "
            "rule of the bucket can do that.",
            directory,
            error,
        )


def _unfinished(files: Any, bucket: str, prefix: str) -> Iterator[dict[str, str]]:
    marker: dict[str, str] = {}
    while True:
        page = files.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=prefix, **marker)
        yield from page.get("Uploads", [])
        if not page.get("IsTruncated"):
            return
        marker = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}
