"""The whole list of bad DCP directories, each given to every reader: a named error, nothing run, nothing written.

What each reader makes of one kind of damage in particular is tested beside it; here no pair of the two is left out.
"""

import io as streams
import json
import os
import pickle
import shutil
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hostile_files import Evil, cheap, metadata_of, rewrite, write_metadata
from small_transformers import config_directory, model_of
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, ChunkStorageMetadata

from ckpt_core import io
from ckpt_core.errors import CkptError, StepExistsError, UntrustedError
from ckpt_core.native_checkpoint import convert_dcp_to_hf, load_checkpoint
from ckpt_core.verify import verify

FIRST = "model.model.layers.0.self_attn.q_proj.weight"
SHARD = "__0_0.distcp"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """What plain `dcp.save` wrote of a small Llama, its config, and the same with a value, as `valued`."""
    place = tmp_path_factory.mktemp("good")
    model = model_of("llama")
    config_directory(model, place / "config")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"model": model.state_dict()}, checkpoint_id=place / "dcp")
        dcp.save({"model": model.state_dict(), "rate": 0.5}, checkpoint_id=place / "valued")
    return place


@pytest.fixture
def place(good, tmp_path):
    """A copy of both to spoil."""
    return Path(shutil.copytree(good, tmp_path / "copy"))


def load(directory, target):
    """Load into a live model's state, as a training job does."""
    rate = {"rate": None} if directory.name == "valued" else {}
    io.load({"model": model_of("llama", seed=1).state_dict(), **rate}, directory)


def verified(directory, target):
    """Verify; what is not good is raised."""
    report = verify(directory)
    if not report.passed:
        raise CkptError([check.detail for check in report.checks])


READERS = {
    "load": load,
    "read_state": lambda directory, target: io.read_state(directory),
    "load_checkpoint": lambda directory, target: load_checkpoint(model_of("llama", seed=1), str(directory)),
    "verify": verified,
    "convert": lambda directory, target: convert_dcp_to_hf(
        str(directory), str(target), str(directory.parent / "config"), str(directory.parent / "config")
    ),
}


def entry(metadata, name=FIRST):
    """Return where an item lies."""
    return next(info for key, info in metadata.storage_data.items() if key.fqn == name)


def tensor(metadata, name=FIRST):
    """Return what the metadata says of a tensor."""
    return metadata.state_dict_metadata[name]


def only_chunk(metadata, offsets, sizes):
    """Say that a tensor has this one chunk."""
    key = next(key for key in metadata.storage_data if key.fqn == FIRST)
    info = metadata.storage_data.pop(key)
    tensor(metadata).chunks = [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))]
    metadata.storage_data[type(key)(FIRST, torch.Size(offsets))] = info


def two_chunks(metadata, *boxes):
    """Say that a tensor has these two chunks, the second in a file of its own."""
    only_chunk(metadata, *boxes[0])
    key, info = next((k, i) for k, i in metadata.storage_data.items() if k.fqn == FIRST)
    tensor(metadata).chunks.append(ChunkStorageMetadata(*(torch.Size(numbers) for numbers in boxes[1])))
    metadata.storage_data[type(key)(FIRST, torch.Size(boxes[1][0]))] = type(info)("other", 0, info.length)


def recursive():
    """Return a list that holds itself."""
    items = []
    items.append(items)
    return items


def said(change):
    """A case that changes what the metadata says."""
    return lambda directory: rewrite(directory, change)


def metadata_is(content):
    """A case with these bytes in place of the metadata."""
    return lambda directory: (directory / ".metadata").write_bytes(content)


def in_place_of(name, make):
    """A case with something else in place of a file."""

    def spoil(directory):
        (directory / name).unlink()
        make(directory / name)

    return spoil


def stored_as(thing, name=FIRST, **options):
    """A case in which an item's bytes are those of another object, in a file of its own."""

    def spoil(directory):
        buffer = streams.BytesIO()
        torch.save(thing(directory) if callable(thing) else thing, buffer)
        data = _deflated(buffer.getvalue()) if options else buffer.getvalue()
        (directory / "other").write_bytes(data)
        metadata = metadata_of(directory)
        info = entry(metadata, name)
        info.relative_path, info.offset, info.length = "other", 0, len(data)
        write_metadata(directory, metadata)

    return spoil


def _deflated(data):
    buffer = streams.BytesIO()
    with zipfile.ZipFile(streams.BytesIO(data)) as source, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    return buffer.getvalue()


def evil(how="os.system"):
    """An object whose pickle makes the file `ran`."""
    return lambda directory: Evil(directory.parent / "ran", how)


def retyped(directory):
    """Call a tensor a value, whose bytes are an evil pickle."""
    stored_as(evil())(directory)

    def change(metadata):
        key, info = next((k, i) for k, i in metadata.storage_data.items() if k.fqn == FIRST)
        del metadata.storage_data[key]
        metadata.state_dict_metadata[FIRST] = BytesStorageMetadata()
        metadata.storage_data[type(key)(FIRST)] = info

    rewrite(directory, change)


def flipped(directory):
    """Flip one bit of a tensor's elements."""
    info = entry(metadata_of(directory))
    data = bytearray((directory / SHARD).read_bytes())
    data[info.offset + info.length // 2] ^= 4
    (directory / SHARD).write_bytes(data)


def evil_payload(directory):
    """Put a pickle that runs code in front of a tensor's elements."""
    header, payload, both = streams.BytesIO(), streams.BytesIO(), streams.BytesIO()
    torch.save(evil("eval")(directory), header)
    torch.save(W, payload)
    with zipfile.ZipFile(payload) as source, zipfile.ZipFile(header) as other, zipfile.ZipFile(both, "w") as target:
        for name in source.namelist():
            target.writestr(name, (other if name.endswith("data.pkl") else source).read(name))
    (directory / "other").write_bytes(both.getvalue())
    length = len(both.getvalue())
    rewrite(directory, lambda m: vars(entry(m)).update(relative_path="other", offset=0, length=length))


def fallback(directory):
    """Leave only what stock DCP would fall back to."""
    (directory / ".metadata").unlink()
    (directory / "__0.metadata").write_bytes(pickle.dumps(Evil(directory.parent / "ran")))


W = torch.randn(16, 16)
CODE = {
    "os.system": lambda d: write_metadata(d, Evil(d.parent / "ran")),
    "nested eval": said(lambda m: setattr(m, "planner_data", {"x": Evil(Path("/nowhere"), "eval")})),
    "evil payload": evil_payload,
    "tensor retyped as a value": retyped,
}
VALUES = {
    "evil": stored_as(evil(), "rate"),
    "evil, nested": stored_as(lambda d: {"a": [evil("eval")(d)]}, "rate"),
    "a class": stored_as(Path("/x"), "rate"),
    "compressed": stored_as([0] * 10**6, "rate", deflated=True),
    "cut short": said(lambda m: vars(entry(m, "rate")).update(length=entry(m, "rate").length - 1)),
}
METADATA = {
    "fallback": fallback,
    "missing": lambda d: (d / ".metadata").unlink(),
    "empty": metadata_is(b""),
    "truncated": lambda d: os.truncate(d / ".metadata", 700),
    "directory": in_place_of(".metadata", Path.mkdir),
    "FIFO": in_place_of(".metadata", os.mkfifo),
    "device": in_place_of(".metadata", lambda path: path.symlink_to("/dev/zero")),
    "memo bomb": metadata_is(b"\x80\x02Nr\xff\xff\xff\x7f."),
    "recursive planner data": said(lambda m: m.planner_data.update({FIRST: recursive()})),
    "future version": said(lambda m: setattr(m, "version", "9.0.0")),
    "unknown transform": said(lambda m: setattr(entry(m), "transform_descriptors", ["zstd"])),
}
PATHS = {
    f"path {path!r}": said(lambda m, path=path: setattr(entry(m), "relative_path", path))
    for path in ["../config/config.json", "/etc/passwd", "/dev/zero", "a\0b", "", ".", "sub/x"]
}
SHARDS = {
    "missing": lambda d: (d / SHARD).unlink(),
    "empty": lambda d: os.truncate(d / SHARD, 0),
    "half": lambda d: os.truncate(d / SHARD, (d / SHARD).stat().st_size // 2),
    "without its last byte": lambda d: os.truncate(d / SHARD, (d / SHARD).stat().st_size - 1),
    "FIFO": in_place_of(SHARD, os.mkfifo),
    "directory": in_place_of(SHARD, Path.mkdir),
    "device": in_place_of(SHARD, lambda path: path.symlink_to("/dev/zero")),
    "offset below 0": said(lambda m: setattr(entry(m), "offset", -1)),
    "offset past the end": said(lambda m: setattr(entry(m), "offset", 1 << 40)),
    "offset one off": said(lambda m: setattr(entry(m), "offset", entry(m).offset + 1)),
    "length 0": said(lambda m: setattr(entry(m), "length", 0)),
    "length past the end": said(lambda m: setattr(entry(m), "length", 1 << 40)),
    "huge length": said(lambda m: setattr(entry(m), "length", 1 << 70)),
    "flipped bit": flipped,
    "stride 0": stored_as(torch.ones(1).expand(16, 16)),
    "a dict": stored_as({"w": W}),
    "a number": stored_as(3),
    "another dtype": stored_as(W.double()),
    "a dtype of the same width": stored_as(W.view(torch.int32)),
    "another size": stored_as(W[:8]),
    "another shape": stored_as(W.reshape(8, 32)),
    "sparse": stored_as(W.to_sparse()),
    "deflate bomb": stored_as(torch.zeros(4096, 4096), deflated=True),
}
LAYOUT = {
    "gap": said(lambda m: two_chunks(m, ([0, 0], [7, 16]), ([8, 0], [8, 16]))),
    "no chunk": said(lambda m: setattr(tensor(m), "chunks", [])),
    "overlap": said(lambda m: two_chunks(m, ([0, 0], [8, 16]), ([7, 0], [8, 16]))),
    "negative offset": said(lambda m: only_chunk(m, [-1, 0], [16, 16])),
    "chunk smaller than its tensor": said(lambda m: only_chunk(m, [0, 0], [16, 15])),
    "huge": said(
        lambda m: (setattr(tensor(m), "size", torch.Size([1 << 50, 16])), only_chunk(m, [0, 0], [1 << 50, 16]))
    ),
    "no storage": said(lambda m: setattr(m, "storage_data", {})),
    "key missing": said(lambda m: m.storage_data.pop(next(k for k in m.storage_data if k.fqn == FIRST))),
    "dtype lie": said(lambda m: setattr(tensor(m).properties, "dtype", torch.int32)),
    "wider dtype lie": said(lambda m: setattr(tensor(m).properties, "dtype", torch.float64)),
}
CASES = {
    f"{group}: {name}": spoil
    for group, cases in {
        "code": CODE, "metadata": METADATA, "paths": PATHS, "shards": SHARDS, "layout": LAYOUT
    }.items()
    for name, spoil in cases.items()
}  # fmt: skip


def listing(place):
    """Return what lies below a place, and when it was changed."""
    return {str(path): path.lstat().st_mtime_ns for path in sorted(place.rglob("*"))}


@pytest.mark.parametrize("reader", READERS.values(), ids=list(READERS))
def test_good(place, reader):
    """The directory that is spoilt below is good for every reader before it is."""
    reader(place / "dcp", place / "export")


UNCHECKED = {"metadata: unknown transform", "shards: deflate bomb", "a class", "compressed"}
"""What `verify` does not read and says so: it is foreign, and not known to be bad."""

PAIRS = [
    pytest.param(reader, spoil, id=f"{name}, {case}")
    for name, reader in READERS.items()
    for case, spoil in CASES.items()
    if not (name == "verify" and case in UNCHECKED)
]


@pytest.mark.parametrize(("reader", "spoil"), PAIRS)
def test_bad(place, reader, spoil):
    """A named error, soon and in little memory; nothing was run and nothing written."""
    spoil(place / "dcp")
    before = listing(place)
    with cheap(), pytest.raises(CkptError) as caught:
        reader(place / "dcp", place / "export")
    assert len(str(caught.value)) < 3000
    assert listing(place) == before


@pytest.mark.parametrize("case", sorted(UNCHECKED))
def test_what_is_foreign_is_named_as_not_checked(place, case):
    """Soon and in little memory: nothing of it is unpacked or run."""
    directory = place / ("valued" if case in VALUES else "dcp")
    {**CASES, **VALUES}[case](directory)
    with cheap():
        report = verify(directory)
    assert report.passed
    assert any("not read" in check.detail for check in report.checks), report


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        pytest.param(name, spoil, id=f"{name}-{case}")
        for name in ("load", "read_state", "verify")
        for case, spoil in VALUES.items()
        if not (name == "verify" and case in UNCHECKED)
    ],
)
def test_bad_values(place, spoil, name):
    """So is a bad value, by the readers that look at values."""
    READERS[name](place / "valued", place / "export")
    spoil(place / "valued")
    before = listing(place)
    with cheap(), pytest.raises(CkptError, match="rate"):
        READERS[name](place / "valued", place / "export")
    assert listing(place) == before


@pytest.mark.parametrize("spoil", CODE.values(), ids=list(CODE))
def test_code_is_called_that(place, spoil):
    """What would run code is told as that, by the loads that come to it."""
    spoil(place / "dcp")
    with pytest.raises(UntrustedError):
        io.read_state(place / "dcp")
    assert not (place / "ran").exists()


@pytest.mark.parametrize("reader", READERS.values(), ids=list(READERS))
def test_links_to_files_are_fine(place, reader):
    """Hub caches are made of links: metadata and shards may be ones that end in files."""
    for name in (".metadata", SHARD):
        (place / "dcp" / name).rename(place / f"blob{name}")
        (place / "dcp" / name).symlink_to(f"../blob{name}")
    reader(place / "dcp", place / "export")


@pytest.mark.parametrize("name", [SHARD, ".metadata"])
def test_nothing_is_written_through_a_link(tmp_path, name):
    """A save does not follow a link that lies where it would write."""
    (tmp_path / "dcp").mkdir()
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "dcp" / name).symlink_to(tmp_path / "precious")
    with pytest.raises((FileExistsError, StepExistsError)):
        io.save({"w": W}, tmp_path / "dcp")
    assert (tmp_path / "precious").read_text() == "precious"


def weights(header, data=bytes(24)):
    """Return a safetensors file with this header."""
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


A = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
B = {"dtype": "F32", "shape": [2], "data_offsets": [16, 24]}
SAFETENSORS = {
    "empty": b"",
    "cut short": weights({"a": A, "b": B}, bytes(23)),
    "bytes that are nobody's": weights({"a": A, "b": B}, bytes(25)),
    "a header past the end": (1 << 40).to_bytes(8, "little") + b"{}",
    "a large __metadata__": weights({"__metadata__": {"x": "y" * (17 << 20)}, "a": A, "b": B}),
    "a long name": weights({"a" * 5000: A, "b": B}),
    "an overlap": weights({"a": A, "b": {**B, "data_offsets": [8, 16]}}, bytes(16)),
    "a gap": weights({"a": A, "b": {**B, "data_offsets": [17, 25]}}, bytes(25)),
    "a shape that does not fit": weights({"a": {**A, "shape": [5]}, "b": B}),
    "a huge shape": weights({"a": {**A, "shape": [1 << 40, 1 << 40]}, "b": B}),
    "an unknown dtype": weights({"a": {**A, "dtype": "F33"}, "b": B}),
    "a negative offset": weights({"a": {**A, "data_offsets": [-16, 0]}, "b": B}),
    "a name twice": weights({"a": A, "x": B}).replace(b'"x"', b'"a"'),
    "a pickle": pickle.dumps({"a": 1}),
}


@pytest.mark.parametrize("content", SAFETENSORS.values(), ids=list(SAFETENSORS))
def test_bad_safetensors(tmp_path, content):
    """A safetensors file that is not sound fails its verification, soon and in little memory."""
    (tmp_path / "model.safetensors").write_bytes(weights({"a": A, "b": B}))
    assert verify(tmp_path).passed
    (tmp_path / "model.safetensors").write_bytes(content)
    with cheap(seconds=20), pytest.raises(CkptError, match=r"model\.safetensors"):
        verified(tmp_path, None)


def test_safetensors_of_many_tensors(tmp_path):
    """A header of a million and one tensors is refused without the memory that it would take to hold them."""
    none = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    (tmp_path / "model.safetensors").write_bytes(weights({f"{n}": none for n in range(1_000_001)}, b""))
    with cheap(seconds=60), pytest.raises(CkptError):
        verified(tmp_path, None)


@pytest.mark.parametrize(
    "file", ["../outside.safetensors", "/etc/passwd", "x\0.safetensors", "", 3, None, "missing.safetensors"]
)
def test_bad_index(tmp_path, file):
    """An index that leads outside its directory, or nowhere, is not followed."""
    (tmp_path / "outside.safetensors").write_bytes(weights({"a": A, "b": B}))
    (tmp_path / "export").mkdir()
    index = {"metadata": {"total_size": 24}, "weight_map": {"a": file, "b": file}}
    (tmp_path / "export" / "model.safetensors.index.json").write_text(json.dumps(index))
    with cheap(), pytest.raises(CkptError):
        verified(tmp_path / "export", None)
