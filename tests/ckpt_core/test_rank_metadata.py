"""A save without collectives leaves metadata of each rank: merged where it agrees, refused by name where it differs."""

import pickle
import shutil
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from ckpt_core import io
from ckpt_core.errors import DamagedError, NotACheckpointError, UnsupportedError
from ckpt_core.export.conversion import metadata_digest
from ckpt_core.format.index import read_index
from ckpt_core.verify import verify


def save_rank(directory, rank, state, whole, offset):
    """Write what a rank writes of its `state`, in which `w` is the part from `offset` of `whole` elements."""
    apart = directory.parent / f"rank{rank}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=apart)
    metadata = pickle.loads((apart / ".metadata").read_bytes())
    item = metadata.state_dict_metadata["w"]
    item.size, item.chunks = torch.Size([whole]), [ChunkStorageMetadata(torch.Size([offset]), state["w"].shape)]
    for key, info in list(metadata.storage_data.items()):
        info.relative_path = f"__{rank}_0.distcp"
        if key.fqn == "w":
            del metadata.storage_data[key]
            metadata.storage_data[type(key)("w", torch.Size([offset]))] = info
    directory.mkdir(exist_ok=True)
    shutil.copy(apart / "__0_0.distcp", directory / f"__{rank}_0.distcp")
    (directory / f"__{rank}.metadata").write_bytes(pickle.dumps(metadata))


@pytest.fixture
def directory(tmp_path):
    """What two ranks saved: a sharded tensor, what is the same on both, and what is not."""
    for rank in range(2):
        state = {
            "w": torch.arange(3.0) + 3 * rank,
            "same": torch.ones(2),
            "n": 3,
            "mine": torch.ones(2) * rank,
            "v": rank,
        }
        save_rank(tmp_path / "dcp", rank, state | {f"only{rank}": torch.ones(1)}, 6, 3 * rank)
    return tmp_path / "dcp"


def test_what_agrees_is_read(directory):
    """Parts come together, and what each rank wrote equally is read once; what only one rank has is there, too."""
    target = {"w": torch.zeros(6), "same": torch.zeros(2), "n": 0, "only1": torch.zeros(1)}
    io.load(target, directory)
    assert target["w"].tolist() == [0, 1, 2, 3, 4, 5]
    assert (target["same"].tolist(), target["n"], target["only1"].tolist()) == ([1, 1], 3, [1])


@pytest.mark.parametrize(("name", "target"), [("mine", torch.zeros(2)), ("v", 0)])
def test_what_differs_is_refused(directory, name, target):
    """What each rank has another value of has no one value: it is refused by name, and hides nothing else."""
    with pytest.raises(UnsupportedError, match=f"{name} is another one on each rank"):
        io.load({name: target}, directory)


def test_verify(directory):
    """Every byte is checked, those of what differs too."""
    assert verify(directory).passed
    span = read_index(directory).unsupported["mine"].spans[1]
    data = bytearray((directory / span.file).read_bytes())
    place = data.index(torch.ones(2).numpy().tobytes(), span.offset)
    data[place] ^= 1
    (directory / span.file).write_bytes(data)
    assert [check.name for check in verify(directory).checks if not check.passed] == ["crc32"]
    assert metadata_digest(directory).startswith("sha256:")


@pytest.mark.parametrize(
    ("spoil", "kind", "match"),
    [
        (lambda d: (d / "__1.metadata").unlink(), DamagedError, "of rank 1, whose metadata"),
        (
            lambda d: [(d / f"__1{end}").unlink() for end in (".metadata", "_0.distcp")],
            DamagedError,
            "not all is there",
        ),
        (lambda d: (d / "__1.metadata").rename(d / "__2.metadata"), DamagedError, "none of rank 1"),
        (lambda d: (d / "__1_0.distcp").unlink(), DamagedError, "missing"),
        (lambda d: [p.unlink() for p in d.glob("*.metadata")], NotACheckpointError, "no .metadata"),
        (lambda d: shutil.copy(d / "__0.metadata", d / ".metadata"), DamagedError, "of two saves"),
        (lambda d: (d / "__1.metadata").write_bytes(b""), DamagedError, "__1.metadata"),
        (lambda d: shutil.copy(d / "__0.metadata", d / "__1.metadata"), DamagedError, "3 elements"),
    ],
)
def test_what_is_missing(directory, spoil, kind, match):
    """A rank's metadata, its file, or its part of a tensor."""
    spoil(directory)
    with pytest.raises(kind, match=match):
        io.load({"w": torch.zeros(6)}, directory)


def test_ranks_that_contradict_each_other(tmp_path):
    """A tensor of two shapes, and a name that is a tensor here and a value there, are of several saves."""
    save_rank(tmp_path / "dcp", 0, {"w": torch.ones(3), "x": torch.ones(1)}, 6, 0)
    save_rank(tmp_path / "dcp", 1, {"w": torch.ones(3)}, 7, 3)
    with pytest.raises(DamagedError, match="of several saves"):
        read_index(tmp_path / "dcp")
    save_rank(tmp_path / "other", 0, {"w": torch.ones(3), "x": torch.ones(1)}, 6, 0)
    shutil.rmtree(tmp_path / "rank1")
    save_rank(tmp_path / "other", 1, {"w": torch.ones(3), "x": 3}, 6, 3)
    with pytest.raises(DamagedError, match="x is a tensor in one rank's metadata"):
        read_index(tmp_path / "other")
