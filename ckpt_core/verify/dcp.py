"""What is to be read of a DCP directory to verify it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

from ckpt_core.errors import CkptError, UnsupportedError
from ckpt_core.format import dtypes
from ckpt_core.format.index import Index, Shape, Span, check_files, read_index
from ckpt_core.format.source import Source
from ckpt_core.values import first_nonfinite
from ckpt_core.verify.report import Check, Findings
from ckpt_core.verify.scan import PART_BYTES, Extent, Reading, nonfinite
from ckpt_core.verify.work import Work

if TYPE_CHECKING:
    from ckpt_core.format.payload import Payload
    from ckpt_core.urls import Place


@dataclass(frozen=True, slots=True)
class Item:
    """One thing that a DCP directory holds: a chunk of a tensor, or a value."""

    name: str
    span: Span
    dtype: str | None
    """Element type by torch's name; None of a value."""

    sizes: Shape

    unsupported: str = ""
    """Why it is not read, of what is only checked for its CRC32."""


@dataclass(frozen=True)
class DcpContents:
    """The items of a DCP directory to verify."""

    directory: Place
    index: Index
    items: Sequence[Item]
    finite: bool
    """Whether NaN and Inf are wrong here."""

    findings: Findings

    def by_file(self) -> dict[str, list[Item]]:
        """Return the items by the name of their file, in the order of their bytes."""
        found: dict[str, list[Item]] = {}
        for item in sorted(self.items, key=lambda item: item.span.offset):
            found.setdefault(item.span.file, []).append(item)
        return dict(sorted(found.items()))

    def extents(self, items: Sequence[Item], source: Source) -> list[Extent]:
        """Find the elements of chunks in their open file; read values. What is damaged becomes a finding."""
        found: list[Extent] = []
        for item in items:
            where = f"{self.directory / item.span.file}: {item.name}"
            try:
                found += self._extent(item, source, where)
            except UnsupportedError as error:
                self.findings.add_unsupported(str(error))
            except CkptError as error:
                self.findings.add("structure", str(error))
        return found

    def _extent(self, item: Item, source: Source, where: str) -> list[Extent]:
        from ckpt_core.format.chunks import locate_chunk
        from ckpt_core.format.zips import data_offset, members
        from ckpt_core.io.reader import load_value

        if item.unsupported:
            self.findings.add_unsupported(f"{where}: {item.unsupported}")
            return [
                Extent(data_offset(source, item.span, member, where), member.nbytes, item.name, None, member.crc32)
                for member in sorted(members(source, item.span, where), key=lambda member: member.header)
            ]
        if item.dtype is None:
            load_value(source, item.span, where)
            return []
        payload = locate_chunk(source, item.span, item.dtype, item.sizes, where)
        self.findings.count("crc32" if payload.crc32 or not payload.nbytes else "unchecked")
        finite = self.finite
        if finite and payload.nbytes != math.prod(payload.shape) * dtypes.ITEMSIZE[payload.dtype]:
            self._check_view(source, payload, where)
            finite = False
        return [Extent(payload.offset, payload.nbytes, item.name, item.dtype if finite else None, payload.crc32)]

    def _check_view(self, source: Source, payload: Payload, where: str) -> None:
        """Look for NaN and Inf in a chunk that was stored with elements that are not its own."""
        import torch

        from ckpt_core.io.chunks import read_box

        tensor = torch.empty(payload.shape, dtype=getattr(torch, payload.dtype))
        read_box(source, payload, tensor, (0,) * tensor.dim(), where)
        flat = tensor.reshape(-1).view(torch.uint8).numpy()
        if first_nonfinite(flat, payload.dtype) is not None:
            self.findings.add("values", nonfinite(where))

    def readings(self) -> list[Reading]:
        """Return what threads have to read, where files have no digest: a few neighbouring chunks each."""
        return [
            Reading(self.directory / file, sum(item.span.length for item in share), partial(self.extents, share))
            for file, items in self.by_file().items()
            for share in _shares(items)
        ]


Choose = Callable[[Sequence[Item]], Sequence[Item]]


def read_contents(directory: Place, findings: Findings, *, finite: bool, choose: Choose) -> DcpContents | None:
    """Read what a DCP directory holds, and check that its files are there; None if that is not so, which is a finding.

    Args:
        directory: the DCP directory.
        findings: where problems go.
        finite: whether NaN and Inf are wrong in it.
        choose: picks the items to verify.
    """
    try:
        index = read_index(directory)
        check_files(directory, index)
    except (CkptError, OSError) as error:
        findings.add("structure", str(error))
        return None
    return DcpContents(directory, index, choose(list(_items(index))), finite, findings)


def _items(index: Index) -> Iterator[Item]:
    for name, entry in index.tensors.items():
        for chunk in entry.chunks:
            yield Item(name, chunk.span, entry.dtype, chunk.sizes)
    for name, span in index.values.items():
        yield Item(name, span, None, ())
    for name, unread in index.unsupported.items():
        for span in unread.spans:
            yield Item(name, span, None, (), unread.reason)


def _shares(items: Sequence[Item]) -> Iterator[Sequence[Item]]:
    """Cut the items of a file where enough bytes for a thread have come together."""
    ends, taken = [0], 0
    for number, item in enumerate(items, start=1):
        taken += item.span.length
        if taken >= PART_BYTES or number == len(items):
            ends.append(number)
            taken = 0
    for start, stop in pairwise(ends):
        yield items[start:stop]


def elements_of(items: Sequence[Item]) -> int:
    """Return how many elements chunks have together."""
    return sum(math.prod(item.sizes) for item in items if item.dtype is not None)


def dcp_checks(contents: Mapping[str, DcpContents], work: Work, models: Collection[str]) -> list[Check]:
    """Return the checks of DCP directories that were read.

    Args:
        contents: what they hold, by name.
        work: what was found.
        models: the names of those in which NaN and Inf are wrong.
    """
    if not contents:
        return [work.structure_check("")] if work.findings.problems["structure"] else []
    tensors = sum(len(each.index.tensors) for each in contents.values())
    values = sum(len(each.index.values) for each in contents.values())
    unsupported = sorted(work.findings.unsupported)
    said = f"{tensors} tensors, {values} values"
    said += f" in {', '.join(sorted(contents))}" if len(contents) > 1 else ""
    if unsupported:
        said += f"; {len(unsupported)} that are not read, of which only the CRC32 was checked if anything, such as "
        said += unsupported[0]
    checks = [work.structure_check(said), work.crc32_check()]
    if any(name in models for name in contents):
        checks.append(work.values_check(sum(elements_of(contents[n].items) for n in contents if n in models)))
    return checks
