"""DCP directories are written with digests, by all ranks or not at all, and read without running anything."""

import io as streams
import itertools
import os
import pickle
import re
import resource
import shutil
import struct
import warnings
import zipfile
from collections import Counter, OrderedDict, deque
from pathlib import Path

import gloo_ranks
import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hostile_files import Evil, cheap, metadata_of, rewrite
from small_models import assert_same
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlanner
from torch.distributed.checkpoint.storage import WriteResult

from ckpt_core import io
from ckpt_core.errors import ArgumentError, CommitError, DamagedError, MismatchError, UnsupportedError, UntrustedError
from ckpt_core.format.index import METADATA_NAME, TWIN_NAME, read_index
from ckpt_core.format.manifest import record_file
from ckpt_core.io import DigestWriter, SafeLoadPlanner, SafeReader
from ckpt_core.urls import place_of
from ckpt_core.verify import verify

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu, torch.int64, torch.int32, torch.int16,
    torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8, torch.bool, torch.complex64, torch.complex128,
]  # fmt: skip


def state():
    """A state of every element type, with views, and values of every plain kind."""
    raw = torch.arange(64, dtype=torch.uint8)
    grid = torch.arange(24.0).reshape(4, 6)
    return {
        "types": {str(dtype): (raw % 2).bool() if dtype == torch.bool else raw.view(dtype) for dtype in DTYPES},
        "views": {
            "transposed": grid.t(),
            "columns": grid[:, 1:3],
            "expanded": torch.ones(1).expand(5),
            "conjugate": torch.complex(grid, grid).conj(),
            "negative": torch.complex(grid, grid).conj().imag,
            "scalar": torch.tensor(2.5),
            "empty": torch.empty(0, 3),
        },
        "plain": {
            "rate": 1e-3, "count": 2**80, "name": "grün", "none": None, "yes": True, "bytes": b"\x00\xff",
            "nested": [1, [2.5, {"a": (3, 4)}], {"inner": torch.arange(3)}], "ordered": OrderedDict(b=1, a=2),
            "counter": Counter("aab"), "set": {1, 2}, "complex": 1j, "dtype": torch.float16,
        },
    }  # fmt: skip


def blank(template):
    """The same state with other content."""
    if isinstance(template, dict):
        return {name: blank(value) for name, value in template.items()}
    if isinstance(template, torch.Tensor):
        return torch.zeros(template.shape, dtype=template.dtype)
    return None


def stock_save(value, directory):
    """Plain `dcp.save` in one process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(value, checkpoint_id=directory)


class TestSaving:
    """What a directory of ours is."""

    @pytest.mark.parametrize("twin", [False, True])
    def test_the_digests_are_the_files(self, tmp_path, twin):
        """The records name exactly the files that are there, with their sizes and digests."""
        records = io.save(state(), tmp_path / "dcp", twin=twin)
        assert records == {path.name: record_file(path) for path in (tmp_path / "dcp").iterdir()}
        assert set(records) == {METADATA_NAME, "__0_0.distcp"} | ({TWIN_NAME} if twin else set())

    def test_ours_is_read_back(self, tmp_path):
        """Tensors come back bit for bit, values equal and of the same type, nested as they were saved."""
        io.save(state(), tmp_path / "dcp")
        found = io.read_state(tmp_path / "dcp")
        expected = state()
        assert_same({k: found["types"][k] for k in expected["types"]}, expected["types"])
        for name, view in expected["views"].items():
            assert torch.equal(found["views"][name], view)
        assert found["plain"].keys() == expected["plain"].keys()
        for name, value in expected["plain"].items():
            assert_same(found["plain"][name], dict(value) if isinstance(value, dict) else value, name)

    @pytest.mark.filterwarnings("ignore")
    def test_plain_dcp_reads_ours(self, tmp_path):
        """Plain `dcp.load` fills a state from a directory of ours, bit for bit."""
        saved = {"types": state()["types"], "rate": 0.5}
        io.save(saved, tmp_path / "dcp", twin=True)
        found = blank(saved)
        dcp.load(found, checkpoint_id=tmp_path / "dcp")
        assert_same(found, saved)

    @pytest.mark.filterwarnings("ignore")
    def test_our_bytes_are_dcps(self, tmp_path):
        """The chunks are those that plain `dcp.save` writes, byte for byte, in the same order."""
        saved = {"w": torch.arange(6.0), "b": torch.ones(2, 2).half(), "rate": 0.5}
        io.save(saved, tmp_path / "ours")
        stock_save(saved, tmp_path / "stock")
        contents = [(tmp_path / kind / "__0_0.distcp").read_bytes() for kind in ("ours", "stock")]
        assert len(contents[0]) == len(contents[1])
        members = [_members(content) for content in contents]
        assert members[0] == members[1]
        assert read_index(tmp_path / "ours") == read_index(tmp_path / "stock")

    def test_every_chunk_has_its_crc(self, tmp_path):
        """The zips carry the true CRC32 of what they hold."""
        io.save({"w": torch.arange(6.0), "rate": 0.5}, tmp_path / "dcp")
        index = read_index(tmp_path / "dcp")
        data = (tmp_path / "dcp" / "__0_0.distcp").read_bytes()
        for span in index.spans():
            archive = zipfile.ZipFile(streams.BytesIO(data[span.offset : span.offset + span.length]))
            assert archive.testzip() is None
            assert all(info.CRC for info in archive.infolist())

    def test_a_small_part_of_a_large_tensor_is_written_small(self, tmp_path):
        """A view writes its elements, not the storage around them."""
        io.save({"row": torch.zeros(1000, 1000)[0]}, tmp_path / "dcp")
        assert (tmp_path / "dcp" / "__0_0.distcp").stat().st_size < 10_000

    def test_the_metadata_names_no_path(self, tmp_path):
        """Nothing tells where the checkpoint was made."""
        io.save({"w": torch.ones(1)}, tmp_path / "dcp", twin=True)
        for path in (tmp_path / "dcp").iterdir():
            assert tmp_path.name.encode() not in path.read_bytes()

    @pytest.mark.parametrize("name", ["__0_0.distcp", METADATA_NAME, TWIN_NAME])
    def test_nothing_is_overwritten(self, tmp_path, name):
        """A file that exists is an error, and keeps its content; a link is not followed."""
        (tmp_path / "dcp").mkdir()
        (tmp_path / "dcp" / name).write_bytes(b"mine")
        with pytest.raises(FileExistsError):
            io.save({"w": torch.ones(1)}, tmp_path / "dcp", twin=True)
        assert (tmp_path / "dcp" / name).read_bytes() == b"mine"
        (tmp_path / "dcp" / name).unlink()
        (tmp_path / "dcp" / name).symlink_to(tmp_path / "outside")
        shutil.rmtree(tmp_path / "dcp" / "__0_0.distcp", ignore_errors=True)
        with pytest.raises(FileExistsError):
            io.save({"w": torch.ones(1)}, tmp_path / "dcp", twin=True)
        assert not (tmp_path / "outside").exists()

    def test_a_full_disk_is_told_as_such(self, tmp_path):
        """ENOSPC reaches the caller with its number, though torch hides it behind an error of its own."""
        (tmp_path / "dcp").mkdir()
        with pytest.raises(OSError, match="No space left") as caught:
            _save_to_dev_full(tmp_path / "dcp")
        assert caught.value.errno == 28

    @pytest.mark.filterwarnings("ignore")
    def test_an_interrupt_stays_one(self, tmp_path):
        """Ctrl-C while saving is a KeyboardInterrupt, not a checkpoint's error."""

        class Interrupted(DigestWriter):
            def write_data(self, plan, planner):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt), io._plain_errors(CommitError):
            dcp.save({"w": torch.ones(1)}, storage_writer=Interrupted(tmp_path))

    @pytest.mark.filterwarnings("ignore")
    def test_a_plan_that_another_writer_left_is_taken(self, tmp_path, monkeypatch):
        """With plans cached, as for all writers of a process, each save has its own values and file names."""
        for name in [name for name in vars(SavePlanner) if name.startswith("_cached")]:
            monkeypatch.setattr(SavePlanner, name, {})
        planner = DefaultSavePlanner(enable_plan_caching=True)
        writers = [dcp.FileSystemWriter(tmp_path / "0"), DigestWriter(tmp_path / "1"), DigestWriter(tmp_path / "2")]
        for number, writer in enumerate(writers):
            dcp.save({"w": torch.full((2,), number)}, storage_writer=writer, planner=planner)
            assert io.read_state(tmp_path / str(number))["w"].tolist() == [number] * 2

    @pytest.mark.filterwarnings("ignore")
    def test_without_collectives_nothing_is_written(self, tmp_path):
        """One `.metadata` for each rank proves no whole: it is refused by name."""
        with pytest.raises(ArgumentError, match="use_collectives=False"):
            dcp.save({"w": torch.ones(1)}, storage_writer=DigestWriter(tmp_path / "dcp"), use_collectives=False)
        assert not (tmp_path / "dcp").exists()


def _members(data):
    """Name and content of all zips in a shard, but for the random id that torch gives each."""
    starts = [0]
    while (end := data.find(b"PK\x05\x06", starts[-1])) >= 0:
        starts.append(end + 22)
    zips = [zipfile.ZipFile(streams.BytesIO(data[a:b])) for a, b in itertools.pairwise(starts)]
    return [[(i.filename, z.read(i)) for i in z.infolist() if "serialization_id" not in i.filename] for z in zips]


def _save_to_dev_full(directory):
    """Save more than a buffer holds through a file that is always full."""
    real = os.open

    def full(path, flags, *mode, **options):
        return real("/dev/full", os.O_WRONLY) if str(path).endswith(".distcp") else real(path, flags, *mode, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", full)
        io.save({"w": torch.zeros(6_000_000), "v": torch.zeros(100)}, directory)


class Spoiling(DigestWriter):
    """Hands on other results than its own."""

    def __init__(self, path, change):
        super().__init__(path)
        self.change = change

    def finish(self, metadata, results):
        """Spoil the results of all ranks first."""
        self.change(results)
        super().finish(metadata, results)


def foreign(results):
    """Report a chunk that nobody planned."""
    index = MetadataIndex("stranger", [0])
    results[0].append(WriteResult(index=index, size_in_bytes=1, storage_data=_StorageInfo("__0_0.distcp", 0, 1)))


class TestCompleteness:
    """Every planned chunk is stored exactly once."""

    @pytest.mark.parametrize(
        "change",
        [lambda r: r[0].pop(), lambda r: r[0].append(r[0][0]), lambda r: r.clear(), foreign],
        ids=["lost", "doubled", "all lost", "foreign"],
    )
    @pytest.mark.filterwarnings("ignore")
    def test_results_are_compared_with_the_plan(self, tmp_path, change):
        """A lost, doubled or foreign result is a CommitError, and no metadata is written."""
        with pytest.raises(CommitError, match="Nothing was committed"), io._plain_errors(CommitError):
            dcp.save({"w": torch.ones(2), "rate": 1}, storage_writer=Spoiling(tmp_path / "dcp", change))
        assert not (tmp_path / "dcp" / METADATA_NAME).exists()

    def test_ranks_write_a_file_each(self, tmp_path):
        """Two ranks write a file each, and each knows the records of what it wrote itself."""
        outcomes = gloo_ranks.values(gloo_ranks.run_ranks(2, save_on_ranks, str(tmp_path / "dcp")))
        assert [sorted(records) for records in outcomes] == [
            [METADATA_NAME, TWIN_NAME, "__0_0.distcp"],
            ["__1_0.distcp"],
        ]
        written = {name: record for records in outcomes for name, record in records.items()}
        assert written == {path.name: record_file(path) for path in (tmp_path / "dcp").iterdir()}

    def test_a_rank_that_fails_is_every_ranks_error(self, tmp_path):
        """An OSError on one rank is raised on both, and no metadata is written."""
        outcomes = gloo_ranks.run_ranks(2, fail_on_rank_1, str(tmp_path / "dcp"))
        assert ["FileExistsError" in outcome.errors for outcome in outcomes] == [True, True]
        assert not (tmp_path / "dcp" / METADATA_NAME).exists()


def save_on_ranks(directory):
    """Save a sharded tensor."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    sharded = distribute_tensor(torch.arange(10.0).reshape(5, 2), init_device_mesh("cpu", (2,)), [Shard(0)])
    return io.save({"w": sharded, "same": torch.ones(3)}, Path(directory), twin=True)


def fail_on_rank_1(directory):
    """Save where the other rank's file exists already."""
    import torch.distributed as dist

    if dist.get_rank() == 1:
        Path(directory).mkdir(exist_ok=True)
        (Path(directory) / "__1_0.distcp").write_bytes(b"mine")
    dist.barrier()
    save_on_ranks(directory)


class TestLoading:
    """Into tensors, straight, and only if they fit."""

    @pytest.fixture
    def saved(self, tmp_path):
        """A directory of plain `dcp.save`."""
        value = {"model": {"w": torch.arange(12.0).reshape(4, 3), "b": torch.ones(3)}, "rate": 0.5}
        stock_save(value, tmp_path / "dcp")
        return tmp_path / "dcp"

    def test_in_place(self, saved):
        """A load fills the very tensors that it is given."""
        w = torch.zeros(4, 3)
        target = {"model": {"w": w, "b": torch.zeros(3)}, "rate": None}
        io.load(target, saved)
        assert target["model"]["w"] is w
        assert torch.equal(w, torch.arange(12.0).reshape(4, 3))
        assert target["rate"] == 0.5

    @pytest.mark.parametrize("planner", [None, "ours"])
    @pytest.mark.filterwarnings("ignore")
    def test_our_reader_under_plain_dcp_load(self, saved, planner):
        """`SafeReader` serves plain `dcp.load`, with DCP's own planner and with ours."""
        target = {"model": {"w": torch.zeros(4, 3), "b": torch.zeros(3)}, "rate": None}
        dcp.load(target, storage_reader=SafeReader(saved), planner=planner and SafeLoadPlanner(saved))
        assert torch.equal(target["model"]["w"], torch.arange(12.0).reshape(4, 3))
        assert target["rate"] == 0.5

    def test_a_cast(self, saved):
        """A target of another element type gets the values, cast."""
        target = {"model": {"w": torch.zeros(4, 3, dtype=torch.bfloat16)}}
        io.load(target, saved)
        assert torch.equal(target["model"]["w"], torch.arange(12.0).reshape(4, 3).bfloat16())

    def test_a_strided_target(self, saved):
        """A target that is not contiguous is filled in place."""
        wide = torch.full((3, 8), -1.0)
        target = {"model": {"w": wide.t()[::2]}}
        io.load(target, saved)
        assert torch.equal(wide[:, ::2], torch.arange(12.0).reshape(4, 3).t())
        assert torch.equal(wide[:, 1::2], torch.full((3, 4), -1.0))

    @pytest.mark.parametrize("target", [torch.zeros(3, 4), torch.zeros(12), torch.zeros(4, 3, 1), 3, None])
    def test_another_shape_or_kind(self, saved, target):
        """A target of another shape, or none at all, is a MismatchError before anything is read."""
        b = torch.zeros(3)
        with pytest.raises(MismatchError, match=r"model\.w has shape \(4, 3\)"):
            io.load({"model": {"b": b, "w": target}}, saved)
        assert not b.any()

    def test_a_name_that_is_not_there(self, saved):
        """A name that the checkpoint lacks is a MismatchError, or left alone in a partial load."""
        target = {"model": {"w": torch.zeros(4, 3), "new": torch.full((2,), 7.0)}}
        with pytest.raises(MismatchError, match=r"lacks 1 of the 2 entries.*model\.new"):
            io.load(target, saved)
        assert not target["model"]["w"].any()
        io.load(target, saved, partial=True)
        assert target["model"]["w"].any()
        assert torch.equal(target["model"]["new"], torch.full((2,), 7.0))

    def test_other_ranks_read_their_parts(self, tmp_path):
        """Three ranks read what two saved, each its own part, across the borders of the chunks."""
        gloo_ranks.values(gloo_ranks.run_ranks(2, save_on_ranks, str(tmp_path / "dcp")))
        parts = gloo_ranks.values(gloo_ranks.run_ranks(3, load_on_ranks, str(tmp_path / "dcp")))
        assert torch.equal(torch.cat(parts), torch.arange(10.0).reshape(5, 2))

    def test_damage_on_one_rank_is_every_ranks_error(self, tmp_path):
        """A damaged shard that only one rank reads ends the load on all of them."""
        gloo_ranks.values(gloo_ranks.run_ranks(2, save_on_ranks, str(tmp_path / "dcp")))
        shard = tmp_path / "dcp" / "__1_0.distcp"
        data = bytearray(shard.read_bytes())
        place = data.index(torch.arange(10.0).reshape(5, 2)[3:].numpy().tobytes())
        data[place] ^= 1
        shard.write_bytes(data)
        outcomes = gloo_ranks.run_ranks(2, load_on_ranks, str(tmp_path / "dcp"))
        assert ["DamagedError" in outcome.errors for outcome in outcomes] == [True, True]
        assert "CRC32" in outcomes[0].text


def load_on_ranks(directory):
    """Load a sharded tensor; return this rank's part."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    target = {"w": distribute_tensor(torch.zeros(5, 2), mesh, [Shard(0)])}
    io.load(target, Path(directory))
    return target["w"].to_local()


def with_value(directory, data):
    """Put the bytes of a value in place of those that a directory has for `rate`."""
    metadata = metadata_of(directory)
    key = next(key for key in metadata.storage_data if key.fqn == "rate")
    (directory / "evil").write_bytes(data)
    metadata.storage_data[key] = _StorageInfo("evil", 0, len(data))
    (directory / METADATA_NAME).write_bytes(pickle.dumps(metadata))


def saved_value(value):
    """What `torch.save` writes."""
    buffer = streams.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


class Words(list):
    """A list of somebody's."""


class NoPlainData:
    """A class of somebody's, which unpickling would have to import."""


BOMB = (
    b"\x80\x02}"
    + b"\x88\x85q\x00"
    + b"".join(b"h" + bytes([n]) + b"h" + bytes([n]) + b"\x86q" + bytes([n + 1]) for n in range(60))
)


def crafted_value(pickled):
    """A value's zip with a pickle that no pickler would write."""
    buffer = streams.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in {"data.pkl": pickled, "byteorder": b"little", "version": b"3\n"}.items():
            archive.writestr(f"archive/{name}", content)
    return buffer.getvalue()


class TestValues:
    """Values are pickles, so they are read with care."""

    @pytest.fixture
    def saved(self, tmp_path):
        """A directory with one value."""
        stock_save({"rate": 0.5}, tmp_path / "dcp")
        return tmp_path / "dcp"

    @pytest.mark.parametrize("how", ["os.system", "eval"])
    @pytest.mark.filterwarnings("ignore")
    def test_an_evil_value(self, saved, tmp_path, how):
        """A value that would call a function is untrusted by every way of reading; the function is not called."""
        with_value(saved, saved_value(Evil(tmp_path / "ran", how)))
        for read in (
            lambda: io.read_state(saved),
            lambda: io.load({"rate": None}, saved),
        ):
            with pytest.raises(UntrustedError, match=r"rate: not plain data.*(posix\.system|__builtin__\.eval)"):
                read()
        with pytest.raises(UntrustedError), io._plain_errors(DamagedError):
            dcp.load({"rate": None}, storage_reader=SafeReader(saved))
        assert not (tmp_path / "ran").exists()
        dcp.load({"rate": None}, checkpoint_id=saved)
        assert (tmp_path / "ran").exists()  # plain dcp.load would have

    @pytest.mark.parametrize(
        "value",
        [deque([1, 2]), Words([1]), range(3), ValueError("x"), 2**5000, np.dtype("f4"), np.ma.array([1])],
        ids=lambda value: type(value).__name__,
    )
    def test_what_is_only_foreign(self, saved, value):
        """Objects of the standard library, of somebody's containers and of numpy are unsupported, and no damage."""
        with_value(saved, saved_value(value))
        with pytest.raises(UnsupportedError, match="rate") as caught:
            io.read_state(saved)
        assert not re.search("hostile|run code|damaged", str(caught.value))
        assert verify(saved).passed

    def test_a_class_of_somebodys(self, saved):
        """An object that is not plain data is saved by DCP, and refused on load with its class's name."""
        with_value(saved, saved_value(NoPlainData()))
        with pytest.raises(UnsupportedError, match="NoPlainData"):
            io.read_state(saved)

    @pytest.mark.parametrize(
        "data",
        [
            b"",
            b"x" * 100,
            pickle.dumps(0.5),
            crafted_value(BOMB + b"N" + b"s."),
            crafted_value(b"\x80\x02cbuiltins\nbytearray\n\x8a\x06\x00\x00\x00\x00\x00\x01\x85R."),
            crafted_value(b"\x80\x02]" + b"]" * 10**5 + b"a" * 10**5 + b"."),
            crafted_value(b""),
        ],
        ids=["empty", "no zip", "a bare pickle", "hash bomb", "bytearray", "deep", "no pickle"],
    )
    def test_values_that_are_none(self, saved, data):
        """A value that is no value, or that asks for much, is a named error, soon and in little memory."""
        with_value(saved, data or b"\0")
        with cheap(), pytest.raises((DamagedError, UntrustedError)):
            io.read_state(saved)

    def test_a_memo_bomb(self, saved):
        """A memo number of two billion takes no memory: the value is read."""
        with_value(saved, crafted_value(b"\x80\x02Nr\xff\xff\xff\x7f."))
        with cheap():
            assert io.read_state(saved) == {"rate": None}

    @pytest.mark.parametrize(
        "value",
        [
            np.float64(0.1), np.float16(0.5), np.int32(-7), np.bool_(True), np.complex64(1 + 2j), np.str_("\u00e4x"),
            np.bytes_(b"ab"), np.arange(6.0).reshape(2, 3), np.asfortranarray(np.arange(6).reshape(3, 2)), np.array(3),
            np.empty((0, 3), np.int8), np.arange(4, dtype=">i2"), np.array(["a", "bc"]),
        ],
    )  # fmt: skip
    def test_numbers_and_arrays_of_numpy(self, saved, value):
        """They come back equal and of their type, made of their bytes alone; so with tensors in the same value."""
        tensor = torch.arange(6.0).reshape(2, 3).t()
        with_value(saved, saved_value({"n": [value, (value,)], "t": tensor, "b": b"x", "h": torch.ones(2).bfloat16()}))
        found = io.read_state(saved)["rate"]
        for each in (found["n"][0], found["n"][1][0]):
            assert (type(each), each.dtype, each.shape) == (type(value), value.dtype.newbyteorder("="), value.shape)
            assert np.array_equal(each, value)
        assert torch.equal(found["t"], tensor)
        assert (found["b"], found["h"].tolist()) == (b"x", [1, 1])

    @pytest.mark.parametrize(
        "value",
        [np.array([1, "a"], dtype=object), np.zeros(1, [("a", "f4")]), np.datetime64("2020-01-01"), np.void(b"x")],
    )
    def test_other_types_of_numpy(self, saved, value):
        """Arrays of objects, of fields and of times are unsupported."""
        with_value(saved, saved_value(value))
        with pytest.raises(UnsupportedError, match="numpy's type"):
            io.read_state(saved)

    @pytest.mark.parametrize(
        "change",
        [
            (b"i4", b"i8"), (b"i4", b"i1"), (b"i4", b"O8"), (b"i4", b"V4"), (b"K\x03\x85", b"K\xff\x85"),
            (b"K\x03\x85", b"N\x85"), (b"latin1", b"latin2"), (b"X\x01\x00\x00\x00<", b"X\x01\x00\x00\x00?"),
        ],
    )  # fmt: skip
    def test_arrays_that_contradict_themselves(self, saved, change):
        """A shape, a type or an order that the bytes do not have is an error, and never memory that is not theirs."""
        data = saved_value(np.arange(3, dtype="i4"))
        with zipfile.ZipFile(streams.BytesIO(data)) as archive:
            [name] = [name for name in archive.namelist() if name.endswith("data.pkl")]
            pickled = archive.read(name)
        assert change[0] in pickled
        with_value(saved, crafted_value(pickled.replace(*change)))
        with cheap(), pytest.raises((DamagedError, UnsupportedError)):
            io.read_state(saved)

    def test_a_deflated_value(self, saved):
        """A compressed value is not inflated."""
        buffer = streams.BytesIO()
        with zipfile.ZipFile(buffer, "w", compression=zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data.pkl", b"\0" * (100 << 20))
        with_value(saved, buffer.getvalue())
        with cheap(), pytest.raises(UnsupportedError, match="compressed"):
            io.read_state(saved)


def test_values_come_first_in_a_file(tmp_path):
    """Items are written values first, so that tensors lie together."""
    io.save({"w": torch.ones(2), "rate": 1, "v": torch.ones(2)}, tmp_path)
    index = read_index(tmp_path)
    last_value = max(span.offset for span in index.values.values())
    assert all(chunk.span.offset > last_value for entry in index.tensors.values() for chunk in entry.chunks)


def test_a_url_is_not_overwritten(tmp_path):
    """A second save to a URL is an error, and what was there is whole."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"w": torch.ones(4)}, storage_writer=DigestWriter("memory://once/dcp"))
        with pytest.raises(dcp.CheckpointException, match="never overwritten"):
            dcp.save({"w": torch.zeros(4)}, storage_writer=DigestWriter("memory://once/dcp"))
    assert torch.equal(io.read_state(place_of("memory://once/dcp"))["w"], torch.ones(4))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [torch.quint8, torch.qint32, torch.sparse_coo])
def test_what_could_not_be_read_back_is_not_written(tmp_path, kind):
    """A tensor of a type or layout that the reader does not know is an error that names it, and no checkpoint."""
    ones = torch.ones(4)
    tensor = ones.to_sparse() if kind == torch.sparse_coo else torch.quantize_per_tensor(ones, 0.1, 0, kind)
    with pytest.raises(ArgumentError, match=r"w: .*could not be read back"):
        io.save({"w": tensor}, tmp_path)
    assert not (tmp_path / METADATA_NAME).exists()


def test_more_files_than_may_be_open(tmp_path):
    """A checkpoint of more ranks than a process may have files open is read."""
    io.save({f"t{n:03d}": torch.full((2,), n) for n in range(300)}, tmp_path)
    data = (tmp_path / "__0_0.distcp").read_bytes()

    def spread(metadata):
        for number, (key, found) in enumerate(sorted(metadata.storage_data.items(), key=lambda item: item[0].fqn)):
            (tmp_path / f"__{number}_0.distcp").write_bytes(data[found.offset : found.offset + found.length])
            metadata.storage_data[key] = _StorageInfo(f"__{number}_0.distcp", 0, found.length)

    rewrite(tmp_path, spread)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 40, hard))
    try:
        found = io.read_state(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert all(torch.equal(found[f"t{n:03d}"], torch.full((2,), n)) for n in range(300))


def test_a_value_whose_members_share_bytes(tmp_path):
    """A zip whose directory names the same bytes again and again is refused, in little memory."""
    io.save({"rate": 0.5}, tmp_path)
    entries, record = 2000, b"x" * 100_000
    local = struct.pack("<4s5H3I2H", b"PK\x03\x04", *[0] * 8, 9, 0) + b"archive/a"
    entry = [
        struct.pack("<4s6H3I5H2I", b"PK\x01\x02", *[0] * 6, 0, len(record), len(record), 12, *[0] * 6) + b"a/%010d" % n
        for n in range(entries)
    ]
    directory = b"".join(entry)
    start = len(local) + len(record)
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, entries, entries, len(directory), start, 0)
    with_value(tmp_path, local + record + directory + end)
    with cheap(), pytest.raises(DamagedError, match="more bytes"):
        io.read_state(tmp_path)
