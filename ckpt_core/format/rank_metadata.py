"""The metadata of a save without collectives: one of each rank, merged into that of the whole directory.

Each rank wrote what it had: its own part of each sharded tensor, and all of what is not sharded. What several ranks
wrote is read from the first one's file, if it is the same in each; what differs has no one value, and is refused.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from ckpt_core.errors import DamagedError
from ckpt_core.format.cover import gap_or_overlap
from ckpt_core.format.index import METADATA_NAME, Chunk, Index, Keys, Shape, Span, TensorEntry, Unread, check_apart
from ckpt_core.format.source import Source, open_source
from ckpt_core.format.zips import members

if TYPE_CHECKING:
    from ckpt_core.urls import Place

_FILE = re.compile(r"__([0-9]+)_[0-9]+\.distcp")
_NEW_IN_EACH_SAVE = ".data/serialization_id"


def merge(directory: Place, ranks: Sequence[Index]) -> Index:
    """Return what the directory holds, of which each rank said its part.

    Raises:
        DamagedError: the ranks contradict each other, or a part of a tensor is nobody's.
    """
    _check_all_wrote_metadata(directory, len(ranks))
    tensors, repeated = _tensors(ranks, directory)
    values: dict[str, Span] = {}
    paths: dict[str, Keys] = {}
    unsupported: dict[str, Unread] = {}
    for index in ranks:
        for name, span in index.values.items():
            first = values.setdefault(name, span)
            if first != span:
                repeated[name].append((first, span))
        for name, path in index.paths.items():
            if paths.setdefault(name, path) != path:
                raise DamagedError(f"{directory}: {name} stood in several places, by the metadata of several ranks.")
        unsupported |= index.unsupported
    kinds = [tensors.keys(), values.keys(), unsupported.keys()]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        for name in kinds[first] & kinds[second]:
            raise DamagedError(f"{directory}: {name} is a tensor in one rank's metadata, and none in another's.")
    for name in _differing(directory, repeated):
        spans = [span for pair in repeated[name] for span in pair]
        unsupported[name] = Unread("another one on each rank, saved without collectives", tuple(dict.fromkeys(spans)))
        tensors.pop(name, None)
        values.pop(name, None)
    index = Index(tensors, values, paths, unsupported)
    try:
        check_apart(index)
    except ValueError as error:
        raise DamagedError(f"{directory}: {error}; restore a copy of the checkpoint.") from None
    return index


def _check_all_wrote_metadata(directory: Place, ranks: int) -> None:
    for entry in directory.iterdir():
        match = _FILE.fullmatch(entry.name)
        if match and int(match[1]) >= ranks:
            raise DamagedError(
                f"{entry}: of rank {match[1]}, whose metadata (__{match[1]}{METADATA_NAME}) is missing; the save was "
                "not complete, or the file is of another one: load an older checkpoint, or delete the file."
            )


def _tensors(
    ranks: Sequence[Index], directory: Place
) -> tuple[dict[str, TensorEntry], defaultdict[str, list[tuple[Span, Span]]]]:
    """Return each tensor, and pairs of spans that hold the same elements of it."""
    found: dict[str, tuple[str, Shape, dict[tuple[Shape, Shape], Chunk]]] = {}
    repeated: defaultdict[str, list[tuple[Span, Span]]] = defaultdict(list)
    for index in ranks:
        for name, entry in index.tensors.items():
            dtype, shape, chunks = found.setdefault(name, (entry.dtype, entry.shape, {}))
            if (dtype, shape) != (entry.dtype, entry.shape):
                raise DamagedError(
                    f"{directory}: {name} is {dtype} {shape} and {entry.dtype} {entry.shape}, by the metadata of "
                    "several ranks; they are of several saves."
                )
            for chunk in entry.chunks:
                first = chunks.setdefault((chunk.offsets, chunk.sizes), chunk)
                if first.span != chunk.span:
                    repeated[name].append((first.span, chunk.span))
    for name, (_, shape, chunks) in found.items():
        wrong = gap_or_overlap(shape, list(chunks))
        if wrong:
            raise DamagedError(
                f"{directory}: {name}: {wrong}, by the metadata of {len(ranks)} ranks; not all is there."
            )
    return {name: TensorEntry(d, shape, tuple(chunks.values())) for name, (d, shape, chunks) in found.items()}, repeated


def _differing(directory: Place, repeated: Mapping[str, Sequence[tuple[Span, Span]]]) -> list[str]:
    """Return the names of what several ranks wrote, and not the same."""
    with ExitStack() as opened:
        files: dict[str, Source] = {}

        def content(span: Span) -> object:
            if span.file not in files:
                files[span.file] = opened.enter_context(open_source(directory / span.file))
            where = f"{directory / span.file}"
            # Each entry's CRC32 stands for its bytes. One of 0 was left out, or is that of no bytes.
            return {
                m.name: (m.nbytes, m.crc32 if m.crc32 or not m.nbytes else span)
                for m in members(files[span.file], span, where)
                if m.name != _NEW_IN_EACH_SAVE
            }

        return [
            name for name, pairs in repeated.items() if any(content(first) != content(other) for first, other in pairs)
        ]
