"""DCP to Hugging Face safetensors: planned from metadata, streamed, complete or not there.

`export.json`, written last, names the source and the bytes and sha256 of each file. It has no times and no paths, so
that equal input gives equal bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckpt_core import durable
from ckpt_core.errors import ArgumentError, ExportExistsError, NotACheckpointError, StepExistsError
from ckpt_core.export.architecture import find_architecture
from ckpt_core.export.assets import CONFIG_NAME, EXPORT_NAME, Assets, read_assets
from ckpt_core.export.plan import Plan, make_plan
from ckpt_core.export.record import FORMAT_VERSION, Export, read_export
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

DEFAULT_SHARD_BYTES = 5_000_000_000


def convert_checkpoint(
    checkpoint: Checkpoint,
    target: Path,
    *,
    assets: Assets | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    trust_remote_code: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Export:
    """Convert a committed step, whose own assets give config and tokenizer unless `assets` does; see `convert`."""
    model = checkpoint.component("model")
    if model is None:
        raise NotACheckpointError(f"{checkpoint.path}: has no model, so there is nothing to convert.")
    manifest = checkpoint.manifest
    with checkpoint.lease():
        return convert(
            model,
            target,
            assets=assets or _own_assets(checkpoint, trust_remote_code=trust_remote_code),
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


def _own_assets(checkpoint: Checkpoint, *, trust_remote_code: bool) -> Assets:
    own = checkpoint.component("assets")
    if own is None:
        raise NotACheckpointError(f"{checkpoint.path}: has no assets (config and tokenizer); name a config.")
    return read_assets(own, trust_remote_code=trust_remote_code)


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
