"""Content-addressed storage of the local Hub: what Xet clients upload, for all repositories of one directory.

    DIR/.xet/
      secret                what signs tokens and addresses
      xorbs/<hash>          a xorb as it was sent
      rows/<hash>           its chunks, as a shard told them; there as soon as a file that uses it was verified
      files/<hash>.json     a file: its terms and the sha256 of its content
      contents/<sha256>     the content, for who reads it without Xet
      hashes/<sha256>       the file's hash
      starts/<hash>/<hash>  by a file's first chunk, empty files named like the xorbs of all files that begin with it

Xet's own hashes are not computed here: content is checked by its sha256, before a file counts as uploaded.
"""

import hashlib
import itertools
import json
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from ckpt_core.testing.hub_files import atomic_file, write_atomically
from ckpt_core.testing.hub_names import SHA256, Refusal
from ckpt_core.testing.hub_shards import Shard, ShardFile, Term, chunk_hashes, parse_shard, shard_of
from ckpt_core.testing.hub_xorbs import Chunk, Xorb

_FOLDERS = ("xorbs", "rows", "files", "contents", "hashes", "starts")


@dataclass(frozen=True)
class Piece:
    """Chunks `start` to `end` (exclusive) of a xorb, their unpacked size, and the bytes of its file that hold them."""

    xorb: str
    start: int
    end: int
    size: int
    first_byte: int
    last_byte: int


@dataclass(frozen=True)
class Reconstruction:
    """The pieces that hold a range of a file, and how many bytes of the first one precede it."""

    offset: int
    pieces: list[Piece]


@dataclass(frozen=True)
class _Placed:
    number: int
    at: int
    chunk: Chunk

    @property
    def end(self) -> int:
        return self.at + self.chunk.size


def _piece(xorb: str, placed: list[_Placed]) -> Piece:
    head, tail = placed[0], placed[-1]
    size = tail.end - head.at
    return Piece(xorb, head.number, tail.number + 1, size, head.chunk.start, tail.chunk.end - 1)


class Cas:
    """Xorbs, and the files that are made of them."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory / ".xet"
        for folder in _FOLDERS:
            (self._directory / folder).mkdir(parents=True, exist_ok=True)

    @property
    def secret(self) -> bytes:
        """What this directory's servers sign with, so that a token outlives a restart."""
        path = self._directory / "secret"
        if not path.exists():
            write_atomically(path, secrets.token_bytes(32))
        return path.read_bytes()

    def add_xorb(self, xorb: str, data: bytes) -> bool:
        """Keep a xorb and return True, or return False where a verified one is here."""
        if self._place("rows", xorb).exists():
            return False
        if Xorb(data).chunks:
            write_atomically(self._place("xorbs", xorb), data)
        return True

    def add_shard(self, data: bytes) -> None:
        """Verify and keep every file of a shard; one that is not what its sha256 says refuses them all with 400."""
        shard = parse_shard(data)
        try:
            for file in shard.files:
                self._check_xorbs(file, shard)
                self._unpack(file)
        except Refusal:
            self._forget(shard)
            raise
        for xorb, rows in shard.xorbs.items():
            write_atomically(self._place("rows", xorb), rows)
        for file in shard.files:
            self._register(file)

    def xorb_file(self, xorb: str) -> Path:
        """Return where a xorb's bytes lie; a missing one is refused with 404."""
        path = self._place("xorbs", xorb)
        if not path.exists():
            raise Refusal(404, f"There is no xorb {xorb}")
        return path

    def file_hash(self, sha256: str) -> str | None:
        """Return the Xet hash of a content, None where it was not uploaded through Xet."""
        path = self._place("hashes", sha256)
        return path.read_text() if path.exists() else None

    def content(self, sha256: str) -> Path | None:
        """Return where a content lies, None where it was not uploaded through Xet."""
        path = self._place("contents", sha256)
        return path if path.exists() else None

    def similar(self, chunk: str) -> bytes | None:
        """Return a shard that tells of all xorbs of the files that begin with a chunk; None where there is no such."""
        folder = self._place("starts", chunk)
        if not folder.exists():
            return None
        return shard_of(self._place("rows", path.name).read_bytes() for path in sorted(folder.iterdir()))

    def reconstruct(self, file: str, first: int, last: int | None) -> Reconstruction:
        """Return what holds the bytes `first` to `last` (inclusive; None: the end); 404 and 416 where there is none."""
        path = self._place("files", file).with_suffix(".json")
        if not path.exists():
            raise Refusal(404, f"There is no file {file}")
        terms = [Term(**term) for term in json.loads(path.read_bytes())["terms"]]
        size = sum(term.size for term in terms)
        if first >= size:
            raise Refusal(416, f"The file has {size} bytes")
        return self._pieces(terms, first, size - 1 if last is None else last)

    def _pieces(self, terms: Iterable[Term], first: int, last: int) -> Reconstruction:
        pieces: list[Piece] = []
        offset = position = 0
        for term in terms:
            if position <= last and position + term.size > first:
                wanted = [item for item in self._chunks(term, position) if item.at <= last and item.end > first]
                if not pieces:
                    offset = first - wanted[0].at
                pieces.append(_piece(term.xorb, wanted))
            position += term.size
        return Reconstruction(offset, pieces)

    def _chunks(self, term: Term, position: int) -> Iterator["_Placed"]:
        """Yield the chunks of a term that begins at a position of its file."""
        chunks = Xorb.open(self.xorb_file(term.xorb)).chunks
        for number in range(term.start, term.end):
            yield _Placed(number, position, chunks[number])
            position += chunks[number].size

    def _check_xorbs(self, file: ShardFile, shard: Shard) -> None:
        """Refuse a file of which a xorb is missing, or what chunks it has."""
        for xorb in (term.xorb for term in file.terms):
            known = xorb in shard.xorbs or self._place("rows", xorb).exists()
            if not (known and self._place("xorbs", xorb).exists()):
                raise Refusal(
                    400,
                    f"File {file.hash} is made of xorb {xorb}, which was not uploaded here; the client's cache"
                    " (HF_XET_CACHE) may be of another server at this address: delete it",
                )

    def _unpack(self, file: ShardFile) -> None:
        """Write a file's content to its place, if it is what its sha256 says."""
        found = hashlib.sha256()
        with atomic_file(self._place("contents", file.sha256)) as target:
            for content in itertools.chain.from_iterable(map(self._contents, file.terms)):
                found.update(content)
                target.write(content)
            if found.hexdigest() != file.sha256:
                raise Refusal(400, f"File {file.hash} has sha256 {found.hexdigest()}, not {file.sha256}; send it again")

    def _contents(self, term: Term) -> Iterator[bytes]:
        xorb = Xorb.open(self.xorb_file(term.xorb))
        chunks = xorb.chunks[term.start : term.end]
        if sum(chunk.size for chunk in chunks) != term.size:
            raise Refusal(400, f"Chunks {term.start} to {term.end} of xorb {term.xorb} have not {term.size} bytes")
        yield from map(xorb.unpack, chunks)

    def _forget(self, shard: Shard) -> None:
        """Drop the xorbs that came with a shard whose content is wrong, so that they are taken when sent again."""
        for xorb in shard.xorbs:
            if not self._place("rows", xorb).exists():
                self._place("xorbs", xorb).unlink(missing_ok=True)

    def _register(self, file: ShardFile) -> None:
        if not file.terms:
            return
        first = file.terms[0]
        start = self._place("starts", chunk_hashes(self._place("rows", first.xorb).read_bytes())[first.start])
        start.mkdir(exist_ok=True)
        for term in file.terms:
            (start / term.xorb).touch()
        record = {"sha256": file.sha256, "terms": [asdict(term) for term in file.terms]}
        write_atomically(self._place("files", file.hash).with_suffix(".json"), json.dumps(record).encode())
        write_atomically(self._place("hashes", file.sha256), file.hash.encode())

    def _place(self, folder: str, name: str) -> Path:
        if not SHA256.fullmatch(name):
            raise Refusal(400, f"{name!r} is no hash; one has 64 lower-case hex digits")
        return self._directory / folder / name
