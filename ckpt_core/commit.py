"""Writing one step to a store, by all ranks together: each its part, then one commit."""

# torch.distributed.checkpoint is only partly annotated.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import errno
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckpt_core import durable, io, ranks, trainer
from ckpt_core.errors import ArgumentError, CkptError, CommitError
from ckpt_core.format.manifest import FileRecord, Manifest, record_bytes
from ckpt_core.reference import refer
from ckpt_core.state import MODEL_KEY, OPTIMIZER_KEY, ModelState, OptimizerState

if TYPE_CHECKING:
    import torch

    from ckpt_core.buffers import HostBuffers
    from ckpt_core.reference import Reference
    from ckpt_core.store import Checkpoint, Staging, Store
    from ckpt_core.urls import Place

Files = dict[str, FileRecord]


@dataclass(frozen=True)
class Parts:
    """The live objects whose state goes into a step; each may be missing, then on all ranks."""

    manifest: Manifest
    """What is said of the step; the time, the number of ranks and the files are added when it is committed."""

    module: torch.nn.Module | None
    optimizer: torch.optim.Optimizer | None
    scheduler: Any | None
    trainer: Mapping[str, Any] | None
    """Counters, in JSON types."""

    assets: Path | None


@dataclass(frozen=True)
class Content:
    """What this rank brings to a step; each part may be missing, then on all ranks."""

    world_size: int
    """The number of ranks that the save began with: the step is whole if all of them write."""

    manifest: Manifest
    model: Callable[[], dict[str, Any]] | None
    optimizer: Callable[[], dict[str, Any]] | None
    trainer: Mapping[str, bytes] | None
    """Files by name."""

    configs: Mapping[str, bytes]
    """A transformers model's own, on rank 0."""

    assets: Path | None
    buffers: frozenset[str]
    """The flat names of the model's buffers, which may differ between ranks."""


def agree(parts: Callable[[], Parts], store: Callable[[], Store]) -> tuple[Parts, Store]:
    """Collective: return what a save is given, the same on all ranks; the first exchange of a save.

    Raises:
        CommitError: an argument is missing or another one on a rank; nothing was written.
    """
    given, opened = ranks.together(lambda: (parts(), store()))
    manifest = given.manifest
    facts: dict[str, object] = {"the store": opened.url, "run": manifest.run, "step": manifest.step}
    objects = {"module": given.module, "optimizer": given.optimizer, "scheduler": given.scheduler}
    facts |= {name: class_name(instance) for name, instance in objects.items()}
    facts |= {"trainer": None if given.trainer is None else "counters", "assets": given.assets and str(given.assets)}
    documents = {
        "hyperparameters": manifest.hyperparameters,
        "metrics": manifest.metrics,
        "lineage": manifest.lineage,
        "trainer": given.trainer or {},
    }
    for name, document in documents.items():
        facts |= {f"{name}[{key!r}]": json.dumps(value) for key, value in document.items()}
    ranks.agree(facts, f"save of step {manifest.step}", CommitError)
    return given, opened


def live(parts: Parts) -> Content:
    """Return what is read from the live objects while it is written: they must not change meanwhile."""
    return Content(
        ranks.world_size(),
        parts.manifest,
        None if parts.module is None else lambda: _model(parts, offload=True),
        None if parts.optimizer is None else lambda: _optimizer(parts, offload=True),
        None if parts.trainer is None else trainer.content(parts.trainer, ranks.rank()),
        _configs(parts.module) if ranks.rank() == 0 else {},
        parts.assets,
        frozenset() if parts.module is None else io.buffer_names(parts.module, MODEL_KEY),
    )


def stage(parts: Parts, buffers: HostBuffers) -> Content:
    """Return what is copied now, so that the live objects may change; it is good until `buffers` are used again."""
    model = None if parts.module is None else _model(parts, offload=False)
    optimizer = None if parts.optimizer is None else _optimizer(parts, offload=False)
    copied_model, copied_optimizer = buffers.stage((model, optimizer))
    return replace(
        live(parts),
        model=None if model is None else lambda: copied_model,
        optimizer=None if optimizer is None else lambda: copied_optimizer,
    )


def check_state(content: Content) -> None:
    """Collective: refuse what was staged if the ranks hold different state; `commit` does the same.

    Raises:
        CommitError: they do; the message names the entry.
    """
    step = f"step {content.manifest.step} of run {content.manifest.run!r}"
    for key, state in ((MODEL_KEY, content.model), (OPTIMIZER_KEY, content.optimizer)):
        if state is not None:
            io.check_state({key: state()}, step, buffers=content.buffers)


def commit(store: Store, content: Content, permit: Callable[[], None] | None = None) -> Reference:
    """Collective: write a step and commit it; on any rank's error nothing is committed, and every rank raises.

    Args:
        store: where to.
        content: what to write; the same on all ranks but for the parts of sharded tensors.
        permit: called on every rank when all is written, right before the commit; an error prevents it.

    Returns:
        The reference to the step.
    """
    run, step = content.manifest.run, content.manifest.step
    what = f"step {step} of run {run!r}"
    ranks.agree({"run": run, "step": step, "the number of ranks": content.world_size}, what, CommitError)
    held: list[Staging] = []

    def begin() -> Place:
        if content.world_size != ranks.world_size():
            raise CommitError(
                f"{what}: the save began with {content.world_size} ranks, and {ranks.world_size()} are left to write "
                "it; nothing was written. Save again, with the ranks that there are."
            )
        held.append(store.stage(run, step))
        return held[0].path

    staged = ranks.first(begin)
    try:
        gathered = ranks.gather(_write(staged, content))
        files = {name: record for records in gathered for name, record in records.items()}
        if permit is not None:
            ranks.together(permit)

        def finish() -> Checkpoint:
            present = {name for name, _ in durable.files_below(staged)}
            if present != set(files) or len(gathered) != content.world_size:
                raise CommitError(
                    f"{staged}: holds {sorted(present)}, {len(gathered)} of {content.world_size} ranks wrote "
                    f"{sorted(files)}; not committed."
                )
            return held[0].commit(
                replace(
                    content.manifest,
                    time=datetime.now(UTC).isoformat(timespec="seconds"),
                    world_size=content.world_size,
                    files=dict(sorted(files.items())),
                )
            )

        committed = ranks.first(finish)
    finally:
        for staging in held:
            store.release(staging)
    return ranks.first(lambda: _refer(committed))


def _refer(committed: Checkpoint) -> Reference:
    try:
        return refer(committed)
    except (OSError, CkptError) as error:
        raise CommitError(
            f"{committed.url}: committed, but it could not be read back: {error}. Open it by its URL once it can."
        ) from error


def _write(staged: Place, content: Content) -> Files:
    """Collective: write every part below `staged`; return what this rank wrote, by path."""
    files: Files = {}
    if content.model is not None:
        state = {MODEL_KEY: ranks.together(content.model)}
        files |= _below("model", io.save(state, staged / "model", twin=True, buffers=content.buffers))
    if content.optimizer is not None:
        state = {OPTIMIZER_KEY: ranks.together(content.optimizer)}
        files |= _below("optimizer", io.save(state, staged / "optimizer", twin=True))
    if content.trainer is not None:
        own = content.trainer
        files |= _below("trainer", ranks.together(lambda: _write_files(staged / "trainer", own)))
    written = ranks.first(lambda: _write_files(staged / "assets", {**_read(content.assets), **content.configs}))
    return files | _below("assets", written) if ranks.rank() == 0 else files


def _below(directory: str, files: Files) -> Files:
    return {f"{directory}/{name}": record for name, record in files.items()}


def _model(parts: Parts, *, offload: bool) -> dict[str, Any]:
    assert parts.module is not None
    return ModelState(parts.module).content(offload=offload)


def _optimizer(parts: Parts, *, offload: bool) -> dict[str, Any]:
    """Return the optimizer's state by the names of the module's parameters, or by number without a module."""
    assert parts.optimizer is not None
    return OptimizerState(parts.module, parts.optimizer, parts.scheduler).content(offload=offload)


def class_name(instance: object) -> str | None:
    """Return the name of an object's class with its module; None for no object."""
    return None if instance is None else f"{type(instance).__module__}.{type(instance).__qualname__}"


def _configs(module: torch.nn.Module | None) -> dict[str, bytes]:
    """Return the configs of a transformers model as files by name; none of another module."""
    if not hasattr(getattr(module, "config", None), "save_pretrained"):
        return {}
    from ckpt_core.export.assets import write_configs

    with tempfile.TemporaryDirectory() as directory:
        write_configs(module, Path(directory))
        return _read(Path(directory))


def _read(directory: Path | None) -> dict[str, bytes]:
    """Read the files below a directory; links to files and directories are followed.

    Raises:
        ArgumentError: something there is no file, or a link leads to a directory above it.
    """
    if directory is None:
        return {}
    if not directory.is_dir():
        text = "assets: no such directory; give one with the files that go along"
        raise FileNotFoundError(errno.ENOENT, text, str(directory))
    found = dict(durable.files_through_links(directory))
    for path in found.values():
        if path.is_dir():
            raise ArgumentError(f"{path}: a link to a directory that it lies in; take it out of the directory.")
        if not path.is_file():
            raise ArgumentError(f"{path}: neither a file nor a link to one; take it out of the directory.")
    return {name: path.read_bytes() for name, path in found.items()}


def _write_files(directory: Place, files: Mapping[str, bytes]) -> Files:
    for name, data in files.items():
        durable.make_parents(directory / name)
        durable.write_new(directory / name, data)
    return {name: record_bytes(data) for name, data in files.items()}
