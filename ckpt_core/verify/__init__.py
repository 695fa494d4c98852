"""One report for any checkpoint or export: what was checked, what passed, and why the rest did not.

Every byte is read once, whatever is asked of it, and several files at once; see `scan`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckpt_core.durable import file_size
from ckpt_core.export import EXPORT_NAME
from ckpt_core.format.manifest import MANIFEST_NAME
from ckpt_core.urls import place_of
from ckpt_core.verify.directories import verify_directory
from ckpt_core.verify.exports import verify_export
from ckpt_core.verify.report import Check, Report
from ckpt_core.verify.scan import Progress
from ckpt_core.verify.steps import verify_step
from ckpt_core.verify.work import Sample, Work

if TYPE_CHECKING:
    from ckpt_core.urls import Place

__all__ = ["Check", "Progress", "Report", "verify"]


def verify(
    url: str | Place,
    *,
    allow_nonfinite: bool = False,
    sample: float | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Report:
    """Check everything that can be checked about what lies at `url`; a failed check is in the report, not raised.

    A committed step: its manifest, each file's digest, the structure and the CRC32 of each chunk of every component,
    the model's values, and its fit with its own config. Every other DCP directory at or below it: structure, the CRC32
    that torch stored with each chunk, values. An export: each file's sha256, structure and values. Any other Hugging
    Face directory, or one safetensors file: structure and values. Of both, also that they bring no Python code. A chunk
    that was stored without CRC32 is counted as unchecked, and files that were not looked into are named.

    Args:
        url: a path or URL.
        allow_nonfinite: accept NaN and Inf.
        sample: the share of chunks to read, such as 0.05; then no digest of a whole file is checked.
        seed: which ones; the same for the same seed.
        progress: is told the bytes read so far, and those to read in all; by one thread at a time.

    Raises:
        NotACheckpointError: there is neither a checkpoint nor an export.
        ArgumentError: `sample` is not above 0 and at most 1.
    """
    place = place_of(url, "path")
    work = Work(Sample(sample, seed), finite=not allow_nonfinite, progress=progress)
    if file_size(place / EXPORT_NAME) is not None:
        return verify_export(place, work)
    if file_size(place / MANIFEST_NAME) is not None:
        return verify_step(place, work)
    return verify_directory(place, work)
