"""What a checkpoint or export holds, from its metadata and headers alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from ckpt_core.durable import file_size
from ckpt_core.errors import NotACheckpointError
from ckpt_core.export import EXPORT_NAME, Export, read_export
from ckpt_core.format.index import metadata_files
from ckpt_core.format.manifest import MANIFEST_NAME, Manifest
from ckpt_core.store import open_checkpoint
from ckpt_core.tensors import DcpTensors, StoredTensors, TensorFacts, open_tensors
from ckpt_core.urls import place_of

if TYPE_CHECKING:
    from ckpt_core.urls import AnyPath, Place


@dataclass(frozen=True)
class Summary:
    """What lies at a place."""

    path: str
    """The directory that holds the tensors."""

    kind: str
    """`checkpoint` (a committed step), `dcp`, `export` (one of ours) or `huggingface`."""

    tensors: Mapping[str, TensorFacts]
    """Of a step, the model's."""

    values: tuple[str, ...]
    """Names of what a DCP directory holds besides tensors."""

    files: Mapping[str, int]
    """Size of each file in bytes: of a step, every component's."""

    manifest: Manifest | None = None
    export: Export | None = None
    unsupported: Mapping[str, str] = field(default_factory=dict[str, str])
    """What a DCP directory holds in a form that this library does not read, and which form that is."""

    @property
    def nbytes(self) -> int:
        """Size of the tensors in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def dtypes(self) -> dict[str, dict[str, int]]:
        """Return how many tensors there are of each element type, and their bytes."""
        found: dict[str, dict[str, int]] = {}
        for tensor in self.tensors.values():
            entry = found.setdefault(tensor.dtype, {"tensors": 0, "bytes": 0})
            entry["tensors"] += 1
            entry["bytes"] += tensor.nbytes
        return dict(sorted(found.items()))

    def to_dict(self) -> dict[str, Any]:
        """Return it in JSON types."""
        facts: dict[str, Any] = {"path": self.path, "kind": self.kind, "bytes": self.nbytes, "dtypes": self.dtypes}
        facts["files"] = dict(self.files)
        if self.manifest is not None:
            facts["manifest"] = {**asdict(self.manifest), "digest": self.manifest.digest()}
        if self.export is not None:
            facts["export"] = {
                "architecture": self.export.architecture,
                "source": dict(self.export.source),
                "rules": list(self.export.rules),
            }
        facts["values"] = list(self.values)
        facts["unsupported"] = dict(self.unsupported)
        facts["tensors"] = {
            name: {"dtype": t.dtype, "shape": t.shape, "chunks": len(t.files), "bytes": t.nbytes}
            for name, t in self.tensors.items()
        }
        return facts


def summarize(url: AnyPath) -> Summary:
    """Return what lies at `url`: a step, any DCP directory, any Hugging Face directory, or a safetensors file.

    Raises:
        NotACheckpointError: it is none of them.
        CheckpointError: it is damaged or hostile.
    """
    place = place_of(url, "path")
    if file_size(place / MANIFEST_NAME) is not None:
        return _step(place)
    with open_tensors(place) as tensors:
        if isinstance(tensors, DcpTensors):
            names = {*(file.name for file in metadata_files(tensors.place))}
            names |= {span.file for span in tensors.index.spans()}
            return Summary(
                str(tensors.place),
                "dcp",
                tensors.facts,
                tuple(tensors.index.values),
                _sizes(tensors.place, names),
                unsupported=_unsupported(tensors),
            )
        export = None
        if file_size(place / EXPORT_NAME) is not None:
            export = read_export(place)
        names = [entry.name for entry in tensors.place.iterdir()] if place == tensors.place else [place.name]
        kind = "export" if export else "huggingface"
        return Summary(str(place), kind, tensors.facts, (), _sizes(tensors.place, names), export=export)


def _step(place: Place) -> Summary:
    checkpoint = open_checkpoint(place)
    files = {name: record.bytes for name, record in checkpoint.manifest.files.items()}
    try:
        with open_tensors(checkpoint.root) as model:
            values = tuple(model.index.values) if isinstance(model, DcpTensors) else ()
            return Summary(
                str(model.place),
                "checkpoint",
                model.facts,
                values,
                files,
                checkpoint.manifest,
                unsupported=_unsupported(model),
            )
    except NotACheckpointError:  # a step may be of an optimizer, or of hyperparameters, alone
        return Summary(str(checkpoint.root), "checkpoint", {}, (), files, checkpoint.manifest)


def _unsupported(tensors: StoredTensors) -> dict[str, str]:
    if not isinstance(tensors, DcpTensors):
        return {}
    return {name: unread.reason for name, unread in tensors.index.unsupported.items()}


def _sizes(directory: Place, names: Iterable[str]) -> dict[str, int]:
    found = {name: file_size(directory / name) for name in sorted(names)}
    return {name: size for name, size in found.items() if size is not None}
