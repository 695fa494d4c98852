"""`ckpt import`: from a Hugging Face directory to a DCP checkpoint, to start a run from."""

from __future__ import annotations

import argparse
from typing import Any

from ckpt_core.cli.bar import Bar
from ckpt_core.cli.command import Answer, Commands, parse_size, parse_workers


def add_commands(commands: Commands) -> None:
    """Add the command that makes checkpoints of what others exported."""
    importing = commands.add("import", _import, "make a DCP checkpoint of a Hugging Face directory")
    importing.add_argument("hf", metavar="HF", help="a directory with safetensors and config.json: a path or URL")
    importing.add_argument("out", metavar="OUT", help="the DCP directory to make; its config is in OUT/assets")
    importing.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="cast floating-point tensors")
    importing.add_argument("--max-file-size", type=parse_size, default="1GB", metavar="1GB")
    importing.add_argument("--names", metavar="FILE", help="a table of names to drop or rename, as JSON")
    importing.add_argument(
        "--workers", type=parse_workers, metavar="N", help="files written at once; default: one a core"
    )
    importing.add_argument("--allow-nonfinite", action="store_true", help="accept NaN and Inf")
    importing.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")


def _import(options: argparse.Namespace) -> Answer:
    from ckpt_core.export.imports import import_hf
    from ckpt_core.export.names import Table, read_table
    from ckpt_core.urls import local_path, place_of

    with Bar() as bar:
        made = import_hf(
            place_of(options.hf, "HF"),
            local_path(options.out, "OUT"),
            dtype=options.dtype,
            overwrite=options.overwrite,
            allow_nonfinite=options.allow_nonfinite,
            max_file_bytes=options.max_file_size,
            table=Table() if options.names is None else read_table(options.names),
            workers=options.workers,
            progress=bar.show,
        )
    facts: dict[str, Any] = {"path": str(made.path), "architecture": made.architecture, "tensors": made.tensors}
    facts |= {"bytes": made.nbytes, "rules": made.rules, **bar.seconds()}
    said = f"{made.path}: {made.architecture}, {made.tensors} tensors, {made.nbytes:,} bytes, from {options.hf}"
    return Answer(facts, [said, *(f"  rule: {rule}" for rule in made.rules)])
