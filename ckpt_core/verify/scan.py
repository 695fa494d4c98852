"""One pass over a file: each block is read once, and all that is asked of it done while the cache has it.

A block goes into the digest of the whole file, into the CRC32 of the chunk that it belongs to, and is searched for NaN
and Inf. Several files, or parts of one, are read at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

from ckpt_core.errors import CkptError
from ckpt_core.format.digests import Hasher, algorithm_of, crc32, hasher
from ckpt_core.format.source import Source, open_source, read_into
from ckpt_core.values import first_nonfinite
from ckpt_core.verify.bounds import untrained_tensors
from ckpt_core.verify.report import Findings
from ckpt_core.workers import count_workers

if TYPE_CHECKING:
    from ckpt_core.urls import Place

PART_BYTES = 32 << 20
"""What is given to a thread at a time, where a file may be read in parts."""

Progress = Callable[[int, int], None]
"""Is told the bytes that were read so far, and those to read in all; by one thread at a time."""


@dataclass(frozen=True, slots=True)
class Extent:
    """A range of a file: the elements of a chunk, or a part of them, or what lies between chunks."""

    offset: int
    length: int
    name: str = ""
    """The tensor."""

    dtype: str | None = None
    """Element type by torch's name, if the elements have to be finite."""

    crc32: int = 0
    """The CRC32 that was stored with them; 0 for none."""


@dataclass(frozen=True)
class Reading:
    """What one thread does at a time: it reads a file, or a part of one."""

    place: Place
    nbytes: int
    extents: Callable[[Source], Sequence[Extent]]
    """What lies where, in order; may have to look into the file."""

    digest: str | None = None
    """The digest of the file, which is then read whole, all `nbytes` of it."""

    recorded_in: str = ""
    """What says so."""


class Scan:
    """A pass over files."""

    def __init__(self, findings: Findings, progress: Progress | None = None) -> None:
        self._findings = findings
        self._progress = progress
        self._lock = Lock()
        self._done = self._total = 0
        self._stopped = False
        self._untrained: dict[Place, frozenset[str]] = {}

    def run(self, readings: Sequence[Reading]) -> None:
        """Read; problems become findings."""
        self._total = sum(reading.nbytes for reading in readings)
        remote = any(not isinstance(reading.place, Path) for reading in readings)
        with ThreadPoolExecutor(count_workers(remote=remote), "ckpt-verify") as pool:
            futures = [pool.submit(self._read, reading) for reading in readings]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:  # an interrupt, or an error of who is told of the progress, waits for no large file
                self._stopped = True
                pool.shutdown(cancel_futures=True)
                raise

    def _read(self, reading: Reading) -> None:
        try:
            with open_source(reading.place) as source:
                self._pass(source, reading)
        except (CkptError, OSError) as error:
            self._findings.add("structure" if reading.digest is None else "digests", str(error))

    def _pass(self, source: Source, reading: Reading) -> None:
        extents, digest = list(reading.extents(source)), None
        if reading.digest is not None:
            digest = hasher(algorithm_of(reading.digest))
            extents = list(_without_gaps(extents, reading.nbytes))
        memory: Any = np.empty(min(source.block_bytes, max(1, reading.nbytes)), np.uint8)
        buffer = memoryview(memory)
        for extent in extents:
            self._pass_extent(source, reading.place, extent, digest, buffer)
        self._advance(reading.nbytes - sum(extent.length for extent in extents))
        if digest is not None:
            found = f"{algorithm_of(reading.digest or '')}:{digest.hexdigest()}"
            if found != reading.digest:
                self._findings.add(
                    "digests",
                    f"{reading.place}: {found}, {reading.recorded_in} says {reading.digest}; restore a copy, or make "
                    "it again.",
                )

    def _pass_extent(
        self, source: Source, place: Place, extent: Extent, digest: Hasher | None, buffer: memoryview
    ) -> None:
        """Read an extent block by block from the buffer's begin on, so that elements are aligned there."""
        found, wrong, infinite = 0, None, True
        for start in range(0, extent.length, len(buffer)):
            if self._stopped:
                return
            block = buffer[: extent.length - start]
            read_into(source, extent.offset + start, block, f"{place}: {extent.name}")
            if digest is not None:
                digest.update(block)
            if extent.crc32:
                found = crc32(block, found)
            if extent.dtype is not None and infinite and first_nonfinite(block, extent.dtype) is not None:
                wrong = extent.offset + start
                infinite = first_nonfinite(block, extent.dtype, only_nan=True) is None
            self._advance(len(block))
        if found != extent.crc32:
            self._findings.add(
                "crc32",
                f"{place}: {extent.name}: its bytes have CRC32 {found:08x}, {extent.crc32:08x} was stored with them; "
                "restore a copy of the file or load an older step.",
            )
        if wrong is not None and infinite and self._may_be_infinite(place, extent.name):
            self._findings.count("infinite")
        elif wrong is not None:
            self._findings.add("values", nonfinite(f"{place}: {extent.name}"))

    def _may_be_infinite(self, place: Place, name: str) -> bool:
        """Whether a tensor of a file is a mask or a bound; only where one is infinite this is looked up."""
        with self._lock:
            if place.parent not in self._untrained:
                self._untrained[place.parent] = untrained_tensors(place.parent)
            return name in self._untrained[place.parent]

    def _advance(self, count: int) -> None:
        if self._progress is not None:
            with self._lock:
                self._done += count
                self._progress(self._done, self._total)


def nonfinite(where: str) -> str:
    """Return what to say of a tensor that is not finite."""
    return f"{where}: holds NaN or Inf; the training diverged. Go back to an earlier step."


def parts(extent: Extent) -> Iterator[Extent]:
    """Cut an extent without CRC32 into ranges that several threads can read."""
    for start in range(0, extent.length, PART_BYTES):
        length = min(PART_BYTES, extent.length - start)
        yield Extent(extent.offset + start, length, extent.name, extent.dtype)


def _without_gaps(extents: Iterable[Extent], nbytes: int) -> Iterator[Extent]:
    """Yield the extents, and what lies between them, so that a file of `nbytes` is read whole."""
    position = 0
    for extent in extents:
        if extent.offset > position:
            yield Extent(position, extent.offset - position)
        yield extent
        position = extent.offset + extent.length
    if nbytes > position:
        yield Extent(position, nbytes - position)
