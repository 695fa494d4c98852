"""The checks of an export of ours, and of any Hugging Face directory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from ckpt_core.errors import CkptError
from ckpt_core.export import EXPORT_NAME, Export, read_export
from ckpt_core.format.source import Source
from ckpt_core.hf_weights import INDEX_SUFFIX, HfWeights, read_weights
from ckpt_core.safetensors_header import StoredTensor
from ckpt_core.verify.code import code_check, is_config
from ckpt_core.verify.report import Check, Report
from ckpt_core.verify.scan import Extent, Reading, parts
from ckpt_core.verify.tree import read_tree
from ckpt_core.verify.work import Work

if TYPE_CHECKING:
    from ckpt_core.urls import Place

Chosen = Mapping[str, Mapping[str, StoredTensor]]
"""Tensors to verify, by the file that holds them."""


_DOCUMENTS = ("README.md", "LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE", "USE_POLICY.md")
"""Files that nothing loads, and that people add to an export."""


def huggingface_checks(place: Place, files: Mapping[str, Place], work: Work) -> tuple[list[Check], set[str]]:
    """Check a Hugging Face directory, or one of its files: structure, values, and that it brings no code.

    Args:
        place: the directory, or the file.
        files: what lies in the directory and below it, by its path there; empty for a file.
        work: what is asked for.

    Returns:
        The checks, and the files that were looked into.
    """
    weights = _weights(place, work)
    chosen = _choose(weights, work)
    work.read(_parts(weights, chosen, work))
    checks = _weights_checks(weights, chosen, work)
    if files:
        checks.append(code_check(files, work))
    named = {name for name in files if is_config(name) or name.endswith(INDEX_SUFFIX)}
    return checks, named | (set(weights.files) if weights else set())


def verify_export(place: Place, work: Work) -> Report:
    """Check an export of ours: its record, each file's sha256, structure, values, and that it brings no code."""
    files = read_tree(place).files
    export, weights = _record(place, files, work), _weights(place, work)
    chosen = _choose(weights, work)
    whole = export is not None and work.sample.everything
    work.read(_files(place, export, chosen, work) if export and whole else _parts(weights, chosen, work))
    checks = [work.findings.check("record", f"{len(export.files) if export else 0} files")]
    if export and whole:
        said = f"{len(export.files)} files, {export.nbytes:,} bytes as {EXPORT_NAME} says"
        bare = sum(record["sha256"] is None for record in export.files.values())
        said += f"; {bare} of them have no digest there" if bare else ""
        checks.append(work.findings.check("digests", said))
    checks += [*_weights_checks(weights, chosen, work), code_check(files, work)]
    added = tuple(name for name in files if name in _DOCUMENTS and export and name not in export.files)
    return Report(str(place), "export", tuple(checks), work.sample.said(), added)


def _record(place: Place, files: Mapping[str, Place], work: Work) -> Export | None:
    """Read what `export.json` says; a file that it does not name is wrong, as whoever loads the export may read it."""
    try:
        export = read_export(place)
    except (CkptError, OSError) as error:
        work.findings.add("record", str(error))
        return None
    for file in sorted(files):
        if file not in export.files and file not in (EXPORT_NAME, *_DOCUMENTS):
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
