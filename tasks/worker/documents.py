"""Documents: the texts of a source, which of them are used, in which order, and which are held out.

A document is known by the digest of its text alone. Which documents are used, in which order, and which of them are
held out follows from the digests: never from file names, their order on disk, or the day.
"""

from __future__ import annotations

import hashlib
import heapq
from typing import TYPE_CHECKING, NamedTuple

from ckpt_core.errors import ArgumentError
from tasks.worker.sources import describe_source, read_texts

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from tasks.config import DataSettings


class Document(NamedTuple):
    """A piece of text; documents sort by their digests."""

    digest: bytes
    """32 bytes, of the whole text in UTF-8."""

    text: str

    @property
    def size(self) -> int:
        """Bytes of the text in UTF-8."""
        return len(self.text.encode())


def read_documents(settings: DataSettings) -> list[Document]:
    """Return the documents of a source in the order of their digests, each text once.

    With `max_megabytes`, the first ones in that order are taken and the last of them is cut to fit. The whole
    source is read for that, but never more than the limit is kept. Fewer documents than `heldout_every` are cut
    into shorter ones, so that there is something to hold out.

    Raises:
        ArgumentError: nothing was found, a file cannot be read, or a row has no text.
    """
    limit = None if settings.max_megabytes is None else int(settings.max_megabytes * 1e6)
    documents = _select((_document(text) for text in read_texts(settings) if text.strip()), limit)
    if not documents:
        message = f"the data set is empty: {describe_source(settings)} held no text; check `source` and its fields"
        raise ArgumentError(message)
    if len(documents) < settings.heldout_every:
        documents = _cut_shorter(documents, settings.heldout_every)
    return documents


def split_documents(documents: list[Document], heldout_every: int) -> tuple[list[Document], list[Document]]:
    """Return the documents to train on and those held out: about one in `heldout_every`, at least one.

    A document is held out for what it contains, so that more data never moves one from one side to the other.

    Raises:
        ArgumentError: there is only one document.
    """
    if len(documents) < 2:  # noqa: PLR2004
        raise ArgumentError("the data set is one short document: nothing to hold out for evaluation; add text")
    heldout = {d.digest for d in documents if _lot(d) * heldout_every < 1}
    heldout = heldout or {min(documents, key=_lot).digest}
    if len(heldout) == len(documents):
        heldout.remove(max(documents, key=_lot).digest)
    return (
        [d for d in documents if d.digest not in heldout],
        [d for d in documents if d.digest in heldout],
    )


def fingerprint(documents: Iterable[Document]) -> str:
    """Return one SHA-256 over all texts, in their order."""
    total = hashlib.sha256()
    for document in documents:
        total.update(hashlib.sha256(document.text.encode()).digest())
    return total.hexdigest()


def _lot(document: Document) -> float:
    """Return a number in [0, 1) from the bytes of the digest that do not decide the order."""
    return int.from_bytes(document.digest[-6:], "big") / 2**48


def _document(text: str) -> Document:
    return Document(hashlib.blake2b(text.encode(), digest_size=32).digest(), text)


def _select(documents: Iterable[Document], limit: int | None) -> list[Document]:
    """Return the first documents in the order of their digests that fill `limit` bytes, the last one cut."""
    kept: dict[bytes, Document] = {}
    largest: list[int] = []  # heap of negated digests
    total = 0
    for document in documents:
        if document.digest in kept:
            continue
        kept[document.digest] = document
        heapq.heappush(largest, -int.from_bytes(document.digest, "big"))
        total += document.size
        # What is left holds at least `limit` bytes, so no later document can bring back what is dropped here.
        while limit is not None and total - (last := kept[_digest(largest[0])]).size >= limit:
            heapq.heappop(largest)
            del kept[last.digest]
            total -= last.size
    chosen = sorted(kept.values())
    if limit is not None and total > limit:
        last = chosen.pop()
        text = last.text.encode()[: last.size - (total - limit)].decode(errors="ignore")
        chosen += [last._replace(text=text)] if text.strip() else []
    return chosen


def _digest(negated: int) -> bytes:
    return (-negated).to_bytes(32, "big")


def _cut_shorter(documents: list[Document], heldout_every: int) -> list[Document]:
    """Cut at line ends, so that about two documents will be held out."""
    length = max(1, sum(len(d.text) for d in documents) // (2 * heldout_every))
    pieces = (_document(piece) for d in documents for piece in _pieces(d.text, length) if piece.strip())
    return _select(pieces, None)


def _pieces(text: str, length: int) -> Iterator[str]:
    """Cut a text into pieces of `length` characters or the rest of the line more, 1.5 times it at most."""
    start = 0
    while start < len(text):
        line_end = text.find("\n", start + length - 1, start + length + length // 2)
        end = line_end + 1 if line_end >= 0 else start + length
        yield text[start:end]
        start = end
