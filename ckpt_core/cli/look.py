"""`ckpt inspect`, `ckpt verify` and `ckpt diff`: what is there, whether it is good, and how two of it differ."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ckpt_core.cli.bar import Bar
from ckpt_core.cli.command import Answer, Commands, parse_share

if TYPE_CHECKING:
    from ckpt_core.diff import TensorDiff
    from ckpt_core.summary import Summary


def add_commands(commands: Commands) -> None:
    """Add the commands that look at checkpoints and exports."""
    inspect = commands.add("inspect", _inspect, "show what a checkpoint or export holds, from its metadata")
    inspect.add_argument("path", help="a path or URL: a step, any DCP or Hugging Face directory, a safetensors file")
    verify = commands.add("verify", _verify, "check a step, any DCP directory, or any Hugging Face directory")
    verify.add_argument("path", help="a path or URL")
    verify.add_argument("--allow-nonfinite", action="store_true", help="accept NaN and Inf")
    verify.add_argument("--sample", type=parse_share, metavar="5%", help="read only this share of the chunks")
    verify.add_argument("--seed", type=int, default=0, metavar="N", help="which share; default: 0")
    diff = commands.add("diff", _diff, "compare two checkpoints or exports, tensor by tensor; exit 1 if they differ")
    diff.add_argument("a", metavar="A", help="a path or URL")
    diff.add_argument("b", metavar="B", help="a path or URL")


def _inspect(options: argparse.Namespace) -> Answer:
    from ckpt_core.summary import summarize

    summary = summarize(options.path)
    return Answer(summary.to_dict(), [*_head(summary), *_files(summary), *_tensors(summary), *_unsupported(summary)])


def _head(summary: Summary) -> list[str]:
    values = f", {len(summary.values)} values" if summary.values else ""
    lines = [f"{summary.kind} {summary.path}: {len(summary.tensors)} tensors, {summary.nbytes:,} bytes{values}"]
    if summary.manifest is not None:
        manifest = summary.manifest
        lines.append(f"run {manifest.run}, step {manifest.step}, {manifest.time}, {manifest.world_size} ranks")
        lines.append(f"digest {manifest.digest()}")
        facts = {**manifest.lineage, **{f"metric {name}": value for name, value in manifest.metrics.items()}}
        lines += [f"{name}: {value}" for name, value in facts.items()]
    if summary.export is not None:
        lines.append(f"{summary.export.architecture}, from {dict(summary.export.source)}")
        lines += [f"rule: {rule}" for rule in summary.export.rules]
    return lines


def _files(summary: Summary) -> list[str]:
    dtypes = [f"{name:14} {e['tensors']:>6} tensors {e['bytes']:>18,} bytes" for name, e in summary.dtypes.items()]
    return [*dtypes, *(f"  {size:>18,} bytes  {name}" for name, size in summary.files.items())]


def _tensors(summary: Summary) -> list[str]:
    return [f"  {t.dtype:10} {t.shape!s:20} {len(t.files):3} chunks  {name}" for name, t in summary.tensors.items()]


def _unsupported(summary: Summary) -> list[str]:
    return [f"  not read: {name}, {reason}" for name, reason in summary.unsupported.items()]


def _verify(options: argparse.Namespace) -> Answer:
    from ckpt_core.verify import verify

    with Bar() as bar:
        report = verify(
            options.path,
            allow_nonfinite=options.allow_nonfinite,
            sample=options.sample,
            seed=options.seed,
            progress=bar.show,
        )
    lines = [f"{report.kind} {report.path}", *([report.sample] if report.sample else [])]
    for check in report.checks:
        lines += [f"ok   {check.name}: {check.detail}"] if check.passed else []
        lines += [f"FAIL {check.name}: {problem}" for problem in check.problems]
    if report.unchecked:
        names, more = report.unchecked[:20], len(report.unchecked) - 20
        lines.append(f"not checked: {', '.join(names)}{f' and {more} more files' if more > 0 else ''}")
    return Answer(report.to_dict(), lines, report.passed)


def _diff(options: argparse.Namespace) -> Answer:
    from ckpt_core.diff import diff

    found = diff(options.a, options.b)
    lines = [_line(tensor) for tensor in found.tensors if tensor.status not in {"equal", "tied"}]
    said = ", ".join(f"{_SAID.get(status, status)}: {count}" for status, count in sorted(found.counts.items()))
    prefix = f" (names without {found.prefix!r})" if found.prefix else ""
    verdict = "equal" if found.equal else "different"
    return Answer(found.to_dict(), [*lines, f"{verdict}: tensors that are {said}{prefix}"], found.equal)


_SAID = {"differs": "different", "dtype": "of another type", "shape": "of another shape"}


def _line(tensor: TensorDiff) -> str:
    if tensor.a is None or tensor.b is None:
        return f"{tensor.status:10}  {tensor.name}"
    said = ""
    if tensor.a.shape != tensor.b.shape:
        said = f"  {tensor.a.shape} and {tensor.b.shape}"
    elif tensor.a.dtype != tensor.b.dtype:
        said = f"  {tensor.a.dtype} and {tensor.b.dtype}"
    if tensor.distance is not None:
        d = tensor.distance
        figures = f"largest difference {_figure(d.max_abs)}, relative {_figure(d.relative)}"
        said += f"  {d.differing:,} of {d.elements:,} elements, {d.nonfinite:,} of them NaN or Inf; {figures}"
    return f"{tensor.status:10}  {tensor.name}{said}"


def _figure(value: float | None) -> str:
    return "none" if value is None else f"{value:.3g}"
