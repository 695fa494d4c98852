"""`ckpt convert`: from a checkpoint to a Hugging Face directory."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckpt_core.cli.bar import Bar
from ckpt_core.cli.command import Answer, Commands, parse_size, parse_workers
from ckpt_core.errors import ArgumentError
from ckpt_core.workers import count_workers, share_heap

if TYPE_CHECKING:
    from ckpt_core.export import Assets
    from ckpt_core.export.conversion import Settings
    from ckpt_core.export.plan import Output, Plan
    from ckpt_core.urls import Place


def add_commands(commands: Commands) -> None:
    """Add the command that makes exports."""
    _add_convert(commands.add("convert", _convert, "make a Hugging Face directory of a DCP checkpoint"))


def _add_convert(convert: argparse.ArgumentParser) -> None:
    convert.add_argument("dcp", metavar="DCP", help="a committed step, or any DCP directory")
    convert.add_argument("out", metavar="OUT", help="the directory to make, or a URL, such as s3://BUCKET/NAME")
    convert.add_argument("--model", metavar="CONFIG", help="path or Hub id of the config; a step has its own")
    convert.add_argument("--tokenizer", metavar="T", help="path or Hub id; default: where the config is")
    convert.add_argument("--adapter", metavar="DIR", help="where adapter_config.json is, of a run with LoRA (PEFT)")
    convert.add_argument("--merge-adapter", action="store_true", help="add a LoRA adapter to the model's weights")
    convert.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="cast floating-point tensors")
    convert.add_argument("--max-shard-size", type=parse_size, default="5GB", metavar="5GB")
    convert.add_argument("--plan", action="store_true", help="print what would be written, and write nothing")
    convert.add_argument("--names", metavar="FILE", help="a table of names to drop or rename, as JSON")
    convert.add_argument(
        "--workers", type=parse_workers, metavar="N", help="files written at once; default: one a core"
    )
    convert.add_argument(
        "--no-digest",
        dest="digest",
        action="store_false",
        help="look at no byte: no sha256, no CRC32, no search for NaN; unchanged bytes are copied by the kernel",
    )
    convert.add_argument("--allow-nonfinite", action="store_true", help="accept NaN and Inf")
    convert.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")


def _convert(options: argparse.Namespace) -> Answer:
    from ckpt_core.durable import file_size
    from ckpt_core.export import check_target, convert, convert_checkpoint, plan_export
    from ckpt_core.export.names import Table, read_table
    from ckpt_core.format.manifest import MANIFEST_NAME
    from ckpt_core.locate import find_dcp
    from ckpt_core.store import open_checkpoint
    from ckpt_core.urls import place_of, writable_place

    source, target = place_of(options.dcp, "DCP"), writable_place(options.out, "OUT")
    step = open_checkpoint(source) if file_size(source / MANIFEST_NAME) is not None else None
    directory = find_dcp(step.root if step else source)
    if not options.plan:
        check_target(directory, target, overwrite=options.overwrite)
    beside = step.component("assets") if step else directory / "assets"  # where `ckpt import` puts them
    configs = [beside / name for name in ("config.json", "adapter_config.json")] if beside else []
    own = beside if options.model is None and any(file_size(each) is not None for each in configs) else None
    assets = _assets(options, own, source)
    names = Table() if options.names is None else read_table(options.names)
    settings: Settings = {"dtype": options.dtype, "max_shard_bytes": options.max_shard_size, "table": names}
    settings["merge_adapter"] = options.merge_adapter
    if options.plan:
        began = time.perf_counter()
        plan = plan_export(
            directory,
            assets,
            dtype=options.dtype,
            max_shard_bytes=options.max_shard_size,
            table=names,
            merge_adapter=options.merge_adapter,
        )
        return _show(plan, began)
    settings["overwrite"], settings["allow_nonfinite"] = options.overwrite, options.allow_nonfinite
    settings["digest"], settings["workers"] = options.digest, options.workers
    share_heap()
    with Bar() as bar:
        settings["progress"] = bar.show
        if step:
            export = convert_checkpoint(step, target, assets=assets, **settings)
        else:
            export = convert(directory, target, assets=assets, **settings)
    facts: dict[str, Any] = {"path": str(export.path), "architecture": export.architecture, "files": export.files}
    facts |= {"rules": export.rules, **bar.seconds()}
    said = f"{export.path}: {export.architecture}, {export.nbytes:,} bytes, from {directory}"
    return Answer(facts, [said, *(f"  rule: {rule}" for rule in export.rules)])


def _assets(options: argparse.Namespace, own: Place | None, source: Place) -> Assets:
    """Return the model's config, the tokenizer, and the config of an adapter, which needs no config of the model."""
    from ckpt_core.export.adapter_config import adapter_assets, find_adapter_config, with_adapter_config
    from ckpt_core.export.assets import fetch_assets, read_assets
    from ckpt_core.urls import name_or_path, place_of

    named = None if options.model is None else name_or_path(options.model, "--model")
    tokenizer = None if options.tokenizer is None else name_or_path(options.tokenizer, "--tokenizer")
    model = place_of(named) if named and Path(named).is_dir() else own
    adapter = find_adapter_config(model) if options.adapter is None else place_of(options.adapter, "--adapter")
    if adapter and not options.merge_adapter:
        others = [model, place_of(tokenizer) if tokenizer else None]
        return adapter_assets(adapter, [place for place in others if place])
    if not own and not named:
        raise ArgumentError(
            f"{source}: has no config of its own; name one with --model PATH_OR_ID, or that of a LoRA adapter with "
            "--adapter DIR."
        )
    assets = read_assets(own) if own and not tokenizer else fetch_assets(named or str(own), tokenizer)
    return with_adapter_config(assets, adapter) if adapter else assets


def _show(plan: Plan, began: float) -> Answer:
    from ckpt_core.export.stream import BLOCK_BYTES

    outputs = {o.name: _facts(o) for o in plan.outputs}
    reads = sum(entry.nbytes for entry in plan.tensors.values())
    facts: dict[str, Any] = {
        "architecture": plan.architecture,
        "bytes": plan.nbytes,
        "reads_bytes": reads,
        "peak_bytes": 3 * BLOCK_BYTES * min(count_workers(), len(plan.shards)),  # read, cast, and looked at
        "rules": plan.rules,
        "ties": [[tie.source, tie.kept] for tie in plan.ties],
        "tensors": outputs,
        "shards": {name: [o.name for o in shard] for name, shard in plan.shards.items()},
        "shards_bytes": {name: sum(o.nbytes for o in shard) for name, shard in plan.shards.items()},
        "plan_s": time.perf_counter() - began,
    }
    peak = f"about {facts['peak_bytes'] / 1e6:.0f} MB of buffers"
    lines = [
        f"{plan.architecture}: {len(outputs)} tensors, {reads:,} bytes to read, {plan.nbytes:,} to write, {peak}",
        *(f"  rule: {rule}" for rule in plan.rules),
    ]
    for name, shard in plan.shards.items():
        lines.append(f"{name}: {len(shard)} tensors, {sum(o.nbytes for o in shard):,} bytes")
        lines += [_line(output) for output in shard]
    return Answer(facts, lines)


def _facts(output: Output) -> dict[str, Any]:
    facts: dict[str, Any] = {"dtype": output.dtype, "shape": output.shape, "how": output.recipe.kind}
    facts["sources"] = list(output.recipe.sources)
    facts |= {"merges": [output.update.a, output.update.b], "scaling": output.update.scaling} if output.update else {}
    return facts | ({"cast_from": output.stored} if output.casts else {})


def _line(output: Output) -> str:
    how = output.recipe.kind + (", merged" if output.update else "")
    how += f", cast from {output.stored}" if output.casts else ""
    sources = ", ".join(output.sources[:3]) + (", ..." if output.sources[3:] else "")
    return f"  {output.dtype:10} {output.shape!s:20} {output.name}: {how} from {sources}"
