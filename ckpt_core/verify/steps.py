"""The checks of a committed step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from ckpt_core import documents, durable
from ckpt_core.errors import CkptError
from ckpt_core.export import plan_export
from ckpt_core.export.assets import read_assets
from ckpt_core.export.carried import CONFIG_NAME
from ckpt_core.format.index import is_dcp
from ckpt_core.format.manifest import MANIFEST_NAME, Manifest
from ckpt_core.format.source import Source
from ckpt_core.generators import read_generators
from ckpt_core.hf_weights import SUFFIX
from ckpt_core.store import open_checkpoint
from ckpt_core.verify.dcp import DcpContents, dcp_checks, read_contents
from ckpt_core.verify.report import Check, Report, run
from ckpt_core.verify.scan import Extent, Reading
from ckpt_core.verify.work import Work

if TYPE_CHECKING:
    from ckpt_core.urls import Place

MODEL = "model"
_MAX_STATE_BYTES = 1 << 26


def verify_step(place: Place, work: Work) -> Report:
    """Check a committed step, which no pruner deletes meanwhile: manifest, digests, and each component."""
    try:
        checkpoint = open_checkpoint(place)
    except (CkptError, OSError) as error:
        work.findings.add("manifest", str(error))
        checks = _step_checks(place, None, work)
    else:
        with checkpoint.lease():
            checks = _step_checks(checkpoint.root, checkpoint.manifest, work)
    return Report(str(place), "checkpoint", tuple(checks), work.sample.said())


def _step_checks(root: Place, manifest: Manifest | None, work: Work) -> list[Check]:
    contents = _components(root, work)
    if manifest is None:
        detail = ""
        readings = [reading for each in contents.values() for reading in each.readings()]
    else:
        detail = f"{len(manifest.files)} files, {manifest.nbytes:,} bytes"
        _check_unlisted(root, manifest, work)
        readings = _readings(root, manifest, contents, work)
    work.read(readings)
    counted = _check_trainer(root, work)
    checks = [work.findings.check("manifest", detail)]
    if any(reading.digest for reading in readings):
        checks.append(work.findings.check("digests", f"{len(readings)} files as the manifest says"))
    checks += dcp_checks(contents, work, {MODEL})
    if counted or work.findings.problems["trainer"]:
        checks.append(work.findings.check("trainer", f"{counted} files of counters and generators"))
    if (root / MODEL).is_dir() and (root / "assets" / CONFIG_NAME).is_file():
        checks.append(run("architecture", lambda: _fit(root)))
    return checks


def _check_trainer(root: Place, work: Work) -> int:
    """Check the counters and each rank's generators as a restore does; return how many files there are."""
    directory = root / "trainer"
    files = sorted(directory.iterdir(), key=lambda file: file.name) if directory.is_dir() else []
    for file in files:
        try:
            if file.name.endswith(SUFFIX):
                read_generators(file)
            elif file.name.endswith(".json"):
                documents.read_object(file, _MAX_STATE_BYTES)
        except (CkptError, OSError, ValueError) as error:
            work.findings.add("trainer", f"{file}: not readable ({error}); load an older step.")
    return len(files)


def _components(root: Place, work: Work) -> dict[str, DcpContents]:
    """Return what the step's DCP directories hold; NaN and Inf are wrong in the model's."""
    found: dict[str, DcpContents] = {}
    for directory in sorted(root.iterdir(), key=lambda entry: entry.name):
        if is_dcp(directory):
            finite = work.finite and directory.name == MODEL
            contents = read_contents(directory, work.findings, finite=finite, choose=work.sample.choose)
            found |= {directory.name: contents} if contents else {}
    return found


def _check_unlisted(root: Place, manifest: Manifest, work: Work) -> None:
    for name, place in durable.files_below(root):
        if name not in {MANIFEST_NAME, *manifest.files}:
            work.findings.add(
                "manifest", f"{place}: not in the manifest; a committed step never changes: delete the file."
            )


def _readings(root: Place, manifest: Manifest, contents: Mapping[str, DcpContents], work: Work) -> list[Reading]:
    """Return what to read: each file that the manifest names, whole and the largest first; of a sample, chunks."""
    if not work.sample.everything:
        return [reading for each in contents.values() for reading in each.readings()]
    extents = {
        f"{component}/{file}": partial(each.extents, items)
        for component, each in contents.items()
        for file, items in each.by_file().items()
    }
    readings = [
        Reading(root / name, record.bytes, extents.get(name, _nothing), record.digest, "the manifest")
        for name, record in manifest.files.items()
    ]
    return sorted(readings, key=lambda reading: -reading.nbytes)


def _nothing(_: Source) -> Sequence[Extent]:
    """Return the extents of a file that is no DCP file."""
    return ()


def _fit(root: Place) -> str:
    place: Any = root  # both read any place
    plan = plan_export(place / MODEL, read_assets(place / "assets", trust_remote_code=True))
    return f"{len(plan.outputs)} tensors, all that {plan.architecture} expects and nothing else"
