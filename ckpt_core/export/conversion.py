"""A conversion from its first look at the checkpoint to an export that is there: in one process, or in many."""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from ckpt_core.durable import file_size
from ckpt_core.errors import CkptError, NotACheckpointError
from ckpt_core.export.adapter_config import (
    ADAPTER_CONFIG_NAME,
    adapter_assets,
    adapter_files,
    find_adapter_config,
)
from ckpt_core.export.adapter_plan import ADAPTER_WEIGHTS_NAME
from ckpt_core.export.assets import Assets, config_bytes, read_assets
from ckpt_core.export.carried import CONFIG_NAME, EXPORT_NAME
from ckpt_core.export.local_work import LocalWork
from ckpt_core.export.names import Table
from ckpt_core.export.plan import Plan
from ckpt_core.export.planning import DEFAULT_SHARD_BYTES, plan_export
from ckpt_core.export.record import FORMAT_VERSION, Export, read_export
from ckpt_core.export.shard import shard_bytes, shards_of
from ckpt_core.export.stored import DcpStored
from ckpt_core.export.target import check_free, check_target, disk_errors
from ckpt_core.export.weight_conversions import RECORD_NAME
from ckpt_core.export.work import Progress, Work, plan_document
from ckpt_core.export.write import INDEX_NAME, Care, check_ties, index_bytes
from ckpt_core.format.index import metadata_digest
from ckpt_core.store import Checkpoint
from ckpt_core.urls import place_of, writable_place
from ckpt_core.workers import count_workers

if TYPE_CHECKING:
    from ckpt_core.urls import Place


def convert_checkpoint(
    checkpoint: Checkpoint,
    target: Place,
    *,
    assets: Assets | None = None,
    trust_remote_code: bool = False,
    **settings: Unpack[Settings],
) -> Export:
    """Convert a committed step, whose own assets give config and tokenizer unless `assets` does; see `convert`."""
    with checkpoint.lease():
        model, settings["source"] = model_of(checkpoint), source_of(checkpoint)
        assets = assets or own_assets(checkpoint, trust_remote_code=trust_remote_code)
        return convert(model, target, assets=assets, **settings)


def convert(directory: Place, target: Place, *, assets: Assets, **settings: Unpack[Settings]) -> Export:
    """Write the model in the DCP directory as a Hugging Face directory of safetensors, streamed.

    A conversion that was killed goes on where it was when the same one is begun again.

    Args:
        directory: the DCP directory.
        target: the directory to make, local or a URL's; it appears whole or not at all. In an object store files
            appear one by one, each whole, and `export.json` last: nothing is an export without it.
        assets: config and tokenizer.
        settings: see `Settings`.

    Raises:
        ExportExistsError (a FileExistsError): `target` exists.
        CheckpointError: the checkpoint is damaged, hostile, or does not fit the config; nothing is left at `target`.
        ExportError (an OSError): the disk is full, or failed.
    """
    work, directory = work_on(target), place_of(directory, "directory")
    from_afar = isinstance(work.target, Path) and not isinstance(directory, Path)  # what is sent is buffered in parts
    workers = settings.get("workers") or count_workers(remote=from_afar)
    check_target(directory, work.target, overwrite=settings.get("overwrite", False))
    with disk_errors(work.target), work.held(), _given_up(work), disk_errors(work.target):
        _begin(work, directory, assets, settings)
        work.write_all(workers, settings.get("progress"))
        _finish(work, overwrite=settings.get("overwrite", False))
    return read_export(work.target)


class Settings(TypedDict, total=False):
    """How to convert.

    Attributes:
        dtype: cast floating-point tensors to this (`bfloat16`, say); None keeps them bit for bit.
        max_shard_bytes: largest size of one file's tensors.
        overwrite: replace the target if it exists.
        allow_nonfinite: accept NaN and Inf.
        digest: False leaves out all that looks at every byte: CRC32, sha256, NaN and Inf, statistics.
        table: what is to be known of the checkpoint's names.
        merge_adapter: add a LoRA adapter to the weights, instead of exporting it as an adapter.
        source: what `export.json` says of the source; by default the digest of the DCP metadata.
        workers: how many files are written at once.
        progress: is told the bytes written so far, and those to write.
    """

    dtype: str | None
    max_shard_bytes: int
    overwrite: bool
    allow_nonfinite: bool
    digest: bool
    table: Table
    merge_adapter: bool
    source: Mapping[str, Any]
    workers: int | None
    progress: Progress | None


def work_on(target: Place) -> Work:
    """Return the conversion to a directory, local or a URL's, begun or not."""
    place = writable_place(target, "target")
    if isinstance(place, Path):
        return LocalWork(place)
    from ckpt_core.export.remote_work import RemoteWork

    return RemoteWork(place)


def begin_conversion(directory: Place, target: Place, *, assets: Assets, **settings: Unpack[Settings]) -> list[str]:
    """Begin what `convert` does, for `convert_shard` in any processes and `finish_conversion`.

    Returns:
        The names of the files of weights that are still to be written.
    """
    work, directory = work_on(target), place_of(directory, "directory")
    check_target(directory, work.target, overwrite=settings.get("overwrite", False))
    with disk_errors(work.target), work.held(), _given_up(work, after=False), disk_errors(work.target):
        _begin(work, directory, assets, settings)
    return work.undone


def convert_shard(target: Place, name: str) -> None:
    """Write one file of a conversion that was begun, unless that is done; several processes may at once."""
    work = work_on(target)
    with disk_errors(work.target), work.shared():
        work.write(name, lambda _: None)


def finish_conversion(target: Place, *, overwrite: bool = False) -> Export:
    """Make an export of what was written, once that is all.

    Raises:
        CommitError: a file is still to be written, or nothing was begun.
        ExportExistsError (a FileExistsError): `target` exists.
    """
    work = work_on(target)
    with disk_errors(work.target), work.held():
        work.check_done()
        with _given_up(work), disk_errors(work.target):
            _finish(work, overwrite=overwrite)
    return read_export(work.target)


def abandon_conversion(target: Place) -> None:
    """Delete what was written of a conversion that is not to go on."""
    work_on(target).abandon()


def model_of(checkpoint: Checkpoint) -> Place:
    """Return the DCP directory of a committed step's model.

    Raises:
        NotACheckpointError: it has none.
    """
    model = checkpoint.component("model")
    if model is None:
        raise NotACheckpointError(f"{checkpoint.path}: has no model, so there is nothing to convert.")
    return model


def own_assets(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> Assets:
    """Return the config and tokenizer of a committed step; of one with an adapter alone, the adapter's config.

    Raises:
        NotACheckpointError: it has none.
    """
    own = checkpoint.component("assets")
    if own is None:
        raise NotACheckpointError(f"{checkpoint.path}: has no assets (config and tokenizer); name a config.")
    if file_size(own / CONFIG_NAME) is None and find_adapter_config(own):
        return adapter_assets(own)
    return read_assets(own, trust_remote_code=trust_remote_code)


def source_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what an export's record says of a committed step."""
    manifest = checkpoint.manifest
    return {"run": manifest.run, "step": manifest.step, "digest": manifest.digest()}


@contextmanager
def _given_up(work: Work, *, after: bool = True) -> Generator[None]:
    """Delete what was written when something is wrong that will not come right by itself, and, `after` it, in the end.

    After any other error, as after a kill, the work goes on when the same conversion is begun again.
    """
    try:
        yield
    except CkptError:
        work.remove()
        raise
    if after:
        work.remove()


def _begin(work: Work, directory: Place, assets: Assets, settings: Settings) -> None:
    directory, overwrite = directory.absolute(), settings.get("overwrite", False)
    check_free(work.target, overwrite=overwrite)  # now that nobody else is at it
    plan = plan_export(
        directory,
        assets,
        dtype=settings.get("dtype"),
        max_shard_bytes=settings.get("max_shard_bytes", DEFAULT_SHARD_BYTES),
        table=settings.get("table", Table()),
        merge_adapter=settings.get("merge_adapter", False),
    )
    with DcpStored(directory, plan.tensors) as stored:
        check_ties(plan, stored)
    care = Care(settings.get("digest", True), settings.get("allow_nonfinite", False))
    document = {
        "directory": str(directory),
        "care": asdict(care),
        "architecture": plan.architecture,
        "source": dict(settings.get("source") or {"digest": metadata_digest(directory)}),
        "rules": plan.rules,
        "libraries": {name: version(name) for name in ("ckptflow", "safetensors", "torch", "transformers")},
    }
    files = _small_files(assets, plan)
    if len(plan.shards) > 1:
        files[INDEX_NAME] = index_bytes(plan)
    shards = shards_of(plan, directory)
    units = {shard.name: shard_bytes(shard) for shard in shards}
    work.begin(plan_document(document, shards, units, files), units, files, overwrite=overwrite)


def _finish(work: Work, *, overwrite: bool) -> None:
    plan, weights = work.plan, work.records()
    statistics = {name: tensor for record in weights.values() for name, tensor in record.pop("tensors", {}).items()}
    document = {
        "format_version": FORMAT_VERSION,
        "architecture": plan["architecture"],
        "source": plan["source"],
        "files": dict(sorted({**plan["files"], **weights}.items())),
        "rules": plan["rules"],
        "libraries": plan["libraries"],
        "statistics": dict(sorted(statistics.items())),
    }
    work.finish((EXPORT_NAME, (json.dumps(document, indent=1) + "\n").encode()), overwrite=overwrite)


def _small_files(assets: Assets, plan: Plan) -> dict[str, bytes]:
    """Return the export's files beside weights; a merged model has no adapter any more."""
    if ADAPTER_WEIGHTS_NAME in plan.shards:
        return adapter_files(assets)
    merged = any(output.update for output in plan.outputs)
    left_out = {RECORD_NAME, ADAPTER_CONFIG_NAME} if merged else {RECORD_NAME}
    others = {name: data for name, data in assets.files.items() if name not in left_out}
    return {CONFIG_NAME: config_bytes(plan.config, plan.architecture, plan.dtype), **others}
