"""`ckpt inspect` and `ckpt verify`: what is there, and whether it is good."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from ckpt_core.cli.command import Answer, Commands


def add_commands(commands: Commands) -> None:
    """Add the commands that look at one checkpoint."""
    inspect = commands.add("inspect", _inspect, "show what a checkpoint holds, from its metadata")
    inspect.add_argument("path")
    verify = commands.add("verify", _verify, "check a step, any DCP directory, or an export")
    verify.add_argument("path")
    verify.add_argument("--allow-nonfinite", action="store_true", help="accept NaN and Inf")


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
