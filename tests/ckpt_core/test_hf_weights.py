"""The weights of a Hugging Face directory are what its index says, or there is none."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from small_models import assert_same

from ckpt_core.errors import CkptError, DamagedError, NotACheckpointError, UntrustedError
from ckpt_core.hf_weights import has_weights, read_weights
from ckpt_core.summary import summarize
from ckpt_core.tensors import open_tensors
from ckpt_core.verify import verify

INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
MAP = {"a": FIRST, "b": SECOND, "c": SECOND}


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Return a directory of two shards and an index."""
    save_file({"a": torch.ones(2)}, tmp_path / FIRST)
    save_file({"b": torch.ones(3), "c": torch.ones(1)}, tmp_path / SECOND)
    write_index(tmp_path, MAP)
    return tmp_path


def write_index(directory: Path, weight_map: Any) -> None:
    """Write an index."""
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_shards(sharded: Path) -> None:
    """Each tensor is found with its file; a stale file that the index does not name is left aside."""
    save_file({"z": torch.ones(1)}, sharded / "consolidated.safetensors")
    weights = read_weights(sharded)
    assert {name: tensor.parts[0][0] for name, tensor in weights.tensors.items()} == MAP
    assert weights.nbytes == 24


def test_an_index_and_a_single_file(sharded: Path) -> None:
    """A `model.safetensors` beside an index that does not name it is refused: either may be meant."""
    save_file({"a": torch.zeros(2)}, sharded / "model.safetensors")
    with pytest.raises(DamagedError, match=r"model\.safetensors that it does not name"):
        read_weights(sharded)
    for name in (FIRST, SECOND):
        (sharded / name).unlink()
    write_index(sharded, {"a": "model.safetensors"})
    assert set(read_weights(sharded).tensors) == {"a"}


def test_links_are_followed(sharded: Path, tmp_path: Path) -> None:
    """A Hub cache is made of links: they are read."""
    blob = sharded / FIRST
    blob.rename(sharded / "blob")
    blob.symlink_to(sharded / "blob")
    assert set(read_weights(sharded).tensors) == {"a", "b", "c"}


@pytest.mark.parametrize(
    ("weight_map", "said"),
    [
        ({**MAP, "a": "../outside.safetensors"}, "outside"),
        ({**MAP, "a": "/etc/outside.safetensors"}, "outside"),
        ({**MAP, "a": "below/outside.safetensors"}, "outside"),
        ({**MAP, "a": "..\\outside.safetensors"}, "outside"),
        ({**MAP, "a": "pytorch_model.bin"}, "pytorch_model.bin"),
        ({**MAP, "a": "nul\0.safetensors"}, "nul"),
        ({**MAP, "a": 5}, "'5'"),
        ({**MAP, "a": "missing.safetensors"}, "missing.safetensors: missing"),
        ({**MAP, "d": FIRST}, "d, which"),
        ({"a": FIRST, "b": SECOND}, "c, which"),
        ([FIRST], "list"),
        (None, "NoneType"),
    ],
)
def test_an_index_that_lies(sharded: Path, weight_map: Any, said: str) -> None:
    """Names that lead elsewhere, files that are missing, and tensors that are not where it says are refused."""
    save_file({"a": torch.ones(2)}, sharded.parent / "outside.safetensors")
    write_index(sharded, weight_map)
    with pytest.raises(DamagedError) as caught:
        read_weights(sharded)
    assert said in str(caught.value)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"{}", b"\xff", b"[" * 100_000])
def test_an_index_that_is_none(sharded: Path, text: bytes) -> None:
    """What is no JSON with a weight map is refused."""
    (sharded / INDEX).write_bytes(text)
    with pytest.raises(DamagedError, match="not a sound index"):
        read_weights(sharded)


def test_two_indexes(sharded: Path) -> None:
    """Of two indexes, neither is believed."""
    (sharded / "other.safetensors.index.json").write_text("{}")
    with pytest.raises(DamagedError, match="several indexes"):
        read_weights(sharded)


def test_one_name_in_two_files(sharded: Path) -> None:
    """Without an index, one name in two files is refused; the rest is read."""
    (sharded / INDEX).unlink()
    assert set(read_weights(sharded).tensors) == {"a", "b", "c"}
    save_file({"a": torch.zeros(2)}, sharded / "stale.safetensors")
    with pytest.raises(DamagedError, match="a lies in"):
        read_weights(sharded)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "last.ckpt"])
def test_pickles_are_refused_by_name(tmp_path: Path, name: str) -> None:
    """A directory with nothing but a pickle is refused, by the pickle's name, and it is not opened."""
    (tmp_path / name).mkdir()
    assert has_weights(tmp_path)
    with pytest.raises(UntrustedError, match=name):
        read_weights(tmp_path)


def test_nothing_there(tmp_path: Path) -> None:
    """An empty directory, and one that is not there, have no weights."""
    for place in (tmp_path, tmp_path / "none"):
        assert not has_weights(place)
        with pytest.raises(NotACheckpointError):
            read_weights(place)


def test_one_file(sharded: Path) -> None:
    """One safetensors file may be named by itself, and its errors are its own."""
    assert has_weights(sharded / FIRST)
    assert set(read_weights(sharded / FIRST).tensors) == {"a"}
    assert not has_weights(sharded / "none.safetensors")
    with pytest.raises(CkptError):
        read_weights(sharded / "none.safetensors")


Placed = dict[str, tuple[torch.Tensor, Any]]


def save_parts(directory: Path, *ranks: Placed) -> Path:
    """Write what each rank has of tensors, and where it begins, as torch's HuggingFaceStorageWriter does."""
    directory.mkdir(exist_ok=True)
    for number, parts in enumerate(ranks, start=1):
        information = json.dumps({name: {"saved_offsets": begin} for name, (_, begin) in parts.items()})
        tensors = {name: tensor.contiguous() for name, (tensor, _) in parts.items()}
        file = directory / f"shard-{number:05d}-model-00001-of-00001.safetensors"
        save_file(tensors, file, metadata={"DCP_SHARDING_INFO": information, "DCP_VERSION": "1.0", "format": "pt"})
    return directory


A = torch.arange(24.0).reshape(6, 4)


class TestParts:
    """Files of ranks that each hold parts of tensors."""

    def test_make_up_tensors(self, tmp_path: Path) -> None:
        """Rows, columns and blocks of a tensor, and what one rank holds whole, are read as whole tensors."""
        ranks: list[Placed] = [
            {"rows": (A[:4], [0, 0]), "blocks": (A[:4, :1], [0, 0]), "number": (torch.tensor(5.0), [])},
            {"rows": (A[4:], [4, 0]), "blocks": (A[4:, :1], [4, 0]), "columns": (A[:, :3], [0, 0])},
            {"blocks": (A[:, 1:], [0, 1]), "columns": (A[:, 3:], [0, 3])},
        ]
        with open_tensors(save_parts(tmp_path, *ranks)) as tensors:
            found = {name: torch.cat(list(tensors.blocks(name))).reshape(f.shape) for name, f in tensors.facts.items()}
            assert [len(tensors.facts[name].files) for name in ("rows", "blocks", "columns", "number")] == [2, 3, 2, 1]
        assert_same(dict(sorted(found.items())), {"blocks": A, "columns": A, "number": torch.tensor(5.0), "rows": A})
        assert verify(tmp_path).passed
        assert summarize(tmp_path).dtypes == {"float32": {"tensors": 4, "bytes": 4 * (3 * 24 + 1)}}

    @pytest.mark.parametrize(
        ("ranks", "said"),
        [
            ([{"a": (A[:2], [0, 0])}, {"a": (A[4:], [4, 0])}], "restore the files of all ranks"),
            ([{"a": (A[4:], [4, 0])}], "restore the files of all ranks"),
            ([{"a": (A[:4], [0, 0])}, {"a": (A[3:], [3, 0])}], "restore the files of all ranks"),
            ([{"a": (A, [0, 0])}, {"a": (A, [0, 0])}], "restore the files of all ranks"),
            ([{"a": (A[:4], [0, 0])}, {"a": (A[4:].half(), [4, 0])}], "differ in type"),
            ([{"a": (A[:4], [0, 0])}, {"a": (A[4:].reshape(8), [4])}], "differ in type"),
            ([{"a": (A, [0])}], "begins at"),
            ([{"a": (A, [0, -1])}], "no list of sizes"),
            ([{"a": (A, [0, 1 << 70])}], "no list of sizes"),
            ([{"a": (A, "00")}], "no list of sizes"),
        ],
    )
    def test_that_do_not(self, tmp_path: Path, ranks: list[Placed], said: str) -> None:
        """A part that is missing, there twice, of another type, or nowhere is damage; deleting is not advised."""
        with pytest.raises(DamagedError, match=said) as error:
            read_weights(save_parts(tmp_path, *ranks))
        assert "delete" not in str(error.value)
        assert "take" not in str(error.value)

    @pytest.mark.parametrize(
        "information", ["", "[]", "{", '{"b": {}}', '{"a": {}}', '{"a": []}', "9" * 5000, "[" * 9000]
    )
    def test_of_a_broken_record(self, tmp_path: Path, information: str) -> None:
        """A file whose record of its parts is none is damage."""
        file = tmp_path / "shard-00001-model-00001-of-00001.safetensors"
        save_file({"a": A}, file, metadata={"DCP_SHARDING_INFO": information})
        with pytest.raises(DamagedError, match="not a sound safetensors file"):
            read_weights(tmp_path)

    def test_and_whole_tensors(self, tmp_path: Path) -> None:
        """A tensor that is there in parts and whole is refused: which is meant is not known."""
        save_parts(tmp_path, {"a": (A[:4], [0, 0])}, {"a": (A[4:], [4, 0])})
        save_file({"a": A}, tmp_path / "consolidated.safetensors")
        with pytest.raises(DamagedError, match="nothing says which is meant"):
            read_weights(tmp_path)
