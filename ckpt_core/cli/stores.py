"""`ckpt list`, `prune`, `repair`, `pin` and `unpin`: the committed steps of a store."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from ckpt_core.cli.command import Answer, Commands

if TYPE_CHECKING:
    from ckpt_core.store import Checkpoint, Store


def add_commands(commands: Commands) -> None:
    """Add the commands that work on a store."""
    listing = commands.add("list", _list, "list the committed steps of a store")
    listing.add_argument("store", help="a path or URL")
    _add_prune(commands.add("prune", _prune, "delete the steps of each run that no rule keeps"))
    repair = commands.add("repair", _repair, "remove debris, and set damaged steps aside")
    repair.add_argument("store")
    repair.add_argument("--run", help="only this run")
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
    prune.add_argument("--mode", choices=["min", "max"], default="min", help="which --metric is best; default: min")
    prune.add_argument("--keep-every", type=int, metavar="N", help="every step whose number N divides stays")
    prune.add_argument("--run", help="only this run")
    prune.add_argument("--dry-run", action="store_true", help="say what would be deleted, and delete nothing")


def _list(options: argparse.Namespace) -> Answer:
    from ckpt_core.store import open_store

    store = open_store(options.store)
    facts = {run: [_facts(checkpoint) for checkpoint in store.list(run)] for run in store.runs()}
    pins = {run: store.pins(run) for run in facts}
    lines = [
        f"{run}  step {s['step']:>8}  {s['bytes']:>14,} bytes  {s['time']}  {_names(pins[run], s['step'])}".rstrip()
        for run, steps in facts.items()
        for s in steps
    ]
    answer: dict[str, Any] = {"store": store.url, "runs": facts, "pins": pins}
    return Answer(answer, lines or [f"{store.url}: no committed steps"])


def _facts(checkpoint: Checkpoint) -> dict[str, Any]:
    manifest = checkpoint.manifest
    facts = {"step": checkpoint.step, "url": checkpoint.url, "time": manifest.time, "bytes": manifest.nbytes}
    return {**facts, "metrics": dict(manifest.metrics)}


def _names(pins: dict[str, int], step: int) -> str:
    return " ".join(name for name, pinned in sorted(pins.items()) if pinned == step)


def _prune(options: argparse.Namespace) -> Answer:
    from ckpt_core.retention import Retention
    from ckpt_core.store import open_store
    from ckpt_core.store.pruning import given_up

    retention = Retention(
        keep_last=options.keep_last,
        keep_best=options.keep_best,
        metric=options.metric,
        mode=options.mode,
        keep_every=options.keep_every,
    )
    store = open_store(options.store)
    runs = _runs(store, options)
    if options.dry_run:
        steps = {run: [c.step for c in given_up((), store.list(run), retention, store.pins(run))] for run in runs}
        return Answer({"would_delete": steps}, [f"{run}: would delete {s or 'nothing'}" for run, s in steps.items()])
    pruned = {run: store.prune(run, retention) for run in runs}
    lines = [f"{run}: deleted {list(p.deleted) or 'nothing'}" for run, p in pruned.items()]
    lines += [f"{run}: being read, so left: {list(p.leased)}" for run, p in pruned.items() if p.leased]
    errors = [error for p in pruned.values() for error in p.errors]
    facts = {
        "deleted": {run: list(p.deleted) for run, p in pruned.items()},
        "leased": {run: list(p.leased) for run, p in pruned.items()},
        "errors": errors,
    }
    return Answer(facts, lines + errors, good=not errors)


def _runs(store: Store, options: argparse.Namespace) -> list[str]:
    return [options.run] if options.run else store.runs()


def _repair(options: argparse.Namespace) -> Answer:
    from ckpt_core.store import open_store

    store = open_store(options.store)
    done = {run: store.repair(run) for run in _runs(store, options)}
    lines = [f"{run}: {sentence}" for run, sentences in done.items() for sentence in sentences]
    return Answer({"repaired": done}, lines or [f"{store.url}: nothing to repair"])


def _pin(options: argparse.Namespace) -> Answer:
    from ckpt_core.store import open_store

    store = open_store(options.store)
    store.pin(options.run, options.name, options.step)
    return Answer({"pins": store.pins(options.run)}, [f"{options.run}: {options.name} is step {options.step}"])


def _unpin(options: argparse.Namespace) -> Answer:
    from ckpt_core.store import open_store

    store = open_store(options.store)
    store.unpin(options.run, options.name)
    return Answer({"pins": store.pins(options.run)}, [f"{options.run}: no step is {options.name}"])
