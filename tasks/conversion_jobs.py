"""What a conversion needs torch for: jobs of `tasks.jobs`, each in a child process of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckpt_core import open_checkpoint
from ckpt_core.errors import CkptError, CommitError, ExportExistsError
from ckpt_core.urls import place_of

if TYPE_CHECKING:
    from ckpt_core.export import Export
    from ckpt_core.urls import Place

Request = dict[str, Any]
_SETTINGS = ("dtype", "max_shard_bytes", "allow_nonfinite", "merge_adapter", "trust_remote_code")


def convert(request: Request) -> dict[str, Any]:
    """Convert a committed step whose lease the caller holds, or find the export that was made of it before.

    With several files to write it only begins: they are for `ckpt_core.export.convert_shard`, in any processes, and
    then `finish_conversion`.

    Args:
        request: `url`, `target` (a path or URL), `dtype` or null, `max_shard_bytes`, `allow_nonfinite`,
            `merge_adapter`, `trust_remote_code`.

    Returns:
        `target`; `undone`, the names of the files to write; `export`, what `finish_conversion` returns, or null; and
        whether it was `reused`, as it was made before.

    Raises:
        ExportExistsError: `target` holds something else than an export of this checkpoint.
    """
    from ckpt_core.export import abandon_conversion, begin_conversion, convert_shard
    from ckpt_core.export.conversion import model_of, own_assets, source_of

    checkpoint, target = open_checkpoint(request["url"]), place_of(request["target"])
    settings, begun = _settings(request), {"target": str(target), "undone": [], "export": None, "reused": False}
    _check_replaceable(target, checkpoint.manifest.digest())
    export = _made_of(target, checkpoint.manifest.digest(), settings)
    if export is not None:
        return {**begun, "export": _described(export), "reused": True}
    assets = own_assets(checkpoint, trust_remote_code=settings.pop("trust_remote_code"))
    source = source_of(checkpoint)
    undone = begin_conversion(model_of(checkpoint), target, assets=assets, source=source, overwrite=True, **settings)
    if len(undone) > 1:
        return {**begun, "undone": undone}
    try:
        for name in undone:
            convert_shard(target, name)
    except CommitError:  # another conversion took over, and what lies there is its own
        raise
    except CkptError:
        abandon_conversion(target)
        raise
    return {**begun, "export": finish_conversion(request)}


def finish_conversion(request: Request) -> dict[str, Any]:
    """Make an export of a conversion that `convert` began, and whose files are written.

    Args:
        request: that of `convert`.

    Returns:
        `path`, `files` (bytes and sha256 of each), `rules` and `architecture`.

    Raises:
        ExportExistsError: `target` holds something else than an export of this checkpoint.
    """
    from ckpt_core import export

    target = place_of(request["target"])
    _check_replaceable(target, open_checkpoint(request["url"]).manifest.digest())
    made = export.finish_conversion(target, overwrite=True)
    _settings_file(target).write_bytes(json.dumps(_settings(request)).encode())
    return _described(made)


def check_export(request: Request) -> dict[str, Any]:
    """Load an export as a user would, and compare it with the checkpoint that it was made of.

    Args:
        request: `url` of the checkpoint; `export`, a path or URL.

    Returns:
        `checks` (see `ckpt_core.verify.Check`).
    """
    from tasks.gate import compare_with_checkpoint

    return {"checks": [asdict(check) for check in compare_with_checkpoint(request["url"], place_of(request["export"]))]}


def _settings(request: Request) -> dict[str, Any]:
    """Return what of a request decides on an export's content, but for the checkpoint."""
    return {name: request[name] for name in _SETTINGS}


def _settings_file(target: Place) -> Place:
    return target.parent / f"{target.name}.settings.json"


def _described(export: Export) -> dict[str, Any]:
    return {
        "path": str(export.path),
        "files": export.files,
        "rules": export.rules,
        "architecture": export.architecture,
    }


def _check_replaceable(target: Place, digest: str) -> None:
    """Refuse a target that holds anything but an export of this checkpoint, whole or damaged."""
    from ckpt_core.export import EXPORT_NAME

    try:
        found = json.loads((target / EXPORT_NAME).read_bytes())["source"]["digest"]
    except FileNotFoundError:
        found = None
        if _is_free(target):
            return
    except (NotADirectoryError, IsADirectoryError, ValueError, LookupError, TypeError):
        found = None
    if found != digest:
        what = "something else than an export" if found is None else "the export of another checkpoint"
        raise ExportExistsError(f"{target}: holds {what}, and is left alone; give another directory, or delete it.")


def _is_free(target: Place) -> bool:
    """Whether there is nothing, or an empty directory, or, in an object store, what a stopped conversion left."""
    from ckpt_core.export import check_free

    try:
        check_free(target, overwrite=False)
    except ExportExistsError:
        return isinstance(target, Path) and target.is_dir() and not any(target.iterdir())
    return True


def _made_of(target: Place, digest: str, settings: Mapping[str, Any]) -> Export | None:
    """Return the export at `target` if it is whole and of this checkpoint with these settings, else None."""
    from ckpt_core.export import read_export

    try:
        export = read_export(target)
        made_with = json.loads(_settings_file(target).read_bytes())
    except (CkptError, OSError, ValueError):
        return None
    return export if export.source.get("digest") == digest and made_with == settings else None
