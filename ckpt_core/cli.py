"""`ckpt`: look at checkpoints, verify, convert, publish and prune them, from a shell.

Each command takes `--json` for one JSON object on standard output. Exit status: 0 good, 1 the thing is bad, 2 misuse.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckpt_core.errors import ArgumentError, CkptError

if TYPE_CHECKING:
    from ckpt_core.export.plan import Plan

_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)B?", re.IGNORECASE)
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


@dataclass(frozen=True)
class Answer:
    """What a command has to say: the facts, for tools, and lines, for people."""

    facts: dict[str, Any]
    lines: list[str] = field(default_factory=list[str])
    good: bool = True


Command = Callable[[argparse.Namespace], Answer | None]
"""One that answers by itself, as it runs on, returns None."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit status."""
    options = _parser().parse_args(arguments)
    try:
        answer: Answer | None = options.command(options)
    except ArgumentError as error:
        return _fail(error, options, 2)
    except (CkptError, OSError) as error:
        return _fail(error, options, 1)
    except KeyboardInterrupt:
        return 130
    if answer is None:
        return 0
    print(json.dumps(answer.facts) if options.json else "\n".join(answer.lines))  # noqa: T201 - the answer
    return 0 if answer.good else 1


def entry() -> None:
    """Run as the `ckpt` program."""
    sys.exit(main())


def parse_size(text: str) -> int:
    """Return the bytes that a size such as `5GB` or `200MB` names (powers of ten)."""
    match = _SIZE.fullmatch(text.strip())
    size = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if size <= 0:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a size such as 5GB or 200MB")
    return size


def _fail(error: Exception, options: argparse.Namespace, status: int) -> int:
    if options.json:
        print(json.dumps({"error": {"type": type(error).__name__, "message": str(error)}}))  # noqa: T201 - the answer
    print(f"ckpt: {error}", file=sys.stderr)  # noqa: T201 - the answer
    return status


def _inspect(options: argparse.Namespace) -> Answer:
    from ckpt_core.format.index import read_index
    from ckpt_core.format.manifest import MANIFEST_NAME, read_manifest
    from ckpt_core.locate import find_dcp
    from ckpt_core.store import local_path

    path = local_path(options.path)
    directory = find_dcp(path)
    index = read_index(directory)
    tensors = {
        name: {"dtype": e.dtype, "shape": e.shape, "chunks": len(e.chunks), "bytes": e.nbytes}
        for name, e in index.tensors.items()
    }
    facts: dict[str, Any] = {"path": str(directory), "bytes": index.nbytes, "tensors": tensors}
    facts["values"] = list(index.values)
    lines = [f"{directory}: {len(tensors)} tensors, {index.nbytes:,} bytes, {len(index.values)} values"]
    if (path / MANIFEST_NAME).is_file():
        manifest = read_manifest(path)
        record = asdict(manifest)
        facts["manifest"] = {**record, "digest": manifest.digest()}
        lines.append(f"run {manifest.run}, step {manifest.step}, {manifest.time}, {manifest.world_size} ranks")
        lines.append(f"digest {manifest.digest()}")
    lines += [f"  {t['dtype']:10} {t['shape']!s:20} {t['chunks']:3} chunks  {name}" for name, t in tensors.items()]
    return Answer(facts, lines)


def _verify(options: argparse.Namespace) -> Answer:
    from ckpt_core.verify import verify

    report = verify(options.path, allow_nonfinite=options.allow_nonfinite)
    lines = [f"{'ok  ' if check.passed else 'FAIL'} {check.name}: {check.detail}" for check in report.checks]
    return Answer(report.to_dict(), [f"{report.kind} {report.path}", *lines], report.passed)


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
    from ckpt_core.store import open_store

    store = open_store(options.store)
    runs = [options.run] if options.run else store.runs()
    deleted = {run: store.prune(run, keep_last=options.keep_last) for run in runs}
    return Answer({"deleted": deleted}, [f"{run}: deleted {steps or 'nothing'}" for run, steps in deleted.items()])


def _convert(options: argparse.Namespace) -> Answer:
    from ckpt_core.export import check_target, convert, convert_checkpoint, plan_export
    from ckpt_core.export.assets import fetch_assets, read_assets
    from ckpt_core.format.manifest import MANIFEST_NAME
    from ckpt_core.locate import find_dcp
    from ckpt_core.store import local_path, open_checkpoint

    source, target = local_path(options.dcp), Path(options.out)
    directory = find_dcp(source)
    if not options.plan:
        check_target(directory, target, overwrite=options.overwrite)
    own = (source / MANIFEST_NAME).is_file() and not options.model
    if not own and not options.model:
        raise ArgumentError(f"{source}: has no config of its own; name one with --model PATH_OR_ID.")
    settings: dict[str, Any] = {"dtype": options.dtype, "max_shard_bytes": options.max_shard_size}
    assets = read_assets(source / "assets") if own else fetch_assets(options.model, options.tokenizer)
    if options.plan:
        return _show(plan_export(directory, assets, **settings))
    settings |= {"overwrite": options.overwrite, "allow_nonfinite": options.allow_nonfinite}
    if own:
        export = convert_checkpoint(open_checkpoint(source), target, **settings)
    else:
        export = convert(directory, target, assets=assets, **settings)
    facts: dict[str, Any] = {"path": str(export.path), "architecture": export.architecture, "files": export.files}
    facts["rules"] = export.rules
    return Answer(facts, [f"{export.path}: {export.architecture}, {export.nbytes:,} bytes, from {directory}"])


def _show(plan: Plan) -> Answer:
    outputs = {o.name: {"dtype": o.dtype, "shape": o.shape, "source": o.source} for o in plan.outputs}
    facts: dict[str, Any] = {"architecture": plan.architecture, "bytes": plan.nbytes, "rules": plan.rules}
    facts["tensors"] = outputs
    facts["shards"] = {name: [o.name for o in shard] for name, shard in plan.shards.items()}
    head = f"{plan.architecture}: {len(outputs)} tensors, {plan.nbytes:,} bytes, {len(plan.shards)} files"
    names = [f"  {o['dtype']:10} {o['shape']!s:20} {name} from {o['source']}" for name, o in outputs.items()]
    return Answer(facts, [head, *(f"  rule: {rule}" for rule in plan.rules), *names])


def _publish(options: argparse.Namespace) -> Answer:
    from ckpt_core.hub import publish

    release = publish(
        options.export, options.repo_id, tag=options.tag, private=options.private, endpoint=options.endpoint
    )
    state = "published" if release.created else "was published already, unchanged"
    return Answer(asdict(release), [f"{release.repo_id} {release.tag} {state}: {release.url}"])


def _serve_hub(options: argparse.Namespace) -> None:
    """Serve until a signal comes; the answer is given when the server is ready."""
    from ckpt_core.testing.hub_server import HubServer, serve

    def ready(server: HubServer) -> None:
        facts = {"endpoint": server.endpoint, "directory": str(server.directory)}
        text = f"serving {server.directory} at {server.endpoint}; use it with HF_ENDPOINT={server.endpoint}"
        print(json.dumps(facts) if options.json else text, flush=True)  # noqa: T201 - the answer, before it blocks

    serve(options.directory, port=options.port, ready=ready)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ckpt", description="Look at, verify, convert and publish checkpoints.")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON object")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(
        under: Any, name: str, run: Callable[[argparse.Namespace], Answer | None], text: str
    ) -> argparse.ArgumentParser:
        command = under.add_parser(name, parents=[common], help=text, description=text)
        command.set_defaults(command=run)
        return command

    inspect = add(commands, "inspect", _inspect, "show what a checkpoint holds, from its metadata")
    inspect.add_argument("path")
    verify = add(commands, "verify", _verify, "check a step, any DCP directory, or an export")
    verify.add_argument("path")
    verify.add_argument("--allow-nonfinite", action="store_true", help="accept NaN and Inf")
    listing = add(commands, "list", _list, "list the committed steps of a store")
    listing.add_argument("store")
    prune = add(commands, "prune", _prune, "delete all but the newest steps of each run")
    prune.add_argument("store")
    prune.add_argument("--keep-last", type=int, required=True, metavar="K", help="how many steps stay")
    prune.add_argument("--run", help="only this run")
    _add_convert(add(commands, "convert", _convert, "make a Hugging Face directory of a DCP checkpoint"))
    publish = add(commands, "publish", _publish, "publish an export: one commit, read back, tagged")
    publish.add_argument("export")
    publish.add_argument("repo_id", metavar="REPO_ID")
    publish.add_argument("--tag", help="default: the next of v1, v2, ...")
    publish.add_argument("--private", action="store_true", help="create the repository as private")
    publish.add_argument("--endpoint", metavar="URL", help="default: HF_ENDPOINT, or huggingface.co")
    hub = commands.add_parser("hub", help="the local Hub server").add_subparsers(required=True, metavar="COMMAND")
    serve = add(hub, "serve", _serve_hub, "serve the repositories in a directory, as the Hub does")
    serve.add_argument("directory", nargs="?", default="runs/hub", metavar="DIR")
    serve.add_argument("--port", type=int, default=0, metavar="N", help="default: a free one")
    return parser


def _add_convert(convert: argparse.ArgumentParser) -> None:
    convert.add_argument("dcp", metavar="DCP", help="a committed step, or any DCP directory")
    convert.add_argument("out", metavar="OUT")
    convert.add_argument("--model", metavar="CONFIG", help="path or Hub id of the config; a step has its own")
    convert.add_argument("--tokenizer", metavar="T", help="path or Hub id; default: where the config is")
    convert.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="cast floating-point tensors")
    convert.add_argument("--max-shard-size", type=parse_size, default="5GB", metavar="5GB")
    convert.add_argument("--plan", action="store_true", help="print what would be written, and write nothing")
    convert.add_argument("--allow-nonfinite", action="store_true", help="accept NaN and Inf")
    convert.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")


if __name__ == "__main__":
    entry()
