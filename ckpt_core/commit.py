"""Writing one step to a store, by all ranks together: each its part, then one commit."""

# torch.distributed.checkpoint is only partly annotated.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckpt_core import durable, io, ranks, trainer
from ckpt_core.errors import CommitError
from ckpt_core.format.manifest import FileRecord, Manifest, record_file
from ckpt_core.state import MODEL_KEY, OPTIMIZER_KEY, ModelState, OptimizerState, storable

if TYPE_CHECKING:
    import torch

    from ckpt_core.store import Checkpoint, Staging, Store

Files = dict[str, FileRecord]


@dataclass(frozen=True)
class Parts:
    """What goes into a step; each may be missing."""

    module: torch.nn.Module | None
    optimizer: torch.optim.Optimizer | None
    scheduler: Any | None
    trainer: Mapping[str, Any] | None
    assets: Path | None


def commit(
    store: Store, run: str, step: int, parts: Parts, manifest: Callable[[Mapping[str, FileRecord], int], Manifest]
) -> Checkpoint:
    """Collective: write a step and commit it; on any rank's error nothing is committed, and every rank raises.

    Args:
        store: where to.
        run: the run's name, the same on all ranks.
        step: the step, the same on all ranks.
        parts: what to write.
        manifest: makes the manifest from the files' records and the number of ranks.
    """
    if len(set(ranks.gather((run, step)))) > 1:
        raise CommitError(f"the ranks disagree on what they save: {ranks.gather((run, step))}; nothing was written.")
    held: list[Staging] = []

    def begin() -> Path:
        held.append(store.stage(run, step))
        return held[0].path

    staged = ranks.first(begin)
    try:
        gathered = ranks.gather(_write(staged, parts))
        files = {name: record for records in gathered for name, record in records.items()}

        def finish() -> Checkpoint:
            present = {name for name, _ in durable.files_below(staged)}
            if present != set(files):
                raise CommitError(f"{staged}: holds {sorted(present)}, the ranks wrote {sorted(files)}; not committed.")
            return held[0].commit(manifest(dict(sorted(files.items())), ranks.world_size()))

        return ranks.first(finish)
    finally:
        for staging in held:
            store.release(staging)


def _write(staged: Path, parts: Parts) -> Files:
    """Collective: write every part below `staged`; return what this rank wrote, by path."""
    files: Files = {}
    if parts.module is not None:
        content = {MODEL_KEY: ranks.together(ModelState(parts.module).content)}
        files |= _below("model", io.save(content, staged / "model", twin=True))
    if parts.optimizer is not None:
        content = {OPTIMIZER_KEY: ranks.together(lambda: _optimizer_content(parts))}
        files |= _below("optimizer", io.save(content, staged / "optimizer", twin=True))
    if parts.trainer is not None:
        saved = ranks.each(lambda: trainer.save(staged / "trainer", parts.trainer or {}, ranks.rank()))
        files |= _below("trainer", saved[ranks.rank()])
    written = ranks.first(lambda: _write_assets(staged / "assets", parts))
    return files | _below("assets", written) if ranks.rank() == 0 else files


def _below(directory: str, files: Files) -> Files:
    return {f"{directory}/{name}": record for name, record in files.items()}


def _optimizer_content(parts: Parts) -> dict[str, Any]:
    """Return the optimizer's state by the names of the module's parameters, or by number without a module."""
    assert parts.optimizer is not None
    if parts.module is not None:
        return OptimizerState(parts.module, parts.optimizer, parts.scheduler).content()
    optim = parts.optimizer.state_dict()
    optim["state"] = {str(number): state for number, state in optim["state"].items()}
    sched = {} if parts.scheduler is None else {"sched": parts.scheduler.state_dict()}
    return storable({"optim": optim, **sched}, OPTIMIZER_KEY)


def _write_assets(directory: Path, parts: Parts) -> Files:
    """On rank 0: copy the assets, and add a transformers model's own configs; return what was written."""
    if parts.assets is not None:
        directory.mkdir(parents=True)
        durable.copy_tree(parts.assets, directory)
    config = getattr(parts.module, "config", None)
    if hasattr(config, "save_pretrained"):
        directory.mkdir(parents=True, exist_ok=True)
        from ckpt_core.export.assets import write_configs

        write_configs(parts.module, directory)
    if not directory.is_dir():
        return {}
    for _, path in durable.files_below(directory):
        durable.sync_file(path)
    return {name: record_file(path) for name, path in durable.files_below(directory)}
