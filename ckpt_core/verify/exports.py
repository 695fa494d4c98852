"""The checks of an export of ours, and of any Hugging Face directory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from ckpt_core.errors import CkptError
from ckpt_core.export import EXPORT_NAME, Export, read_export
from ckpt_core.format.source import Source
from ckpt_core.hf_weights import SUFFIX, HfWeights, read_weights
from ckpt_core.safetensors_header import StoredTensor
from ckpt_core.verify.code import code_check
from ckpt_core.verify.report import Check, Report
from ckpt_core.verify.scan import Extent, Reading, parts
from ckpt_core.verify.work import Work

if TYPE_CHECKING:
    from ckpt_core.urls import Place

Chosen = Mapping[str, Mapping[str, StoredTensor]]
"""Tensors to verify, by the file that holds them."""


def verify_huggingface(place: Place, work: Work) -> Report:
    """Check any Hugging Face directory, or one of its files: structure, values, and that it brings no code."""
    weights = _weights(place, work)
    chosen = _choose(weights, work)
    work.read(_parts(weights, chosen, work))
    checks = _weights_checks(weights, chosen, work)
    if place.is_dir():  # one file may be named by itself
        checks.append(code_check(place, work))
    return Report(str(place), "huggingface", tuple(checks), work.sample.said())


def verify_export(place: Place, work: Work) -> Report:
    """Check an export of ours: its record, each file's sha256, structure, values, and that it brings no code."""
    export, weights = _record(place, work), _weights(place, work)
    chosen = _choose(weights, work)
    whole = export is not None and work.sample.everything
    work.read(_files(place, export, chosen, work) if export and whole else _parts(weights, chosen, work))
    checks = [work.findings.check("record", f"{len(export.files) if export else 0} files")]
    if export and whole:
        said = f"{len(export.files)} files, {export.nbytes:,} bytes as {EXPORT_NAME} says"
        bare = sum(record["sha256"] is None for record in export.files.values())
        said += f"; {bare} of them have no digest there" if bare else ""
        checks.append(work.findings.check("digests", said))
    checks += [*_weights_checks(weights, chosen, work), code_check(place, work)]
    return Report(str(place), "export", tuple(checks), work.sample.said())


def _record(place: Place, work: Work) -> Export | None:
    """Read what `export.json` says; weights that it does not name are wrong, as `from_pretrained` might load them."""
    try:
        export = read_export(place)
    except (CkptError, OSError) as error:
        work.findings.add("record", str(error))
        return None
    for file in sorted(entry.name for entry in place.iterdir()):
        if file.endswith(SUFFIX) and file not in export.files:
            work.findings.add("record", f"{place / file}: not in {EXPORT_NAME}; delete the file, or convert again.")
    return export


def _weights(place: Place, work: Work) -> HfWeights | None:
    try:
        return read_weights(place)
    except (CkptError, OSError) as error:
        work.findings.add("structure", str(error))
        return None


def _choose(weights: HfWeights | None, work: Work) -> Chosen:
    files: Chosen = weights.files if weights else {}
    chosen: dict[str, dict[str, StoredTensor]] = {}
    for file, name in work.sample.choose([(file, name) for file, tensors in files.items() for name in tensors]):
        chosen.setdefault(file, {})[name] = files[file][name]
    return chosen


def _files(place: Place, export: Export, chosen: Chosen, work: Work) -> list[Reading]:
    """Return what to read of an export with its digests: each file whole, the largest first."""
    readings = [
        Reading(
            place / name,
            record["bytes"],
            partial(
                _given, [_extent(tensor, tensor_name, work) for tensor_name, tensor in chosen.get(name, {}).items()]
            ),
            f"sha256:{record['sha256']}" if record["sha256"] else None,
            EXPORT_NAME,
        )
        for name, record in export.files.items()
    ]
    return sorted(readings, key=lambda reading: -reading.nbytes)


def _parts(weights: HfWeights | None, chosen: Chosen, work: Work) -> list[Reading]:
    """Return what to read where there is no digest: tensors, in parts, if their values matter."""
    if weights is None or not work.finite:
        return []
    return [
        Reading(weights.place / file, part.length, partial(_given, [part]))
        for file, tensors in chosen.items()
        for name, tensor in tensors.items()
        for part in parts(_extent(tensor, name, work))
    ]


def _given(extents: Sequence[Extent], _: Source) -> Sequence[Extent]:
    return extents


def _extent(tensor: StoredTensor, name: str, work: Work) -> Extent:
    return Extent(tensor.offset, tensor.nbytes, name, tensor.dtype if work.finite else None)


def _weights_checks(weights: HfWeights | None, chosen: Chosen, work: Work) -> list[Check]:
    if weights is None:
        return [work.structure_check("")]
    elements = sum(math.prod(tensor.shape) for tensors in chosen.values() for tensor in tensors.values())
    said = f"{len(weights.tensors)} tensors, {weights.nbytes:,} bytes in {len(weights.files)} files"
    structure = work.structure_check(said)
    return [structure, work.values_check(elements)]
