"""One report for any checkpoint or export: what was checked, what passed, and why the rest did not."""

# safetensors and torch are only partly annotated.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ckpt_core import durable, locks
from ckpt_core.errors import CkptError, DamagedError
from ckpt_core.export import EXPORT_NAME, plan_export, read_export, sha256_of
from ckpt_core.export.assets import read_assets
from ckpt_core.format.index import Index, check_files, read_index
from ckpt_core.format.manifest import MANIFEST_NAME, record_file
from ckpt_core.locate import find_dcp
from ckpt_core.store import Checkpoint, local_path, open_checkpoint

_WEIGHTS = ".safetensors"


@dataclass(frozen=True)
class Check:
    """One thing that was checked."""

    name: str
    passed: bool
    detail: str
    """What was found; of a check that failed, the whole reason."""


@dataclass(frozen=True)
class Report:
    """All checks of one checkpoint or export."""

    path: str
    kind: str
    """`checkpoint` (a committed step), `dcp` (any DCP directory) or `export`."""

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Return the report in JSON types."""
        return {**asdict(self), "passed": self.passed}


def verify(url: str | Path, *, allow_nonfinite: bool = False) -> Report:
    """Check everything that can be checked about what lies at `url`; a failed check is in the report, not raised.

    A committed step: its manifest, each file's digest, structure, fit with its own config, and values. Any other DCP
    directory: structure, the CRC32 that torch stored with each chunk, and values. An export: each file's sha256,
    structure and values. Values are the model's: NaN and Inf fail, unless `allow_nonfinite`.

    Raises:
        NotACheckpointError: there is neither a checkpoint nor an export.
    """
    path = local_path(url)
    if (path / EXPORT_NAME).is_file():
        return _report(path, "export", _export_checks(path, allow_nonfinite=allow_nonfinite))
    if (path / MANIFEST_NAME).is_file():
        with locks.locked(path / MANIFEST_NAME, locks.SHARED):
            return _report(path, "checkpoint", _step_checks(path, allow_nonfinite=allow_nonfinite))
    directory = find_dcp(path)
    return _report(directory, "dcp", {"values": lambda: _dcp_values(directory, allow_nonfinite=allow_nonfinite)})


Checks = dict[str, Callable[[], str]]


def _report(path: Path, kind: str, checks: Checks) -> Report:
    return Report(str(path), kind, tuple(_run(name, check) for name, check in checks.items()))


def _run(name: str, check: Callable[[], str]) -> Check:
    try:
        return Check(name, passed=True, detail=check())
    except (CkptError, OSError) as error:
        return Check(name, passed=False, detail=str(error))


def _step_checks(path: Path, *, allow_nonfinite: bool) -> Checks:
    checks: Checks = {"digests": lambda: _digests(open_checkpoint(path))}
    if (path / "model").is_dir():
        checks["values"] = lambda: _dcp_values(path / "model", allow_nonfinite=allow_nonfinite)
        if (path / "assets" / "config.json").is_file():
            checks["architecture"] = lambda: _fit(path)
    return checks


def _digests(checkpoint: Checkpoint) -> str:
    unlisted = {name for name, _ in durable.files_below(checkpoint.path)} - {MANIFEST_NAME, *checkpoint.manifest.files}
    if unlisted:
        raise DamagedError(
            f"{checkpoint.path / min(unlisted)}: not in the manifest; a committed step never changes: delete the file."
        )
    for name, expected in checkpoint.manifest.files.items():
        found = record_file(checkpoint.path / name)
        if found != expected:
            raise DamagedError(
                f"{checkpoint.path / name}: {found.digest}, the manifest says {expected.digest}; delete the step "
                "or restore a copy."
            )
    return f"{len(checkpoint.manifest.files)} files, {checkpoint.manifest.nbytes:,} bytes as the manifest says"


def _fit(path: Path) -> str:
    plan = plan_export(path / "model", read_assets(path / "assets", trust_remote_code=True))
    return f"{len(plan.outputs)} tensors, all that {plan.architecture} expects and nothing else"


def _dcp_values(directory: Path, *, allow_nonfinite: bool) -> str:
    """Read every chunk whole, which checks its structure and CRC32, and look for NaN and Inf; read every value."""
    from ckpt_core.io.chunks import open_shard
    from ckpt_core.io.reader import load_value

    index = read_index(directory)
    check_files(directory, index)
    unchecked = 0
    for where, tensor, crc32 in _chunks(directory, index):
        unchecked += crc32 == 0
        if not allow_nonfinite:
            _check_finite(tensor, where)
    for name, span in index.values.items():
        with open_shard(directory / span.file) as file:
            load_value(file, span, f"{directory / span.file}: {name}")
    elements = sum(math.prod(entry.shape) for entry in index.tensors.values())
    note = f"; {unchecked} chunks had no CRC32 and are unchecked" if unchecked else ""
    return f"{len(index.tensors)} tensors, {elements:,} elements, {_finite_said(allow_nonfinite)}{note}"


def _chunks(directory: Path, index: Index) -> Iterator[tuple[str, Any, int]]:
    import torch

    from ckpt_core.io.chunks import locate_chunk, open_shard, read_box

    for name, entry in index.tensors.items():
        for chunk in entry.chunks:
            where = f"{directory / chunk.span.file}: {name}"
            with open_shard(directory / chunk.span.file) as file:
                payload = locate_chunk(file, chunk.span, entry.dtype, chunk.sizes, where)
                tensor = torch.empty(chunk.sizes, dtype=getattr(torch, entry.dtype))
                read_box(file, payload, tensor, (0,) * tensor.dim(), where)
            yield where, tensor, payload.crc32 or int(payload.nbytes == 0)


def _check_finite(tensor: Any, where: str) -> None:
    import torch

    if not (tensor.is_floating_point() or tensor.is_complex()):
        return
    wide = tensor.float() if tensor.itemsize == 1 else tensor  # torch has no isfinite for most 8-bit types
    if not bool(torch.isfinite(wide).all()):
        raise DamagedError(f"{where}: holds NaN or Inf; the training diverged. Go back to an earlier step.")


def _finite_said(allow_nonfinite: bool) -> str:
    return "NaN and Inf allowed" if allow_nonfinite else "none NaN or Inf"


def _export_checks(path: Path, *, allow_nonfinite: bool) -> Checks:
    return {
        "digests": lambda: _export_digests(path),
        "values": lambda: _export_values(path, allow_nonfinite=allow_nonfinite),
    }


def _export_digests(path: Path) -> str:
    export = read_export(path)
    for name, record in export.files.items():
        found = sha256_of(path / name)
        if found != record["sha256"]:
            raise DamagedError(f"{path / name}: sha256 {found}, {EXPORT_NAME} says {record['sha256']}; convert again.")
    return f"{len(export.files)} files, {export.nbytes:,} bytes as {EXPORT_NAME} says"


def _export_values(path: Path, *, allow_nonfinite: bool) -> str:
    from safetensors import SafetensorError, safe_open

    weights = {name for name in read_export(path).files if name.endswith(_WEIGHTS)}
    unlisted = {file.name for file in path.glob(f"*{_WEIGHTS}")} - weights
    if unlisted:
        raise DamagedError(f"{path / min(unlisted)}: not in {EXPORT_NAME}; delete the file, or convert again.")
    count = 0
    for file in (path / name for name in sorted(weights)):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - not a mapping
                    tensor = tensors.get_tensor(name)
                    count += 1
                    if not allow_nonfinite:
                        _check_finite(tensor, f"{file}: {name}")
        except SafetensorError as error:
            raise DamagedError(f"{file}: not safetensors ({error}); convert again.") from None
    return f"{count} tensors, {_finite_said(allow_nonfinite)}"
