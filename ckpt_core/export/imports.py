"""Hugging Face safetensors to DCP, to start a run from: planned from headers, streamed, complete or not there.

.importing-<target>/
checkpoint/      becomes the target, by one rename:
    .metadata, .metadata.json, __0_<n>.distcp     a stock DCP directory, of the model under the key `model`
    assets/                                       config.json, generation_config.json, tokenizer files

What a killed import leaves there, the next one to the same target deletes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ckpt_core import durable
from ckpt_core.errors import ArgumentError, DamagedError
from ckpt_core.export import scratch
from ckpt_core.export.assets import Assets, config_bytes, read_assets
from ckpt_core.export.carried import CONFIG_NAME
from ckpt_core.export.chunks import Part, files_of, write_chunks, write_metadata
from ckpt_core.export.computed import write_computed
from ckpt_core.export.intake import Intake, plan_intake
from ckpt_core.export.names import Table
from ckpt_core.export.shard import Identity, identity_of
from ckpt_core.export.stored import HfStored
from ckpt_core.export.target import check_free, check_target, disk_errors, give_name
from ckpt_core.export.weight_conversions import RECORD_NAME
from ckpt_core.export.work import Progress, Tally
from ckpt_core.export.write import check_same
from ckpt_core.format.index import Span
from ckpt_core.hf_weights import HfWeights, read_weights
from ckpt_core.state import MODEL_KEY
from ckpt_core.urls import local_path, place_of
from ckpt_core.workers import count_workers, run_all

if TYPE_CHECKING:
    from ckpt_core.urls import AnyPath

ASSETS_NAME = "assets"
DEFAULT_FILE_BYTES = 1_000_000_000


@dataclass(frozen=True)
class Import:
    """A DCP checkpoint that was made of a Hugging Face directory."""

    path: Path
    architecture: str
    tensors: int
    """How many there are, tied ones under each name."""

    nbytes: int
    """Size of all tensors in bytes."""

    rules: tuple[str, ...]
    """The named rules that were applied, for people."""


def import_hf(
    source: AnyPath,
    target: AnyPath,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    max_file_bytes: int = DEFAULT_FILE_BYTES,
    table: Table = Table(),  # noqa: B008 - frozen
    trust_remote_code: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Import:
    """Make a DCP checkpoint of a Hugging Face directory, streamed, as `save_checkpoint` of the model would.

    Args:
        source: the directory, local or a URL's: one safetensors file, or several with an index; and config.json.
        target: the DCP directory to make; it appears whole or not at all.
        dtype: cast floating-point tensors to this (`bfloat16`, say); None keeps them bit for bit.
        overwrite: replace the target if it exists.
        allow_nonfinite: accept NaN and Inf.
        max_file_bytes: largest size of one file's tensors.
        table: what is to be known of the source's names.
        trust_remote_code: take a model that brings code along; none of it is run.
        workers: how many files are written at once; None means one a core.
        progress: is told the bytes written so far, and those to write.

    Raises:
        ExportExistsError (a FileExistsError): `target` exists.
        ArgumentError: one of source and target lies in the other, or `max_file_bytes` is not positive.
        CheckpointError: the source is damaged, hostile, or does not fit its config; nothing is left at `target`.
        ExportError (an OSError): the disk is full, or failed.
    """
    if max_file_bytes <= 0:
        raise ArgumentError(f"max_file_bytes={max_file_bytes}: expected a positive number of bytes.")
    target, weights = local_path(target, "target"), read_weights(place_of(source, "source"))
    check_target(weights.place, target, overwrite=overwrite)
    assets = read_assets(weights.place, trust_remote_code=trust_remote_code)
    identities = {file: identity_of(weights.place / file) for file in weights.files}
    intake = plan_intake(weights, assets.config, dtype=dtype, table=table)
    root = target.with_name(f".importing-{target.name}")
    with disk_errors(target), scratch.held(root, target):
        check_free(target, overwrite=overwrite)  # now that nobody else is at it
        try:
            scratch.clear(root)
            made = root / "checkpoint"
            _write_assets(made / ASSETS_NAME, assets, intake)
            _check_twins(weights, intake)
            jobs = _jobs(weights, intake, assets, root, max_file_bytes)
            writing = _Writing(intake, made, allow_nonfinite, Tally(progress, intake.nbytes))
            chunks = writing.write_all(jobs, workers or count_workers(remote=not isinstance(weights.place, Path)))
            write_metadata(made, {name: chunks[name] for name in intake.names}, MODEL_KEY)
            _check_unchanged(weights, identities)
            give_name(made, target, overwrite=overwrite)
        finally:
            scratch.remove(root)
    rules = (*intake.rules, *assets.rules)
    return Import(target, intake.architecture, len(intake.names), intake.nbytes, rules)


Job = tuple[HfWeights, list[Part]]
"""The chunks of one file, and the weights that they are made of."""


def _jobs(weights: HfWeights, intake: Intake, assets: Assets, scratch: Path, max_file_bytes: int) -> dict[str, Job]:
    """Return what is to be written to each file; what the model computes is put into `scratch` first."""
    jobs: dict[str, Job] = {n: (weights, parts) for n, parts in files_of(intake.outputs, max_file_bytes).items()}
    if not intake.computed:
        return jobs
    names = [output.name for output in intake.computed]
    computed = write_computed(scratch / "computed.safetensors", intake.architecture, assets.config, names)
    more = files_of(intake.computed, max_file_bytes, first=len(jobs))
    return jobs | {name: (computed, parts) for name, parts in more.items()}


class _Writing:
    """The files of a checkpoint, written several at once."""

    def __init__(self, intake: Intake, directory: Path, allow_nonfinite: bool, told: Tally) -> None:
        self._layouts, self._directory, self._allow_nonfinite = intake.layouts, directory, allow_nonfinite
        self._told = told

    def write_all(self, jobs: Mapping[str, Job], workers: int) -> dict[str, list[tuple[Part, Span]]]:
        """Write files, by their names, until one fails; return the chunks of each tensor."""
        found: dict[str, list[tuple[Part, Span]]] = {}
        calls = [partial(self._write, name, *job) for name, job in jobs.items()]
        for part, span in (chunk for chunks in run_all(calls, workers, name="ckpt-import") for chunk in chunks):
            found.setdefault(part.output.name, []).append((part, span))
        return found

    def _write(self, name: str, weights: HfWeights, parts: list[Part]) -> list[tuple[Part, Span]]:
        with HfStored(weights, self._layouts) as stored:
            path, allow = self._directory / name, self._allow_nonfinite
            spans = write_chunks(path, parts, stored, allow_nonfinite=allow, written=self._told.add)
        return list(zip(parts, spans, strict=True))


def _write_assets(directory: Path, assets: Assets, intake: Intake) -> None:
    directory.mkdir(parents=True)
    durable.write_new(directory / CONFIG_NAME, config_bytes(intake.config, intake.architecture, intake.dtype))
    files = {**assets.files, RECORD_NAME: intake.record} if intake.record else assets.files
    for name, data in files.items():
        durable.make_parents(directory / name)
        durable.write_new(directory / name, data)


def _check_twins(weights: HfWeights, intake: Intake) -> None:
    """Compare tensors that the config ties, and that are stored under several names all the same, bit for bit.

    Raises:
        MismatchError: they differ.
    """
    tensors = weights.tensors
    with HfStored(weights) as stored:
        for twin, kept in intake.twins:
            one, other = tensors[twin], tensors[kept]
            check_same(stored, (twin, str(one.dtype), one.shape), (kept, str(other.dtype), other.shape))


def _check_unchanged(weights: HfWeights, identities: Mapping[str, Identity]) -> None:
    for file, identity in identities.items():
        if identity_of(weights.place / file) != identity:
            raise DamagedError(
                f"{weights.place / file}: changed while it was imported; nothing was kept. Import again when nobody "
                "writes there."
            )
