"""`ckpt list`, `prune`, `repair`, `pin` and `unpin`: the committed steps of a store."""

from __future__ import annotations

import argparse
import logging
from typing import TYPE_CHECKING, Any

from ckpt_core.cli.command import Answer, Commands
from ckpt_core.errors import ArgumentError, NotACheckpointError

if TYPE_CHECKING:
    from ckpt_core.store import Checkpoint, Store

_SHOWN = 10
_log = logging.getLogger(__name__)


def add_commands(commands: Commands) -> None:
    """Add the commands that work on a store."""
    listing = commands.add("list", _list, "list the committed steps of a store")
    listing.add_argument("store", help="a path or URL")
    _add_prune(commands.add("prune", _prune, "delete the steps of each run that no rule keeps"))
    repair = commands.add("repair", _repair, "remove debris, and set damaged steps aside")
    repair.add_argument("store")
    repair.add_argument("--run", help="only this run")
    repair.add_argument("--dry-run", action="store_true", help="say what would be done, and do nothing")
    for name, run, text in (
        ("pin", _pin, "give a step a name, which keeps it from pruning"),
        ("unpin", _unpin, "take a step's name away"),
    ):
        command = commands.add(name, run, text)
        command.add_argument("store")
        command.add_argument("run", metavar="RUN")
        command.add_argument("name", metavar="NAME", help="such as champion")
        if name == "pin":
            command.add_argument("step", metavar="STEP", type=int)


def _add_prune(prune: argparse.ArgumentParser) -> None:
    prune.add_argument("store")
    prune.add_argument("--keep-last", type=int, required=True, metavar="K", help="how many of the newest stay")
    prune.add_argument("--keep-best", type=int, default=0, metavar="K", help="how many of the best by --metric stay")
    prune.add_argument("--metric", help="what makes a step the best")
    prune.add_argument(
        "--mode", choices=["min", "max"], help="whether the smallest or largest --metric is best; default: by its name"
    )
    prune.add_argument("--keep-every", type=int, metavar="N", help="every step whose number N divides stays")
    prune.add_argument("--run", help="only this run")
    prune.add_argument("--dry-run", action="store_true", help="say what would be deleted, and delete nothing")


def _list(options: argparse.Namespace) -> Answer:
    store = _open(options.store)
    facts = {run: [_facts(checkpoint) for checkpoint in store.list(run)] for run in store.runs()}
    pins = {run: _readable_pins(store, run) for run in facts}
    lines = [
        f"{run}  step {s['step']:>8}  {s['bytes']:>14,} bytes  {s['time']}  {_names(pins[run], s['step'])}".rstrip()
        for run, steps in facts.items()
        for s in steps
    ]
    answer: dict[str, Any] = {"store": store.url, "runs": facts, "pins": pins}
    return Answer(answer, lines or [f"{store.url}: no committed steps"])


def _open(url: str) -> Store:
    """Return the store at a URL, which has to be there.

    Raises:
        NotACheckpointError: there is no such directory.
    """
    from ckpt_core.store import LocalStore, open_store

    store = open_store(url)
    if isinstance(store, LocalStore) and not store.root.is_dir():
        raise NotACheckpointError(f"{store.root}: no such directory, so no store; see where the runs lie.")
    return store


def _readable_pins(store: Store, run: str) -> dict[str, int]:
    """Return a run's pins; none where this user may not read them, which is logged."""
    try:
        return store.pins(run)
    except PermissionError as error:
        _log.warning("pins of run %s: skipped: %s", run, error)
        return {}


def _facts(checkpoint: Checkpoint) -> dict[str, Any]:
    manifest = checkpoint.manifest
    facts = {"step": checkpoint.step, "url": checkpoint.url, "time": manifest.time, "bytes": manifest.nbytes}
    return {**facts, "metrics": dict(manifest.metrics)}


def _names(pins: dict[str, int], step: int) -> str:
    return " ".join(name for name, pinned in sorted(pins.items()) if pinned == step)


def _prune(options: argparse.Namespace) -> Answer:
    from ckpt_core.retention import Retention, StepFacts, check_metric

    retention = Retention(
        keep_last=options.keep_last,
        keep_best=options.keep_best,
        metric=options.metric,
        mode=options.mode,
        keep_every=options.keep_every,
    )
    store = _open(options.store)
    runs = _runs(store, options.run)
    if retention.metric is not None:  # before anything is deleted in any run
        for run in runs:
            try:
                check_metric([StepFacts(c.step, c.manifest.metrics) for c in store.list(run)], retention)
            except ArgumentError as error:
                raise ArgumentError(f"run {run!r}: {error} Nothing was deleted; to prune others, give --run.") from None
    pruned = {run: store.prune(run, retention, dry_run=options.dry_run) for run in runs}
    verb = "would delete" if options.dry_run else "deleted"
    lines = [f"{run}: {verb} {list(p.deleted) or 'nothing'}" for run, p in pruned.items()]
    lines += [f"{run}: being read, so left: {list(p.leased)}" for run, p in pruned.items() if p.leased]
    errors = [f"{run}: {error}" for run, p in pruned.items() for error in p.errors]
    deleted = {run: list(p.deleted) for run, p in pruned.items()}
    if options.dry_run:
        facts = {"would_delete": deleted, "errors": errors}
    else:
        facts = {"deleted": deleted, "leased": {run: list(p.leased) for run, p in pruned.items()}, "errors": errors}
    return Answer(facts, lines + errors, good=not errors)


def _runs(store: Store, only: str | None) -> list[str]:
    """Return the runs to work on: the one that is named, or all, but for symbolic links to runs.

    Raises:
        NotACheckpointError: the one that is named has no step.
    """
    from ckpt_core.store import LocalStore
    from ckpt_core.store.names import check_name

    runs = store.runs()
    if only is None:
        return [run for run in runs if not (isinstance(store, LocalStore) and (store.root / run).is_symlink())]
    check_name("run", only)
    if only not in runs:
        there = ", ".join(runs[:_SHOWN]) + (", ..." if len(runs) > _SHOWN else "")
        raise NotACheckpointError(f"run {only!r}: {store.url} has no steps of it; it has {there or 'no runs'}.")
    return [only]


def _repair(options: argparse.Namespace) -> Answer:
    store = _open(options.store)
    # A run may have nothing but what a killed save left.
    runs = [options.run] if options.run and _has_directory(store, options.run) else _runs(store, options.run)
    done = {run: store.repair(run, dry_run=options.dry_run) for run in runs}
    lines = [f"{run}: {sentence}" for run, sentences in done.items() for sentence in sentences]
    return Answer(
        {"would_repair" if options.dry_run else "repaired": done}, lines or [f"{store.url}: nothing to repair"]
    )


def _has_directory(store: Store, run: str) -> bool:
    from ckpt_core.store import LocalStore
    from ckpt_core.store.names import check_name

    return isinstance(store, LocalStore) and (store.root / check_name("run", run)).is_dir()


def _pin(options: argparse.Namespace) -> Answer:
    store = _open(options.store)
    store.pin(options.run, options.name, options.step)
    return Answer({"pins": store.pins(options.run)}, [f"{options.run}: {options.name} is step {options.step}"])


def _unpin(options: argparse.Namespace) -> Answer:
    store = _open(options.store)
    store.unpin(options.run, options.name)
    return Answer({"pins": store.pins(options.run)}, [f"{options.run}: no step is {options.name}"])
