"""DCP to Hugging Face safetensors: planned from metadata, streamed, complete or not there.

`export.json`, written last, names the source and the bytes and sha256 of each file. It has no times and no paths, so
that equal input gives equal bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ckpt_core import durable
from ckpt_core.errors import ArgumentError, DamagedError, ExportExistsError, NotACheckpointError, StepExistsError
from ckpt_core.export.architecture import find_architecture
from ckpt_core.export.assets import CONFIG_NAME, EXPORT_NAME, Assets, read_assets
from ckpt_core.export.plan import Plan, make_plan
from ckpt_core.format.digests import digest_bytes
from ckpt_core.format.index import METADATA_NAME, read_index
from ckpt_core.format.manifest import MANIFEST_NAME, record_file
from ckpt_core.placement import placed
from ckpt_core.store import Checkpoint
from ckpt_core.urls import local_path

if TYPE_CHECKING:
    from ckpt_core.urls import Place

__all__ = [
    "EXPORT_NAME",
    "Assets",
    "Export",
    "check_free",
    "check_target",
    "convert",
    "convert_checkpoint",
    "plan_export",
    "read_export",
]

FORMAT_VERSION = 1
DEFAULT_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class Export:
    """A Hugging Face directory that `convert` wrote, and what its `export.json` says."""

    path: Place
    source: Mapping[str, Any]
    files: Mapping[str, Mapping[str, Any]]
    rules: tuple[str, ...]
    architecture: str

    @property
    def nbytes(self) -> int:
        """Size of all files in bytes, `export.json` aside."""
        return sum(record["bytes"] for record in self.files.values())


def convert_checkpoint(
    checkpoint: Checkpoint,
    target: Path,
    *,
    dtype: str | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    trust_remote_code: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Export:
    """Convert a committed step, whose assets give config and tokenizer; see `convert`."""
    model, assets = checkpoint.component("model"), checkpoint.component("assets")
    if model is None or assets is None:
        lacking = "model" if model is None else "assets (config and tokenizer)"
        raise NotACheckpointError(f"{checkpoint.path}: has no {lacking}, so there is nothing to convert.")
    manifest = checkpoint.manifest
    with checkpoint.lease():
        return convert(
            model,
            target,
            assets=read_assets(assets, trust_remote_code=trust_remote_code),
            dtype=dtype,
            max_shard_bytes=max_shard_bytes,
            overwrite=overwrite,
            allow_nonfinite=allow_nonfinite,
            source={"run": manifest.run, "step": manifest.step, "digest": manifest.digest()},
            progress=progress,
        )


def convert(
    directory: Place,
    target: Path,
    *,
    assets: Assets,
    dtype: str | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    source: Mapping[str, Any] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Export:
    """Write the model in the DCP directory as a Hugging Face directory of safetensors, streamed.

    Args:
        directory: the DCP directory.
        target: the directory to make; it appears whole or not at all.
        assets: config and tokenizer.
        dtype: cast floating-point tensors to this (`bfloat16`, say); None keeps them bit for bit.
        max_shard_bytes: largest size of one file's tensors.
        overwrite: replace `target` if it exists.
        allow_nonfinite: accept NaN and Inf.
        source: what `export.json` says of the source; by default the digest of the DCP metadata.
        progress: is told of bytes as they are written.

    Raises:
        ExportExistsError (a FileExistsError): `target` exists.
        CheckpointError: the checkpoint is damaged, hostile, or does not fit the config; nothing is left at `target`.
    """
    directory, target = directory.absolute(), local_path(target)
    check_target(directory, target, overwrite=overwrite)
    plan = plan_export(directory, assets, dtype=dtype, max_shard_bytes=max_shard_bytes)
    said = source or {"digest": digest_bytes((directory / METADATA_NAME).read_bytes())}
    try:
        with placed(target, overwrite=overwrite) as staging:
            _fill(staging, plan, directory, assets, dtype, said, progress, allow_nonfinite=allow_nonfinite)
    except StepExistsError:
        raise ExportExistsError(f"{target}: appeared while its content was being written; it was left alone.") from None
    return read_export(target)


def plan_export(
    directory: Place, assets: Assets, *, dtype: str | None = None, max_shard_bytes: int = DEFAULT_SHARD_BYTES
) -> Plan:
    """Return what `convert` would write; reads metadata alone.

    Raises:
        CheckpointError: the checkpoint is damaged, hostile, or does not fit the config.
    """
    index = read_index(directory)
    architecture = find_architecture(assets.config, index)
    return make_plan(index, architecture, dtype=dtype, max_shard_bytes=max_shard_bytes, where=str(directory))


def read_export(path: Place) -> Export:
    """Read what `export.json` says, and check that the files are there in the sizes that it says.

    Raises:
        NotACheckpointError: there is no `export.json`.
        DamagedError: it is not readable, or a file is missing or has another size.
    """
    record = path / EXPORT_NAME
    if not record.is_file():
        raise NotACheckpointError(
            f"{path}: no {EXPORT_NAME}, so not an export of ckptflow; make one with `ckpt convert`."
        )
    try:
        document = cast("dict[str, Any]", json.loads(record.read_bytes()))
        if document["format_version"] != FORMAT_VERSION:
            raise DamagedError(f"{record}: format_version {document['format_version']!r}; update ckptflow.")
        export = Export(path, document["source"], document["files"], tuple(document["rules"]), document["architecture"])
        sizes = {name: int(entry["bytes"]) for name, entry in export.files.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, DamagedError):
            raise
        raise DamagedError(f"{record}: not an export's record ({error}); convert again.") from None
    for name, size in sizes.items():
        file = path / name
        if Path(name).name != name or not file.is_file() or file.stat().st_size != size:
            raise DamagedError(f"{file}: missing or not of {size} bytes, as {EXPORT_NAME} says; convert again.")
    return export


def sha256_of(path: Place) -> str:
    """Return the sha256 of a file, in hexadecimal."""
    return record_file(path, "sha256").digest.removeprefix("sha256:")


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


def _fill(
    staging: Path,
    plan: Plan,
    directory: Place,
    assets: Assets,
    dtype: str | None,
    source: Mapping[str, Any],
    progress: Callable[[int], None] | None,
    *,
    allow_nonfinite: bool,
) -> None:
    from ckpt_core.export.write import write_file, write_weights

    ignore: Callable[[int], None] = lambda _: None  # noqa: E731 - a default of its own name says less
    records = write_weights(plan, directory, staging, allow_nonfinite=allow_nonfinite, progress=progress or ignore)
    records[CONFIG_NAME] = write_file(staging / CONFIG_NAME, _config_bytes(assets, plan, dtype))
    for name, data in assets.files.items():
        records[name] = write_file(staging / name, data)
    document = {
        "format_version": FORMAT_VERSION,
        "architecture": plan.architecture,
        "source": dict(source),
        "files": dict(sorted(records.items())),
        "rules": plan.rules,
        "libraries": {name: version(name) for name in ("ckptflow", "safetensors", "torch", "transformers")},
    }
    write_file(staging / EXPORT_NAME, (json.dumps(document, indent=1) + "\n").encode())
    durable.sync_tree(staging)


def _config_bytes(assets: Assets, plan: Plan, dtype: str | None) -> bytes:
    floating = [o.dtype for o in plan.outputs if "float" in o.dtype]
    commonest = max(set(floating), key=floating.count) if floating else None
    kept = {name: value for name, value in assets.config.items() if name != "torch_dtype"}  # the old name of dtype
    config = {**kept, "architectures": [plan.architecture], "dtype": dtype or commonest}
    return (json.dumps(dict(sorted(config.items())), indent=2) + "\n").encode()
