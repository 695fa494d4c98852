"""What a DCP directory holds is read without running it, and refused where it cannot be true."""

import gc
import itertools
import json
import os
import pickle
import pickletools
import re
import shutil
import warnings
from contextlib import suppress
from pathlib import Path

import gloo_ranks
import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hostile_files import Evil, cheap, metadata_of, rewrite, tuple_bomb, write_metadata
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, ChunkStorageMetadata

from ckpt_core import io
from ckpt_core.errors import CheckpointError, DamagedError, NotACheckpointError, UnsupportedError, UntrustedError
from ckpt_core.format import dtypes, pickles
from ckpt_core.format.cover import gap_or_overlap
from ckpt_core.format.digests import ALGORITHM, digest_bytes
from ckpt_core.format.index import METADATA_NAME, TWIN_NAME, TWIN_VERSION, read_index, twin_bytes
from ckpt_core.format.pickled_names import may_run_code
from ckpt_core.io.metadata import to_index, to_metadata

STATE = {
    "model": {"z": torch.arange(12.0).reshape(4, 3), "a": torch.zeros(3).half(), "scalar": torch.tensor(7)},
    "lr": 0.5,
    "groups": [{"betas": (0.9, 0.99)}, {"empty": torch.empty(0, 4)}],
}


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """What plain `dcp.save` wrote in one process."""
    directory = tmp_path_factory.mktemp("stock") / "dcp"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(STATE, checkpoint_id=directory)
    return directory


@pytest.fixture
def directory(saved, tmp_path):
    """A copy of it to spoil."""
    return Path(shutil.copytree(saved, tmp_path / "dcp"))


def save_sharded(directory, ours):
    """Save an FSDP model: by plain `dcp.save`, or by ours with a twin."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 1), nn.Linear(1, 5))
    fully_shard(model)
    state = {"model": model.state_dict(), "step": 3}
    if ours:
        io.save(state, Path(directory), twin=True)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.save(state, checkpoint_id=directory)


class TestReading:
    """What is there is read as torch reads it."""

    def test_one_rank(self, saved):
        """The metadata of plain `dcp.save` gives the names, shapes, element types and places that torch finds in it."""
        index = read_index(saved)
        assert index == to_index(metadata_of(saved))
        assert index.tensors["model.z"].shape == (4, 3)
        assert index.tensors["model.a"].dtype == "float16"
        assert index.tensors["model.scalar"].shape == ()
        assert index.paths["groups.0.betas"] == ("groups", 0, "betas")
        assert index.nbytes == 12 * 4 + 3 * 2 + 8

    def test_names_keep_their_order(self, saved):
        """Names come in the order in which torch lists them, not sorted."""
        names = list(metadata_of(saved).state_dict_metadata)
        index = read_index(saved)
        assert [n for n in names if n in index.tensors] == list(index.tensors)
        assert next(iter(index.tensors)) == "model.z"

    @pytest.mark.parametrize("ranks", [2, 3])
    def test_several_ranks(self, tmp_path, ranks):
        """Chunks of several ranks are found in their files, those without elements too."""
        gloo_ranks.values(gloo_ranks.run_ranks(ranks, save_sharded, str(tmp_path / "dcp"), False))
        index = read_index(tmp_path / "dcp")
        assert index == to_index(metadata_of(tmp_path / "dcp"))
        assert len(index.tensors["model.1.weight"].chunks) == ranks
        assert {c.span.file for c in index.tensors["model.1.weight"].chunks} == {
            f"__{n}_0.distcp" for n in range(ranks)
        }

    def test_the_twin_says_the_same(self, tmp_path):
        """The JSON twin that several ranks of ours write equals their pickle, and so does torch's reading of it."""
        gloo_ranks.values(gloo_ranks.run_ranks(2, save_sharded, str(tmp_path / "dcp"), True))
        twin = read_index(tmp_path / "dcp")
        assert (tmp_path / "dcp" / TWIN_NAME).read_bytes() == twin_bytes(
            twin, (tmp_path / "dcp" / METADATA_NAME).read_bytes()
        )
        (tmp_path / "dcp" / TWIN_NAME).unlink()
        pickled = read_index(tmp_path / "dcp")
        assert twin == pickled == to_index(metadata_of(tmp_path / "dcp"))
        assert list(twin.tensors) == list(pickled.tensors)

    def test_a_bound_twin_comes_first(self, tmp_path):
        """Where the twin names the digest of the metadata beside it, the pickle is not opened as one."""
        io.save({"w": torch.ones(2)}, tmp_path / "dcp", twin=True)
        index = read_index(tmp_path / "dcp")
        (tmp_path / "dcp" / METADATA_NAME).write_bytes(b"no pickle")
        (tmp_path / "dcp" / TWIN_NAME).write_bytes(twin_bytes(index, b"no pickle"))
        assert read_index(tmp_path / "dcp") == index

    @pytest.mark.parametrize("version", [1, 2])
    def test_a_twin_of_an_older_save_is_not_read(self, tmp_path, caplog, version):
        """After a stock save over the directory, which leaves the twin, all that is read is of the newer save."""
        io.save({"model": {"w": torch.zeros(2), "old": torch.zeros(3)}}, tmp_path / "dcp", twin=True)
        if version == 1:  # as it was before twins named a digest
            twin = json.loads((tmp_path / "dcp" / TWIN_NAME).read_bytes()) | {"format_version": 1}
            del twin["metadata"]
            (tmp_path / "dcp" / TWIN_NAME).write_text(json.dumps(twin))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.save({"model": {"w": torch.ones(2)}}, checkpoint_id=tmp_path / "dcp")
        assert list(read_index(tmp_path / "dcp").tensors) == ["model.w"]
        assert version == 1 or "of an older save than .metadata" in caplog.text
        assert io.read_state(tmp_path / "dcp")["model"]["w"].tolist() == [1, 1]

    @pytest.mark.parametrize("level", ["model", "0123/model"])
    def test_in_a_committed_step_such_a_twin_is_damage(self, tmp_path, level):
        """Nothing overwrites a committed step: there both files must be of one save, in a bucket's layout too."""
        io.save({"w": torch.zeros(2)}, tmp_path / level, twin=True)
        (tmp_path / "manifest.json").write_text("{}")
        assert list(read_index(tmp_path / level).tensors) == ["w"]
        (tmp_path / level / METADATA_NAME).write_bytes(pickle.dumps(metadata_of(tmp_path / level), 2))
        refused(tmp_path / level, DamagedError, "of another save than .metadata")

    def test_round_trip_through_torch(self, saved):
        """An index becomes torch's metadata, and that the same index."""
        index = read_index(saved)
        assert to_index(to_metadata(index)) == index

    def test_a_link_to_a_file_is_fine(self, directory):
        """Hub caches are made of links: metadata may be one."""
        (directory / METADATA_NAME).rename(directory.parent / "blob")
        (directory / METADATA_NAME).symlink_to(directory.parent / "blob")
        assert "model.z" in read_index(str(directory)).tensors

    def test_a_stranger_named_metadata_json_is_none_of_ours(self, directory):
        """Megatron keeps a `metadata.json` beside `.metadata`: it is left alone."""
        (directory / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
        assert "model.z" in read_index(directory).tensors


def refused(directory, kind=DamagedError, match=None):
    """Both the index and a load end in the named error, soon, without much memory, and run nothing."""
    with cheap():
        with pytest.raises(kind, match=match) as caught:
            read_index(directory)
        with pytest.raises(kind):
            io.read_state(directory)
    assert str(directory) in str(caught.value)
    assert len(str(caught.value)) < 2000
    return str(caught.value)


class TestFiles:
    """What is no metadata file at all."""

    @pytest.mark.parametrize("content", [b"", b"\x80\x04", b"\x80\x04}", b"no pickle", b"PK\x03\x04", b"\x80\x04N."])
    def test_not_metadata(self, directory, content):
        """Empty, cut short or something else: damaged."""
        (directory / METADATA_NAME).write_bytes(content)
        refused(directory)

    def test_every_truncation(self, saved, tmp_path):
        """Cut anywhere, metadata is damaged: none of its beginnings says something."""
        data = (saved / METADATA_NAME).read_bytes()
        for length in range(len(data)):
            (tmp_path / METADATA_NAME).write_bytes(data[:length])
            with pytest.raises(DamagedError):
                read_index(tmp_path)

    def test_nothing_there(self, tmp_path):
        """A directory without metadata, or no directory, is no checkpoint."""
        refused(tmp_path, NotACheckpointError, "no .metadata in it")
        refused(tmp_path / "none", NotACheckpointError)

    @pytest.mark.parametrize("name", [METADATA_NAME, TWIN_NAME])
    @pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
    def test_not_a_file(self, directory, name, make):
        """A directory, a FIFO and a device in place of the file do not make it wait or read on and on."""
        (directory / name).unlink(missing_ok=True)
        make(directory / name)
        refused(directory, DamagedError, "not a regular file")

    def test_a_file_too_large(self, directory):
        """A file that is larger than metadata can be is not read."""
        os.truncate(directory / METADATA_NAME, (1 << 30) + 1)
        refused(directory, DamagedError, "expected 1 to")

    def test_metadata_of_ranks_runs_nothing_either(self, directory):
        """What DCP reads where there is no `.metadata` is read by the same rules."""
        mark = directory / "ran"
        (directory / METADATA_NAME).rename(directory / "__0.metadata")
        assert "model.z" in read_index(directory).tensors
        (directory / "__0.metadata").write_bytes(pickle.dumps(Evil(mark)))
        refused(directory, UntrustedError)
        assert not mark.exists()

    def test_both_kinds_of_metadata_are_of_two_saves(self, directory):
        """One of the saves wrote over the other's files, and which one was later is not known."""
        shutil.copy(directory / METADATA_NAME, directory / "__0.metadata")
        refused(directory, DamagedError, "of two saves")


class TestCode:
    """Pickles that run code when pickle loads them."""

    @pytest.mark.parametrize("how", ["os.system", "eval"])
    def test_the_whole_pickle(self, directory, how):
        """A pickle that calls a function is untrusted, the function is named, and was not called."""
        evil = Evil(directory / "ran", how)
        write_metadata(directory, evil)
        assert ("posix.system" if how == "os.system" else "builtins.eval") in refused(directory, UntrustedError)
        assert not (directory / "ran").exists()
        pickle.loads((directory / METADATA_NAME).read_bytes())  # it would have
        assert (directory / "ran").exists()

    @pytest.mark.parametrize("place", ["planner_data", "storage_meta", "storage_data", "version"])
    def test_nested(self, directory, place):
        """Nor does it run where it is a part of metadata that is otherwise in order."""
        rewrite(directory, lambda metadata: setattr(metadata, place, {"x": Evil(directory / "ran", "eval")}))
        refused(directory, UntrustedError, "builtins.eval")
        assert not (directory / "ran").exists()

    @pytest.mark.parametrize(
        "data",
        [
            b"cos\nsystem\n(S'x'\ntR.",
            b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
            b"\x80\x02ctorch.hub\nload\n.",
            b"\x80\x02ctorch\nload\n.",
            b"\x80\x02cbuiltins\ngetattr\n.",
        ],
    )
    def test_asking_is_enough(self, directory, data):
        """A global that is not in the table is refused when it is asked for, before any call."""
        (directory / METADATA_NAME).write_bytes(data)
        refused(directory, UntrustedError)


BOMBS = {
    "memo of 16 GB": b"\x80\x02Nr\xff\xff\xff\x7f.",
    "text of 2 ** 60 bytes": b"\x80\x04\x8d" + (1 << 60).to_bytes(8, "little") + b"x.",
    "bytes of 2 ** 60": b"\x80\x04\x8e" + (1 << 60).to_bytes(8, "little") + b"x.",
    "bytearray of 2 ** 60": b"\x80\x05\x96" + (1 << 60).to_bytes(8, "little") + b"x.",
    "number of 2 ** 31 bytes": b"\x80\x02\x8b\xff\xff\xff\x7f.",
    "frame of 2 ** 60 bytes": b"\x80\x04\x95" + (1 << 60).to_bytes(8, "little"),
    "key of 2 ** 64 atoms": b"\x80\x04}" + tuple_bomb() + b"Ns.",
    "a thousand copies of a list": b"\x80\x04]\x94("
    + b"K\x01" * 20_000
    + b"e0ctorch\nSize\n\x940"
    + b"h\x01h\x00\x85R" * 1000
    + b".",
    "a thousand calls with many arguments": b"\x80\x04("
    + b"N" * 200_000
    + b"t\x94ctorch.distributed.checkpoint.metadata\nMetadata\n\x94"
    + b"h\x01h\x00R" * 1000
    + b".",
    "set of 2 ** 64 atoms": b"\x80\x04\x8f(" + tuple_bomb() + b"\x90.",
    "lists in each other": b"\x80\x04" + b"]" * 10**5 + b"a" * (10**5 - 1) + b".",
    "a million marks": b"(" * 10**6 + b".",
    "stack underflow": b"\x80\x04aaa.",
    "mark underflow": b"\x80\x04u.",
    "extension registry": b"\x80\x02\x82\x01.",
    "call of a list": b"]]R.",
    "OrderedDict of a bomb": b"\x80\x04ccollections\nOrderedDict\n]" + tuple_bomb() + b"N\x86a\x85R.",
    "dict attributes": b"}}b.",
    "two million items": b"\x80\x04](" + b"N" * 2_000_000 + b"e.",
    "empty dicts alone": b"\x80\x02" + b"}" * 300_000 + b".",
    "empty lists alone": b"\x80\x02" + b"]" * 300_000 + b".",
    "tuples in each other": b"\x80\x02N" + b"\x85" * 300_000 + b".",
    "dicts of one item": b"\x80\x02" + b"}NNs" * 100_000 + b".",
    "a memo that leaves numbers out": b"\x80\x04Nr\x00\x00\x01\x00" + b"\x94" * 300_000 + b".",
    "ten thousand classes": b"\x80\x02" + b"".join(b"cx\nA%d\n" % n for n in range(10_000)) + b".",
}


@pytest.mark.parametrize("data", BOMBS.values(), ids=list(BOMBS))
def test_bombs(directory, data):
    """A small pickle can ask for much time or memory: it is refused before it gets them."""
    (directory / METADATA_NAME).write_bytes(data)
    refused(directory)


def test_a_bomb_in_each_field(directory):
    """A tuple of 2 ** 64 atoms in a field is neither hashed nor printed."""
    marker = "BOMB-HERE"
    fields = {
        "shape": lambda m: setattr(m.state_dict_metadata["model.z"], "size", marker),
        "offsets": lambda m: setattr(m.state_dict_metadata["model.z"].chunks[0], "offsets", marker),
        "dtype": lambda m: setattr(m.state_dict_metadata["model.z"].properties, "dtype", marker),
        "fqn": lambda m: object.__setattr__(next(iter(m.storage_data)), "fqn", marker),
        "offset": lambda m: object.__setattr__(next(iter(m.storage_data)), "offset", marker),
        "file": lambda m: setattr(next(iter(m.storage_data.values())), "relative_path", marker),
        "length": lambda m: setattr(next(iter(m.storage_data.values())), "length", marker),
        "path": lambda m: m.planner_data.update({"model.z": marker}),
        "version": lambda m: setattr(m, "version", marker),
        "transforms": lambda m: setattr(next(iter(m.storage_data.values())), "transform_descriptors", marker),
    }
    good = (directory / METADATA_NAME).read_bytes()
    for name, change in fields.items():
        (directory / METADATA_NAME).write_bytes(good)
        rewrite(directory, change)
        data = pickle.dumps(metadata_of(directory), protocol=2)  # no frames and no implicit memo numbers
        assert data.count(b"X\x09\x00\x00\x00BOMB-HERE") == 1
        (directory / METADATA_NAME).write_bytes(data.replace(b"X\x09\x00\x00\x00BOMB-HERE", _numbered_bomb()))
        if name == "transforms":  # some that are not known make no more than an entry that is not read
            with cheap(), pytest.raises(UnsupportedError, match="stored through transforms"):
                io.read_state(directory)
        else:
            refused(directory)


def _numbered_bomb():
    """Opcodes that leave a tuple of tuples of up to 2 ** 64 atoms, with memo numbers that nobody else uses."""
    start, depth = 10**6, 64
    code = b"\x88r" + start.to_bytes(4, "little")
    for number in range(start, start + depth):
        place, following = number.to_bytes(4, "little"), (number + 1).to_bytes(4, "little")
        code += b"j" + place + b"j" + place + b"\x86r" + following
    return b"(" + code + b"t"


def first_storage(metadata):
    """Return where the first item lies."""
    return next(iter(metadata.storage_data.values()))


def storage_of(metadata, name):
    """Return where the only chunk of a tensor lies."""
    return next(info for key, info in metadata.storage_data.items() if key.fqn == name)


def chunk(offsets, sizes):
    """Return a chunk as torch writes it."""
    return ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))


def z(metadata):
    """Return the metadata of the tensor of shape (4, 3)."""
    return metadata.state_dict_metadata["model.z"]


def split_z(metadata, *chunks):
    """Give the tensor other chunks, each stored somewhere of its own."""
    key, info = next((k, i) for k, i in metadata.storage_data.items() if k.fqn == "model.z")
    del metadata.storage_data[key]
    z(metadata).chunks = list(chunks)
    for number, one in enumerate(chunks):
        place = type(info)(f"part{number}", 0, 5000)
        metadata.storage_data[type(key)("model.z", one.offsets)] = place


def recursive_list():
    """Return a list that holds itself."""
    items = []
    items.append(items)
    return items


def recursive_dict():
    """Return a dict that holds itself."""
    items = {}
    items["model.z"] = items
    return items


LIES = {
    "no chunks": lambda m: setattr(z(m), "chunks", []),
    "gap": lambda m: split_z(m, chunk([0, 0], [1, 3]), chunk([2, 0], [2, 3])),
    "overlap of equal size": lambda m: split_z(m, chunk([0, 0], [2, 3]), chunk([1, 0], [2, 3])),
    "same twice": lambda m: split_z(m, chunk([0, 0], [2, 3]), chunk([0, 0], [2, 3])),
    "outside": lambda m: split_z(m, chunk([1, 0], [4, 3])),
    "negative offset": lambda m: split_z(m, chunk([-1, 0], [4, 3])),
    "negative size": lambda m: split_z(m, chunk([0, 0], [-4, -3])),
    "other rank": lambda m: split_z(m, chunk([0], [12])),
    "smaller shape": lambda m: setattr(z(m), "size", torch.Size([4, 2])),
    "larger shape": lambda m: setattr(z(m), "size", torch.Size([4, 4])),
    "huge shape": lambda m: (setattr(z(m), "size", torch.Size([1 << 40, 3])), split_z(m, chunk([0, 0], [1 << 40, 3]))),
    "more than 2 ** 62": lambda m: (setattr(z(m), "size", torch.Size([1 << 61, 1 << 61])), setattr(z(m), "chunks", [])),
    "65 dimensions": lambda m: (setattr(z(m), "size", torch.Size([1] * 65)), split_z(m, chunk([0] * 65, [1] * 65))),
    "no storage": lambda m: setattr(m, "storage_data", None),
    "empty storage": lambda m: setattr(m, "storage_data", {}),
    "key missing": lambda m: m.storage_data.pop(next(k for k in m.storage_data if k.fqn == "model.z")),
    "value's key missing": lambda m: m.storage_data.pop(next(k for k in m.storage_data if k.fqn == "lr")),
    "more elements than bytes": lambda m: setattr(storage_of(m, "model.z"), "length", 47),
    "no dtype": lambda m: setattr(z(m).properties, "dtype", None),
    "unknown dtype": lambda m: setattr(z(m).properties, "dtype", "float33"),
    "unknown item": lambda m: m.state_dict_metadata.update(x=3),
    "number for a name": lambda m: m.state_dict_metadata.update({3: BytesStorageMetadata()}),
    "recursive planner data": lambda m: m.planner_data.update({"model.z": recursive_list()}),
    "planner data in itself": lambda m: setattr(m, "planner_data", recursive_dict()),
    "planner data of text": lambda m: m.planner_data.update({"model.z": "model"}),
    "negative place in a list": lambda m: m.planner_data.update({"model.z": ("model", -1)}),
    "empty path": lambda m: m.planner_data.update({"model.z": ()}),
    "number for a version": lambda m: setattr(m, "version", 1),
    "one shared byte": lambda m: setattr(list(m.storage_data.values())[1], "offset", first_storage(m).length - 1),
    "shared bytes": lambda m: [setattr(i, "offset", 0) for i in m.storage_data.values()],
    **{
        f"path {path!r}": lambda m, path=path: setattr(first_storage(m), "relative_path", path)
        for path in [
            "../x",
            "/dev/zero",
            "a//b",
            "a/../b",
            "a/./b",
            "a/",
            "/",
            "s3://a/b",
            "a\\b",
            "x\0y",
            "x\ny",
            "\udc80",
            "",
            ".",
            "..",
            None,
            3,
            ["x"],
        ]
    },
    **{
        f"offset {offset!r}": lambda m, offset=offset: setattr(first_storage(m), "offset", offset)
        for offset in [-1, 1 << 62, 1 << 200, 0.0, True, None, "0"]
    },
    **{
        f"length {length!r}": lambda m, length=length: setattr(first_storage(m), "length", length)
        for length in [0, -1, 1 << 62, 1 << 200, 1.0, None]
    },
}


FOREIGN = {
    "a path of Python 3.13": lambda data: renamed(data, b"pathlib", b"pathlib._local"),
    "properties of torch 2.2": lambda data: renamed(
        data, b"torch.distributed.checkpoint.metadata", OLD.encode(), of=b"TensorProperties"
    ),
    "fields of older versions": lambda data: changed(data, older),
    "a path of Windows": lambda data: renamed(data, b"PosixPath", b"WindowsPath"),
    "an object of a stranger beside": lambda data: changed(data, lambda m: setattr(m, "extra", Stranger())),
    "a stranger in what is not needed": lambda data: changed(data, lambda m: setattr(m, "storage_meta", Stranger())),
}
OLD = "torch.distributed._shard.sharded_tensor.metadata"


class Stranger:
    """A class that this library does not know, as other planners and frameworks have."""


def renamed(data, old, new, of=None):
    """Return a pickle with another name in place of one, in frames that are as long as they say."""
    parts = [data[s:e] for s, e in itertools.pairwise([*(place for *_, place in pickletools.genops(data)), len(data)])]
    names = [n for n, part in enumerate(parts) if part[:1] == b"\x8c" and part[2:] == old]
    assert names or of
    if of:  # the module of one class alone: it stands in the memo before that, so it is given in place
        place = next(n for n, part in enumerate(parts) if part[:1] == b"\x8c" and part[2:] == of)
        names = [place - 2 if parts[place - 1] == b"\x94" else place - 1]
    for name in names:
        parts[name] = b"\x8c" + bytes([len(new)]) + new
    return b"".join(part for part in parts if part[:1] != b"\x95")


def changed(data, change):
    """Return a pickle of the changed metadata."""
    metadata = pickle.loads(data)
    change(metadata)
    return pickle.dumps(metadata)


def older(metadata):
    """Take away what metadata had not from the start."""
    for name in ("planner_data", "storage_meta", "version"):
        metadata.__dict__.pop(name, None)
    for info in metadata.storage_data.values():
        info.__dict__.pop("transform_descriptors", None)
    for key in metadata.storage_data:
        key.__dict__.pop("index", None)


@pytest.mark.parametrize("change", FOREIGN.values(), ids=list(FOREIGN))
def test_what_is_only_foreign_is_read(saved, directory, change):
    """Metadata of other versions of Python and torch, and of other frameworks, says the same."""
    data = (directory / METADATA_NAME).read_bytes()
    (directory / METADATA_NAME).write_bytes(change(data))
    assert (directory / METADATA_NAME).read_bytes() != data
    assert read_index(directory).tensors == read_index(saved).tensors
    found = {"model": {"z": torch.zeros(4, 3)}}
    io.load(found, directory)
    assert torch.equal(found["model"]["z"], STATE["model"]["z"])


UNREAD = {
    "transforms": (lambda m: setattr(storage_of(m, "model.a"), "transform_descriptors", ["x.zstd"]), "x.zstd"),
    "a stranger's description": (lambda m: m.state_dict_metadata.update({"model.a": Stranger()}), "Stranger"),
    "a stranger's place": (
        lambda m: m.storage_data.update({next(k for k in m.storage_data if k.fqn == "model.a"): Stranger()}), "Stranger"
    ),
    "quantized elements": (
        lambda m: setattr(m.state_dict_metadata["model.a"].properties, "dtype", torch.quint8), "quint8"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "reason"), UNREAD.values(), ids=list(UNREAD))
def test_what_is_not_read_hides_nothing_else(directory, change, reason):
    """One entry of a form that is not read is refused by name when it is asked for; the others load."""
    rewrite(directory, change)
    found = {"model": {"z": torch.zeros(4, 3)}}
    io.load(found, directory)
    assert torch.equal(found["model"]["z"], STATE["model"]["z"])
    with cheap(), pytest.raises(UnsupportedError, match=f"model.a is .*{reason}"):
        io.load({"model": {"a": torch.zeros(3).half()}}, directory)
    with cheap(), pytest.raises(UnsupportedError, match=f"model.a is .*{reason}"):
        io.read_state(directory)


def test_an_element_type_of_the_future(saved, directory):
    """A type that torch has no name for yet hides no tensor of another type."""
    (directory / METADATA_NAME).write_bytes(renamed((saved / METADATA_NAME).read_bytes(), b"float16", b"float7_e3m3"))
    index = read_index(directory)
    assert index.unsupported["model.a"].reason.endswith("torch.float7_e3m3")
    assert index.tensors.keys() == {"model.z", "model.scalar", "groups.1.empty"}


def test_another_version_is_unsupported(directory):
    """Metadata of another version is not called damaged or hostile."""
    rewrite(directory, lambda m: setattr(m, "version", "2.0.0"))
    assert "update ckptflow" in refused(directory, UnsupportedError)


def test_files_below_the_directory(directory):
    """A writer may put its files into directories below the metadata's."""
    (directory / "a" / "b").mkdir(parents=True)
    (directory / "__0_0.distcp").rename(directory / "a" / "b" / "x.distcp")
    rewrite(directory, lambda m: [setattr(i, "relative_path", "a/b/x.distcp") for i in m.storage_data.values()])
    assert torch.equal(io.read_state(directory)["model"]["z"], STATE["model"]["z"])


PLAIN_BYTES = [n for n in dtypes.NAMES if hasattr(torch, n) and not n.startswith(("int", "uint", "bits", "bool"))]


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("name", PLAIN_BYTES)
def test_types_of_plain_bytes(tmp_path, name, ours):
    """Whatever torch can or cannot compute with a type, its bytes come back; of our own saves and of torch's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensor = torch.arange(32, dtype=torch.uint8).view(getattr(torch, name)).clone()
        io.save({"t": tensor}, tmp_path / "d") if ours else dcp.save({"t": tensor}, checkpoint_id=tmp_path / "d")
        back = io.read_state(tmp_path / "d")["t"]
    assert back.dtype == tensor.dtype
    assert torch.equal(back.view(torch.uint8), tensor.view(torch.uint8))


INERT = [
    ("argparse", "Namespace"), ("datetime", "datetime"), ("pathlib", "PurePath"), ("numpy.core.multiarray", "scalar"),
    ("omegaconf.dictconfig", "DictConfig"), ("transformers.training_args", "TrainingArguments"), ("uuid", "UUID"),
    ("megatron.core.transformer.enums", "AttnBackend"), ("builtins", "ValueError"), ("torch", "float7_e3m3"),
    ("torch._utils", "_rebuild_qtensor"), ("_io", "BytesIO"), ("__builtin__", "set"), ("a.b", "_Private.Nested"),
    ("__builtin__", "xrange"), ("exceptions", "OSError"), ("UserList", "UserList"), ("numpy", "matrix"),
    ("numpy.rec", "recarray"), ("numpy.ma.core", "_mareconstruct"), ("collections", "deque"),
]  # fmt: skip
RUNNING = [
    ("os", "system"), ("posix", "system"), ("subprocess", "Popen"), ("builtins", "eval"), ("__builtin__", "getattr"),
    ("functools", "partial"), ("operator", "attrgetter"), ("torch", "load"), ("torch.hub", "load"),
    ("runpy", "run_path"),
    ("torch.jit", "CompilationUnit"), ("torch.storage", "_load_from_bytes"), ("numpy", "load"), ("pickle", "loads"),
    ("cloudpickle.cloudpickle", "CloudPickler"), ("a.b", "function"), ("a.b", "Class.method"), ("ctypes", "CDLL"),
    ("importlib", "import_module"), ("pathlib", "os.system"), ("torch", "Tensor.os"), ("webbrowser", "open"),
]  # fmt: skip


@pytest.mark.parametrize(("module", "name"), INERT)
def test_inert_classes_are_not_called_hostile(module, name):
    """What cannot run code is unsupported where it is not known, and the message tells nobody to keep away."""
    assert not may_run_code(module, name)
    with pytest.raises(UnsupportedError, match=re.escape(f"{module}.{name}")) as caught:
        pickles.loads(b"\x80\x04\x8c" + bytes([len(module)]) + module.encode() + _short(name) + b"\x93.", {}, "here")
    assert not re.search("hostile|run code|Do not load", str(caught.value))


def _short(text):
    return b"\x8c" + bytes([len(text)]) + text.encode()


@pytest.mark.parametrize(("module", "name"), RUNNING)
def test_what_could_run_code_is_untrusted(module, name):
    """Functions and classes that could run code are, wherever they are asked for."""
    for unknown in (False, True):
        with pytest.raises(UntrustedError, match="could run code"):
            pickles.loads(b"\x80\x04" + _short(module) + _short(name) + b"\x93.", {}, "here", unknown=unknown)


@pytest.mark.parametrize("change", LIES.values(), ids=list(LIES))
def test_contradictions(directory, change):
    """Metadata that cannot be true is damaged, and nothing is allocated for what it claims."""
    rewrite(directory, change)
    refused(directory)


def test_contradictions_as_json(saved, tmp_path):
    """The same lies told by the JSON twin, where JSON can tell them, are refused too."""
    told = 0
    for number, change in enumerate(LIES.values()):
        directory = Path(shutil.copytree(saved, tmp_path / str(number)))
        rewrite(directory, change)
        try:
            (directory / TWIN_NAME).write_text(json.dumps(_document(directory)))
        except (TypeError, AttributeError, KeyError, ValueError, RecursionError):
            continue  # JSON cannot say this
        assert TWIN_NAME in refused(directory)
        told += 1
    assert told > len(LIES) / 2


def _document(directory):
    """What a twin would say that believed everything."""
    metadata = metadata_of(directory)
    spans = {
        (key.fqn, None if key.offset is None else tuple(key.offset)): (i.relative_path, i.offset, i.length)
        for key, i in metadata.storage_data.items()
    }
    if metadata.version != "1.0.0" or any(i.transform_descriptors for i in metadata.storage_data.values()):
        raise ValueError("a twin does not say this")
    tensors = {
        name: {
            "dtype": None if item.properties.dtype is None else str(item.properties.dtype).removeprefix("torch."),
            "shape": tuple(item.size),
            "chunks": [(c.offsets, c.sizes, *spans[name, tuple(c.offsets)]) for c in item.chunks],
        }
        for name, item in metadata.state_dict_metadata.items()
        if not isinstance(item, BytesStorageMetadata)
    }
    values = {name: spans[name, None] for name in metadata.state_dict_metadata if name not in tensors}
    return {
        **BOUND,
        "metadata": _digest(directory),
        "tensors": tensors,
        "values": values,
        "paths": metadata.planner_data,
    }


BOUND = {"format_version": TWIN_VERSION, "metadata": "DIGEST"}


def _digest(directory):
    return digest_bytes((directory / METADATA_NAME).read_bytes(), ALGORITHM)


TWINS = {
    "empty": b"",
    "no JSON": b"{",
    "not UTF-8": b"\xff",
    "a list": b"[]",
    "null": b"null",
    "another version": b'{"format_version": 3, "tensors": {}, "values": {}, "paths": {}}',
    "no version": b'{"tensors": {}, "values": {}, "paths": {}}',
    "no tensors": b'{"format_version": 2, "metadata": "DIGEST", "values": {}, "paths": {}}',
    "a list of tensors": b'{"format_version": 2, "metadata": "DIGEST", "tensors": [], "values": {}, "paths": {}}',
    "a value of text": json.dumps({**BOUND, "tensors": {}, "values": {"x": "abc"}, "paths": {}}).encode(),
    "a path of text": json.dumps({**BOUND, "tensors": {}, "values": {}, "paths": {"x": "abc"}}).encode(),
    "nested a million deep": b"[" * 10**6,
    "a number of a million digits": b'{"format_version": ' + b"1" * 10**6 + b"}",
    "tensor and value": json.dumps(
        {
            **BOUND,
            "tensors": {"x": {"dtype": "int8", "shape": [1], "chunks": [[[0], [1], "f", 0, 9]]}},
            "values": {"x": ["f", 9, 9]},
            "paths": {},
        }
    ).encode(),
}


@pytest.mark.parametrize("data", TWINS.values(), ids=list(TWINS))
def test_bad_twins(directory, data):
    """A twin that is none is damaged: the pickle beside it is not asked instead."""
    (directory / TWIN_NAME).write_bytes(data.replace(b"DIGEST", _digest(directory).encode()))
    assert TWIN_NAME in refused(directory)


class TestLoading:
    """What the index cannot know, a load finds."""

    @pytest.mark.parametrize("dtype", [torch.int32, torch.bfloat16, torch.float64])
    def test_dtype_lie(self, directory, dtype):
        """An element type that is not the file's is damaged, of the same width or not."""
        rewrite(directory, lambda m: setattr(z(m).properties, "dtype", dtype))
        with cheap(), pytest.raises(DamagedError, match="the file holds float32"):
            io.read_state(directory)

    def test_shape_lie(self, directory):
        """A shape of as many elements that is not the file's is damaged."""

        def change(metadata):
            z(metadata).size = torch.Size([3, 4])
            z(metadata).chunks = [chunk([0, 0], [3, 4])]

        rewrite(directory, change)
        with cheap(), pytest.raises(DamagedError, match=r"\(4, 3\)"):
            io.read_state(directory)

    def test_a_tensor_retyped_as_a_value(self, directory):
        """A tensor that the metadata calls a value is of no use to a tensor."""

        def change(metadata):
            metadata.state_dict_metadata["model.z"] = BytesStorageMetadata()
            key, info = next((k, i) for k, i in metadata.storage_data.items() if k.fqn == "model.z")
            del metadata.storage_data[key]
            metadata.storage_data[type(key)("model.z")] = info

        rewrite(directory, change)
        with pytest.raises(CheckpointError, match=r"model.z has shape no tensor"):
            io.load({"model": {"z": torch.zeros(4, 3)}}, directory)

    @pytest.mark.parametrize("path", [("model", 10**12), ("model",), ("model", "z", "deeper"), ("lr",), (0, "x")])
    def test_paths_that_contradict_each_other(self, directory, path):
        """A list of a trillion items, a place inside a tensor and a place that is taken are damaged."""
        rewrite(directory, lambda m: m.planner_data.update({"model.a": path}))
        with cheap(), pytest.raises(DamagedError):
            io.read_state(directory)

    @pytest.mark.parametrize("spoil", [Path.unlink, lambda p: os.truncate(p, 100), lambda p: os.truncate(p, 0)])
    def test_shards_are_looked_at_first(self, directory, spoil):
        """A missing, cut or empty file is told before anything is read."""
        spoil(directory / "__0_0.distcp")
        with cheap(), pytest.raises(DamagedError, match=r"__0_0\.distcp"):
            io.read_state(directory)

    @pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
    def test_shards_that_are_no_files(self, directory, make):
        """A directory, a FIFO and a device in place of a shard are damaged."""
        (directory / "__0_0.distcp").unlink()
        make(directory / "__0_0.distcp")
        with cheap(), pytest.raises(DamagedError, match="not a regular file"):
            io.read_state(directory)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner, max_size=5) | st.tuples(inner, inner)
    ),
    max_leaves=30,
)


@settings(deadline=None, max_examples=100)
@given(PLAIN, st.sampled_from([2, 3, 4, 5]))
def test_plain_data_is_read_as_pickle_reads_it(value, protocol):
    """Plain data comes back equal, from every protocol that is in use."""
    assert pickles.loads(pickle.dumps(value, protocol), {}, "here") == value


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02]q\x01K\x05q\x02ah\x01h\x02\x86.",
        b"\x80\x04]q\x05}\x94h\x05h\x01\x86.",
        b"\x80\x04](K\x07q\x00K\x08q\x09K\x09q\x01K\x0a\x94e(h\x09h\x01h\x00h\x03t.",
    ],
    ids=["from 1", "one left out", "in any order"],
)
def test_memo_numbers_may_leave_some_out(data):
    """Numbers of the memo mean what they mean to pickle, whichever a pickle gives."""
    assert pickles.loads(data, {}, "here") == pickle.loads(data)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_the_protocol_says_nothing_else(saved, tmp_path, protocol):
    """Metadata says the same in every protocol, though only newer ones have the opcodes that are read in groups."""
    (tmp_path / METADATA_NAME).write_bytes(pickle.dumps(metadata_of(saved), protocol))
    assert read_index(tmp_path) == read_index(saved)


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data):
    """Whatever the bytes are, they are a value or one of two named errors."""
    with suppress(DamagedError, UntrustedError):
        pickles.loads(data, {}, "here")


def _grid(shape, cuts):
    """Cut a shape into boxes at the given places of each dimension."""
    edges = [sorted({0, size, *(c % (size + 1) for c in places)}) for size, places in zip(shape, cuts, strict=True)]
    sides = [list(itertools.pairwise(edge)) for edge in edges]
    return [
        (tuple(start for start, _ in sides), tuple(end - start for start, end in sides))
        for sides in itertools.product(*sides)
    ]


BOXES = st.lists(st.integers(1, 6), min_size=1, max_size=3).flatmap(
    lambda shape: st.tuples(st.just(tuple(shape)), st.tuples(*[st.lists(st.integers(0, 6), max_size=3)] * len(shape)))
)


@settings(deadline=None, max_examples=200)
@given(BOXES, st.randoms(use_true_random=False))
def test_a_grid_covers_its_shape(shape_and_cuts, random):
    """Boxes cut from a shape cover it in any order; without one, or with one twice, they do not."""
    shape, cuts = shape_and_cuts
    boxes = _grid(shape, cuts)
    random.shuffle(boxes)
    assert gap_or_overlap(shape, boxes) is None
    assert gap_or_overlap(shape, boxes[1:]) is not None
    assert gap_or_overlap(shape, [*boxes, boxes[0]]) is not None
    assert len(boxes) == 1 or gap_or_overlap(shape, [*boxes[1:], boxes[-1]]) is not None


@settings(deadline=None, max_examples=300)
@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=5
    )
)
def test_a_cover_is_what_counting_says(boxes):
    """Any boxes in a square cover it if and only if each element is counted once."""
    count = np.zeros((8, 8), dtype=int)
    for row, column, height, width in boxes:
        count[row : row + height, column : column + width] += 1
    found = gap_or_overlap((3, 3), [((row, column), (height, width)) for row, column, height, width in boxes])
    inside = all(row + height <= 3 and column + width <= 3 for row, column, height, width in boxes)
    assert (found is None) == (inside and bool((count[:3, :3] == 1).all()))


@settings(deadline=None, max_examples=300)
@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=5),
    st.integers(0, 2),
    st.randoms(use_true_random=False),
    st.sampled_from([None, "moved", "thinner"]),
)
def test_slabs_cover_what_counting_says(heights, dimension, random, damage):
    """Slabs along one dimension cover a shape in any order, unless one of them is changed so that counting says no."""
    edges = [0, *itertools.accumulate(heights)]
    shape = [2, 3, 2]
    shape[dimension] = edges[-1]
    boxes = []
    for start, height in zip(edges, heights, strict=False):
        offsets, sizes = [0, 0, 0], list(shape)
        offsets[dimension], sizes[dimension] = start, height
        boxes.append((offsets, sizes))
    if damage:
        part, place = random.choice(boxes)[damage == "thinner"], random.randrange(3)
        part[place] = max(0, part[place] - 1) if random.random() < 0.5 else part[place] + 1
    random.shuffle(boxes)
    count = np.zeros((40, 40, 40), dtype=int)
    for offsets, sizes in boxes:
        count[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))] += 1
    inside = all(o + s <= n for box in boxes for o, s, n in zip(*box, shape, strict=True))
    once = bool((count[: shape[0], : shape[1], : shape[2]] == 1).all())
    found = gap_or_overlap(tuple(shape), [(tuple(offsets), tuple(sizes)) for offsets, sizes in boxes])
    assert (found is None) == (inside and once)


def test_a_hundred_thousand_chunks_side_by_side_take_seconds():
    """However chunks lie, the time to check them grows with their number alone."""
    boxes = [((0, column), (1, 1)) for column in range(100_000)]
    with cheap(seconds=10):
        assert gap_or_overlap((1, 100_000), boxes) is None
        assert "overlap" in str(gap_or_overlap((1, 100_000), [*boxes[1:], boxes[5]]))


def test_scalars_and_empty_tensors_have_covers():
    """A scalar needs its one chunk; a tensor without elements needs none."""
    assert gap_or_overlap((), [((), ())]) is None
    assert gap_or_overlap((), []) is not None
    assert gap_or_overlap((0, 4), []) is None
    assert gap_or_overlap((0, 4), [((0, 0), (0, 4))]) is None


@pytest.mark.parametrize("on", [True, False])
def test_reading_leaves_the_collector_as_it_was(saved, tmp_path, on):
    """Whether cycles are collected is as it was before, after an error too."""
    (tmp_path / METADATA_NAME).write_bytes(b"no pickle")
    before = gc.isenabled()
    try:
        (gc.enable if on else gc.disable)()
        read_index(saved)
        with pytest.raises(DamagedError):
            read_index(tmp_path)
        assert gc.isenabled() == on
    finally:
        (gc.enable if before else gc.disable)()


def test_reading_writes_nothing(saved):
    """A directory is the same after it was read."""
    before = {p.name: p.stat().st_mtime_ns for p in saved.iterdir()}
    read_index(saved)
    io.read_state(saved)
    assert {p.name: p.stat().st_mtime_ns for p in saved.iterdir()} == before
