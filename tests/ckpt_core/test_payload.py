"""The bytes of a stored tensor are found where they lie, or the file is damaged."""

import io
import random
import warnings
import zipfile

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hostile_files import Evil, cheap

from ckpt_core.errors import CheckpointError, DamagedError, UnsupportedError, UntrustedError
from ckpt_core.format.chunks import locate_chunk
from ckpt_core.format.index import Span, read_index
from ckpt_core.format.payload import locate
from ckpt_core.format.source import open_source, read_into
from ckpt_core.io import load_value
from ckpt_core.io.chunks import read_box

BASE = torch.arange(24.0).reshape(4, 6)

TENSORS = {
    "contiguous": BASE,
    "one row": BASE[1:2].clone(),
    "transposed": BASE.t(),
    "slice with its storage": BASE[1:3],
    "columns": BASE[:, 2:5],
    "every second": BASE[::2, ::3],
    "scalar": torch.tensor(3.5),
    "no elements": torch.empty(0, 5),
    "no elements inside": torch.empty(3, 0, 2),
    "bool": torch.tensor([True, False, True]),
    "int64": torch.tensor([-(2**63), 2**63 - 1]),
    "uint16": torch.arange(5).to(torch.uint16),
    "bfloat16": BASE.bfloat16(),
    "float8_e4m3fn": BASE.to(torch.float8_e4m3fn),
    "float8_e5m2": BASE.to(torch.float8_e5m2),
    "float8_e4m3fnuz": BASE.to(torch.float8_e4m3fnuz),
    "float8_e8m0fnu": BASE.to(torch.float8_e8m0fnu),
    "complex64": torch.complex(BASE, -BASE),
    "complex128": torch.complex(BASE.double(), -BASE.double()),
    "parameter": torch.nn.Parameter(BASE.clone()),
    "five dimensions": torch.arange(32, dtype=torch.int8).reshape(2, 2, 2, 2, 2),
}


def zipped(thing) -> bytes:
    """What `torch.save` writes."""
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    return buffer.getvalue()


def repacked(data: bytes, change=None, **options) -> bytes:
    """The same zip written by Python's `zipfile`, with the members that `change` makes of its own."""
    members = {info.filename: zipfile.ZipFile(io.BytesIO(data)).read(info) for info in _infos(data)}
    if change:
        change(members)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", **options) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def _infos(data):
    return zipfile.ZipFile(io.BytesIO(data)).infolist()


@pytest.fixture
def shard(tmp_path):
    """Put bytes at a place in a file; return the file, open, and their span."""
    files = []

    def put(data: bytes, offset: int = 0):
        path = tmp_path / f"{len(files)}.distcp"
        with path.open("wb") as file:
            file.seek(offset)
            file.write(data)
        files.append(open_source(path))
        return files[-1], Span(path.name, offset, len(data))

    yield put
    for file in files:
        file.close()


def read(file, span, like) -> torch.Tensor:
    """Read a whole chunk of the type and shape of `like`."""
    payload = locate_chunk(file, span, str(like.dtype).removeprefix("torch."), tuple(like.shape), "here")
    target = torch.empty(like.shape, dtype=like.dtype)
    read_box(file, payload, target, (0,) * like.dim(), "here")
    return target


def bits(tensor) -> tuple:
    """All that two equal tensors have in common."""
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return tensor.dtype, tuple(tensor.shape), raw.numpy().tobytes()


class TestWhole:
    """Every kind of tensor that torch writes."""

    @pytest.mark.parametrize("tensor", TENSORS.values(), ids=list(TENSORS))
    def test_it_is_read_bit_for_bit(self, shard, tensor):
        """A tensor of any type and strides comes back bit for bit, from anywhere in a file."""
        file, span = shard(zipped(tensor), offset=777)
        assert bits(read(file, span, tensor)) == bits(tensor)

    @pytest.mark.parametrize("tensor", TENSORS.values(), ids=list(TENSORS))
    def test_its_place_is_exact(self, shard, tensor):
        """Where a chunk is called contiguous, the bytes at its offset are the tensor's and nothing else."""
        file, span = shard(zipped(tensor))
        payload = locate(file, span, "here")
        buffer = bytearray(payload.nbytes)
        read_into(file, payload.offset, memoryview(buffer), "here")
        assert payload.contiguous == (tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes)
        if payload.contiguous:
            assert bytes(buffer) == bits(tensor)[2]
        assert payload.crc32 != 0 or payload.nbytes == 0

    def test_a_part_of_it(self, shard):
        """A box from the middle of a chunk is read, and cast where the target has another type."""
        file, span = shard(zipped(BASE.t()))
        payload = locate(file, span, "here")
        target = torch.empty(2, 3, dtype=torch.float64)
        read_box(file, payload, target, (1, 1), "here")
        assert torch.equal(target, BASE.t()[1:3, 1:4].double())

    def test_a_target_with_gaps(self, shard):
        """A target that is a column of something larger is filled, and its neighbours are left alone."""
        file, span = shard(zipped(BASE[0]))
        wide = torch.full((6, 2), -1.0)
        read_box(file, locate(file, span, "here"), wide[:, 0], (0,), "here")
        assert torch.equal(wide[:, 0], BASE[0])
        assert torch.equal(wide[:, 1], torch.full((6,), -1.0))

    def test_beyond_4_gib(self, shard):
        """Offsets in a file do not fit 32 bits: here the chunk lies behind a hole of 5 GiB."""
        file, span = shard(zipped(BASE), offset=5 << 30)
        assert bits(read(file, span, BASE)) == bits(BASE)
        assert locate(file, span, "here").offset > 5 << 30

    @pytest.mark.parametrize("limit", ["ZIP64_LIMIT", "ZIP_FILECOUNT_LIMIT"])
    def test_zip64(self, shard, monkeypatch, limit):
        """Sizes and places in 64 bits, as in zips over 4 GiB, are followed."""
        monkeypatch.setattr(zipfile, limit, 1)
        data = repacked(zipped(BASE))
        assert b"PK\x06\x06" in data
        file, span = shard(data, offset=99)
        assert bits(read(file, span, BASE)) == bits(BASE)

    def test_large_reads_come_in_parts(self, shard, monkeypatch):
        """A read that the system cuts short goes on where it ended."""
        import os

        whole = os.preadv
        monkeypatch.setattr("os.preadv", lambda fd, buffers, offset: whole(fd, [buffers[0][:7]], offset))
        file, span = shard(zipped(BASE))
        assert bits(read(file, span, BASE)) == bits(BASE)

    def test_without_crc(self, shard):
        """A writer that left the CRC32 out left a 0: such a chunk is read, and told apart."""
        torch.serialization.set_crc32_options(False)
        try:
            file, span = shard(zipped(BASE))
        finally:
            torch.serialization.set_crc32_options(True)
        assert locate(file, span, "here").crc32 == 0
        assert bits(read(file, span, BASE)) == bits(BASE)


class TestRefused:
    """What is no tensor, or not the one that was promised."""

    def refused(self, shard, data, like=BASE, kind=DamagedError, match=None):
        """A read ends in the named error, with the place in its text, soon and without much memory."""
        file, span = shard(data)
        with cheap(), pytest.raises(kind, match=match) as caught:
            read(file, span, like)
        assert str(caught.value).startswith("here: ")
        return str(caught.value)

    def test_another_type(self, shard):
        """An element type other than the metadata's is an error that names both."""
        self.refused(shard, zipped(BASE), BASE.int(), match=r"float32 \(4, 6\).*int32 \(4, 6\)")

    def test_another_shape(self, shard):
        """A shape other than the metadata's is an error, with as many elements too."""
        self.refused(shard, zipped(BASE), BASE.reshape(6, 4), match=r"\(4, 6\).*\(6, 4\)")

    def test_every_truncation(self, shard):
        """A zip that is cut anywhere is damaged."""
        data = zipped(BASE)
        for length in range(0, len(data), 7):
            file, span = shard(data[:length])
            with pytest.raises(DamagedError):
                read(file, Span(span.file, 0, max(length, 1)), BASE)
            with pytest.raises(DamagedError):
                read(file, Span(span.file, 0, len(data)), BASE)

    def test_a_span_that_begins_late(self, shard):
        """A span that ends right but begins inside the zip is damaged."""
        file, span = shard(zipped(BASE))
        for start in (1, 64, span.length - 22, span.length - 1):
            with pytest.raises(DamagedError):
                read(file, Span(span.file, start, span.length - start), BASE)

    def test_compressed(self, shard):
        """A compressed member is refused, not inflated: a bomb is not set off."""
        bomb = repacked(
            zipped(torch.zeros(1)),
            lambda m: m.update({n: b"\0" * (200 << 20) for n in m if n.endswith("data/0")}),
            compression=zipfile.ZIP_DEFLATED,
        )
        assert len(bomb) < 1 << 20
        self.refused(shard, bomb, kind=UnsupportedError, match="compressed")
        self.refused(
            shard, repacked(zipped(BASE), compression=zipfile.ZIP_DEFLATED), kind=UnsupportedError, match="compressed"
        )

    def test_stride_0(self, shard):
        """One element that stands for many is refused, however many the file claims."""
        expanded = torch.ones(1).expand(1 << 40)
        self.refused(shard, zipped(expanded), expanded[:1], match="stride 0")

    def test_big_endian(self, shard):
        """Elements in the other byte order are refused, not misread."""
        change = lambda m: m.update({n: b"big" for n in m if n.endswith("byteorder")})  # noqa: E731 - short
        self.refused(shard, repacked(zipped(BASE), change), kind=UnsupportedError, match="big-endian")

    @pytest.mark.parametrize("size", [0, 1, 95, 97, 1000])
    def test_another_size(self, shard, size):
        """Fewer or more bytes than the header says are damaged."""
        change = lambda m: m.update({n: b"x" * size for n in m if n.endswith("data/0")})  # noqa: E731 - short
        self.refused(shard, repacked(zipped(BASE), change))

    @pytest.mark.parametrize(
        "thing",
        [
            3,
            {"a": 1},
            [BASE, BASE * 2],
            {"w": BASE},
            torch.complex(BASE, BASE).conj(),
            torch.complex(BASE, BASE).conj().imag,
            BASE.to_sparse(),
        ],
        ids=["number", "dict", "two", "dict of one", "conjugate view", "negative view", "sparse"],
    )
    def test_no_plain_tensor(self, shard, thing):
        """A value, several tensors, and views that the bytes alone do not give are refused."""
        self.refused(shard, zipped(thing), kind=CheckpointError)

    def test_a_payload_that_runs_code(self, shard, tmp_path):
        """A header that calls a function is untrusted, and the function is not called."""
        file, span = shard(zipped(Evil(tmp_path / "ran", "eval")))
        data = repacked(
            zipped(BASE), lambda m: m.update({"archive/data.pkl": _pickle_of(zipped(Evil(tmp_path / "ran", "eval")))})
        )
        self.refused(shard, data, kind=UntrustedError, match="eval")
        with pytest.raises(UntrustedError, match="eval"):
            load_value(file, span, "here")
        assert not (tmp_path / "ran").exists()

    def test_a_name_twice(self, shard):
        """Two members of one name are refused: readers would differ on which one counts."""
        buffer = io.BytesIO(zipped(BASE))
        with warnings.catch_warnings(), zipfile.ZipFile(buffer, "a") as archive:
            warnings.simplefilter("ignore")
            archive.writestr("archive/data/0", b"\1" * 96)
        self.refused(shard, buffer.getvalue(), match="twice")

    def test_the_file_is_missing(self, tmp_path):
        """A shard that is not there is damage, not a bare OSError."""
        with pytest.raises(DamagedError, match="missing"):
            open_source(tmp_path / "none")


def _pickle_of(data):
    return zipfile.ZipFile(io.BytesIO(data)).read("archive/data.pkl")


STATE = {
    "w": torch.arange(6.0).reshape(2, 3),
    "t": torch.tensor(5, dtype=torch.int64),
    "none": torch.empty(0),
    "lr": 0.125,
    "name": {"betas": (0.9, 0.99), "text": "cosine"},
}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small DCP directory that plain `dcp.save` wrote."""
    directory = tmp_path_factory.mktemp("small") / "dcp"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(STATE, checkpoint_id=directory)
    return directory


def _read_item(file, index, name):
    """Read a tensor's bits, or a value, of an index whose tensors have one chunk each."""
    if name in index.values:
        return load_value(file, index.values[name], "here")
    entry = index.tensors[name]
    return bits(read(file, entry.chunks[0].span, torch.empty(entry.shape, dtype=getattr(torch, entry.dtype))))


def test_no_flipped_byte_is_silent(small, tmp_path, capsys):
    """Each byte of a shard, with one bit and with all bits flipped, changes nothing that is read, or is an error."""
    index = read_index(small)
    good = (small / "__0_0.distcp").read_bytes()
    spans = {**{n: e.chunks[0].span for n, e in index.tensors.items()}, **index.values}
    path = tmp_path / "flipped.distcp"
    path.write_bytes(good)
    counts = {"error": 0, "equal": 0, "silent": 0}
    draw = random.Random(0)
    with path.open("r+b", buffering=0) as writer, open_source(path) as file:
        for name, span in spans.items():
            expected = _read_item(file, index, name)
            for position in range(span.offset, span.offset + span.length):
                for mask in (1 << draw.randrange(8), 0xFF):
                    writer.seek(position)
                    writer.write(bytes([good[position] ^ mask]))
                    try:
                        counts["equal" if _read_item(file, index, name) == expected else "silent"] += 1
                    except CheckpointError:
                        counts["error"] += 1
                    writer.seek(position)
                    writer.write(good[position : position + 1])
    with capsys.disabled():
        print(f"\nflipped bytes: {counts}")
    assert counts["silent"] == 0
    assert counts["error"] > 1000
