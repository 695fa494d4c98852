"""`ckpt list` and `ckpt prune`: the committed steps of a store."""

from __future__ import annotations

import argparse

from ckpt_core.cli.command import Answer, Commands


def add_commands(commands: Commands) -> None:
    """Add the commands that work on a store."""
    listing = commands.add("list", _list, "list the committed steps of a store")
    listing.add_argument("store")
    prune = commands.add("prune", _prune, "delete all but the newest steps of each run")
    prune.add_argument("store")
    prune.add_argument("--keep-last", type=int, required=True, metavar="K", help="how many steps stay")
    prune.add_argument("--run", help="only this run")


def _list(options: argparse.Namespace) -> Answer:
    from ckpt_core.store import open_store

    store = open_store(options.store)
    runs = {run: store.list(run) for run in store.runs()}
    facts = {
        run: [{"step": c.step, "url": c.url, "time": c.manifest.time, "bytes": c.manifest.nbytes} for c in steps]
        for run, steps in runs.items()
    }
    lines = [f"{r}  step {s['step']:>8}  {s['bytes']:>14,} bytes  {s['time']}" for r in facts for s in facts[r]]
    return Answer({"store": store.url, "runs": facts}, lines or [f"{store.url}: no committed steps"])


def _prune(options: argparse.Namespace) -> Answer:
    from ckpt_core.retention import Retention
    from ckpt_core.store import open_store

    store = open_store(options.store)
    runs = [options.run] if options.run else store.runs()
    retention = Retention(keep_last=options.keep_last)
    deleted = {run: list(store.prune(run, retention).deleted) for run in runs}
    return Answer({"deleted": deleted}, [f"{run}: deleted {steps or 'nothing'}" for run, steps in deleted.items()])
