"""`diff` says, tensor by tensor, how two checkpoints or exports differ."""

import json
import tracemalloc
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from small_adapters import adapted, adapter_directory
from small_transformers import checkpoint_of, model_of, tokenizer

from ckpt_core import PyTorchCheckpoint, open_checkpoint
from ckpt_core.diff import Diff, TensorDiff, diff
from ckpt_core.errors import MismatchError, NotACheckpointError, UntrustedError
from ckpt_core.export import convert, convert_checkpoint
from ckpt_core.export.assets import read_assets
from ckpt_core.export.imports import import_hf
from ckpt_core.native_checkpoint import save_checkpoint
from ckpt_core.retention import Retention
from ckpt_core.store import open_store
from ckpt_core.tensors import open_tensors

BASE = {
    "a": torch.arange(6.0).reshape(2, 3),
    "half": torch.ones(4, dtype=torch.bfloat16),
    "flags": torch.tensor([True, False]),
    "empty": torch.empty(0, 3),
    "number": torch.tensor(2.5),
}


def save_dcp(state: dict[str, object], directory: Path) -> Path:
    """Plain `dcp.save`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=directory)
    return directory


def save_hf(state: dict[str, torch.Tensor], directory: Path) -> Path:
    """One safetensors file."""
    directory.mkdir()
    save_file(state, directory / "model.safetensors")
    return directory


def by_name(found: Diff) -> dict[str, TensorDiff]:
    """Return the tensors of a diff by their names."""
    return {tensor.name: tensor for tensor in found.tensors}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with a step of a model with tied embeddings, its export, and one in bfloat16."""
    place = tmp_path_factory.mktemp("diff")
    tokenizer().save_pretrained(place / "words")
    step = PyTorchCheckpoint(module=model_of("llama tied")).save(place / "store", step=1, assets=place / "words")
    checkpoint = open_checkpoint(step.url)
    convert_checkpoint(checkpoint, place / "export", max_shard_bytes=4000)
    convert_checkpoint(checkpoint, place / "half", dtype="bfloat16")
    (place / "step").symlink_to(checkpoint.path)
    return place


@pytest.mark.parametrize("save_a", [save_dcp, save_hf])
@pytest.mark.parametrize("save_b", [save_dcp, save_hf])
def test_every_kind_of_difference(tmp_path: Path, save_a, save_b) -> None:
    """Missing on either side, another shape, another type, other values: each is told, in any combination."""
    other = {**BASE, "a": BASE["a"] + torch.tensor([0.0, 0.0, 0.5]), "half": torch.ones(4), "flags": torch.ones(3)}
    del other["number"]
    other["new"] = torch.ones(1)
    found = diff(save_a(BASE, tmp_path / "a"), save_b(other, tmp_path / "b"))
    assert {name: tensor.status for name, tensor in by_name(found).items()} == {
        "a": "differs", "half": "dtype", "flags": "shape", "empty": "equal", "number": "only in a", "new": "only in b",
    }  # fmt: skip
    distance = by_name(found)["a"].distance
    assert distance is not None
    assert (distance.elements, distance.differing, distance.max_abs) == (6, 2, 0.5)
    half = by_name(found)["half"].distance
    assert half is not None
    assert half.differing == 0
    assert not found.equal
    assert found.counts == {"differs": 1, "dtype": 1, "shape": 1, "equal": 1, "only in a": 1, "only in b": 1}


@pytest.mark.parametrize("save_a", [save_dcp, save_hf])
@pytest.mark.parametrize("save_b", [save_dcp, save_hf])
def test_equal_bit_for_bit(tmp_path: Path, save_a, save_b) -> None:
    """The same tensors are equal, whatever holds them, and the result is JSON without NaN."""
    found = diff(save_a(BASE, tmp_path / "a"), save_b(BASE, tmp_path / "b"))
    assert found.equal
    assert found.counts == {"equal": 5}
    document = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert (document["equal"], document["tensors"][0]["a"]["shape"]) == (True, [2, 3])


def test_a_step_and_its_export(made: Path) -> None:
    """An export lacks the wrapper's prefix and a tied tensor's second name, and is equal all the same."""
    for a, b in ((made / "step", made / "export"), (made / "export", made / "step" / "model")):
        found = diff(a, b)
        assert found.equal, found
        assert found.prefix == "model."
        assert by_name(found)["lm_head.weight"].status == "tied"
        assert by_name(found)["model.norm.weight"].status == "equal"


@pytest.mark.parametrize("name", ["mixtral", "llava", "gemma3 with images", "bert", "t5", "marian", "granite hybrid"])
def test_a_checkpoint_and_an_export_that_is_rearranged(tmp_path: Path, name: str) -> None:
    """Experts that are fused, other names, computed positions and tied biases: an export is its checkpoint's equal."""
    model = model_of(name)
    directory, assets = checkpoint_of(model, tmp_path / "saved")
    export = convert(directory, tmp_path / "export", assets=assets).path
    imported = import_hf(export, tmp_path / "imported").path
    for checkpoint in (directory, imported):
        for a, b in ((checkpoint, export), (export, checkpoint)):
            found = diff(a, b)
            assert found.equal, found.counts
            assert found.counts["equal"] == len(load_file(export / "model.safetensors"))


def test_one_expert_that_differs(tmp_path: Path) -> None:
    """Of experts that are fused in the checkpoint the one that changed is named, and one that is missing."""
    directory, assets = checkpoint_of(model_of("mixtral"), tmp_path / "saved")
    export = convert(directory, tmp_path / "export", assets=assets).path
    state = load_file(export / "model.safetensors")
    changed, gone = (f"model.layers.1.block_sparse_moe.experts.{n}.w2.weight" for n in (1, 2))
    state[changed][0, 0] += 1
    del state[gone]
    save_file(state, export / "model.safetensors")
    found = diff(directory, export)
    assert found.counts == {"equal": len(state) - 1, "differs": 1, "only in a": 1}
    assert by_name(found)[changed].distance.differing == 1
    assert by_name(found)[gone].status == "only in a"


def test_rows_that_an_export_lacks(tmp_path: Path) -> None:
    """An embedding that was trimmed is of another shape, whatever else of the model is rearranged."""
    model = model_of("mixtral")
    _, assets = checkpoint_of(model, tmp_path / "saved")
    state = model.state_dict()
    padded = {n: torch.cat([t, torch.ones(8, 16)]) for n, t in state.items() if t.shape[:1] == (40,)}
    directory = save_dcp({"model": {**state, **padded}}, tmp_path / "dcp")
    trimmed = save_dcp({"model": state}, tmp_path / "trimmed")
    found = diff(directory, convert(trimmed, tmp_path / "export", assets=assets).path)
    assert {name for name, tensor in by_name(found).items() if tensor.status == "shape"} == {*padded}
    assert {tensor.status for tensor in found.tensors} == {"shape", "equal"}


def test_an_adapter_and_its_export(tmp_path: Path) -> None:
    """Of a model with a LoRA adapter, the adapter is compared with what PEFT's format has of it."""
    model = adapted("llama whole")
    save_checkpoint(model, str(tmp_path / "dcp"))
    assets = read_assets(adapter_directory(model, tmp_path / "assets"))
    export = convert(tmp_path / "dcp", tmp_path / "export", assets=assets).path
    found = diff(tmp_path / "dcp", export)
    assert found.counts == {"equal": len(load_file(export / "adapter_model.safetensors"))}


def test_an_open_step_is_leased(tmp_path: Path) -> None:
    """No pruner deletes a step while its tensors are open; afterwards it may."""
    saved = [PyTorchCheckpoint(torch.nn.Linear(2, 2)).save(tmp_path, step=step, run="r") for step in (1, 2)]
    keep = Retention(keep_last=1)
    with open_tensors(saved[0].url) as tensors:
        assert open_store(tmp_path).prune("r", keep).leased == (1,)
        assert sum(block.numel() for name in tensors.facts for block in tensors.blocks(name)) == 6
    assert open_store(tmp_path).prune("r", keep).deleted == (1,)


def test_an_export_in_another_type(made: Path) -> None:
    """An export in bfloat16 differs in type, by no more than rounding."""
    found = diff(made / "export", made / "half")
    assert found.counts == {"dtype": len(found.tensors)}
    for tensor in found.tensors:
        assert tensor.distance is not None
        assert tensor.distance.relative is None or tensor.distance.relative < 2**-8


def test_an_untied_tensor_is_not_tied(made: Path, tmp_path: Path) -> None:
    """What an export lacks is missing if it equals no other tensor, or does by chance, as norms and zeros do."""
    tensors = {k: v for path in (made / "export").glob("*.safetensors") for k, v in load_file(path).items()}
    missing = {"model.norm.weight", "model.layers.0.mlp.up_proj.weight"}
    found = diff(made / "step", save_hf({k: v for k, v in tensors.items() if k not in missing}, tmp_path / "b"))
    assert not found.equal
    assert {name for name, tensor in by_name(found).items() if tensor.status == "only in a"} == missing
    zeros = {"x": torch.zeros(3, 3), "y": torch.zeros(3, 3)}
    found = diff(save_dcp(zeros, tmp_path / "zeros"), save_hf({"x": zeros["x"]}, tmp_path / "one zero"))
    assert found.counts == {"equal": 1, "only in a": 1}


def test_what_stands_beside_the_model(tmp_path: Path) -> None:
    """An optimizer in the model's DCP directory is left aside when it is compared with an export."""
    a = save_dcp({"x.w": torch.ones(2), "optim.w.step": torch.ones(1)}, tmp_path / "a")
    assert diff(a, save_hf({"w": torch.ones(2)}, tmp_path / "b")).equal
    assert diff(a, save_dcp({"x.w": torch.ones(2)}, tmp_path / "c")).counts == {"equal": 1, "only in a": 1}


def test_two_names_that_meet(tmp_path: Path) -> None:
    """Two stored tensors that are one name without the prefix are refused, for one would never be compared."""
    export = save_hf({"w": torch.ones(2), "v": torch.ones(2)}, tmp_path / "export")
    stored = {"x.w": torch.ones(2), "x.v": torch.ones(2), "other": torch.ones(1)}
    found = diff(save_dcp(stored, tmp_path / "apart"), export)
    assert found.counts == {"equal": 2, "only in a": 1}
    both = save_dcp({**stored, "w": torch.zeros(2)}, tmp_path / "both")
    for a, b in ((both, export), (export, both)):
        with pytest.raises(MismatchError, match=r"x\.w.*'x\.'"):
            diff(a, b)


def test_nothing_in_common(tmp_path: Path) -> None:
    """Two models without one name in common are told apart, not refused."""
    found = diff(save_dcp({"x": torch.ones(2)}, tmp_path / "a"), save_hf({"y": torch.ones(2)}, tmp_path / "b"))
    assert found.counts == {"only in a": 1, "only in b": 1}
    assert found.prefix == ""


def test_memory_does_not_grow_with_the_tensor(tmp_path: Path) -> None:
    """Two tensors of 120 MB that differ are compared in less than half of that, as Python and NumPy allocate it."""
    a = torch.zeros(30_000_000)
    b = a.clone()
    b[-1] = 1
    one, other = save_hf({"x": a}, tmp_path / "a"), save_hf({"x": b}, tmp_path / "b")
    del a, b
    tracemalloc.start()
    try:
        distance = diff(one, other).tensors[0].distance
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert distance is not None
    assert distance.differing == 1
    assert peak < 60 << 20


def test_a_single_file(tmp_path: Path) -> None:
    """A safetensors file may be named instead of its directory."""
    a = save_hf(BASE, tmp_path / "a")
    assert diff(a / "model.safetensors", a).equal


def test_nothing_there(tmp_path: Path) -> None:
    """Where there is neither checkpoint nor export there is nothing to compare; pickles are not opened."""
    a = save_hf(BASE, tmp_path / "a")
    with pytest.raises(NotACheckpointError):
        diff(a, tmp_path / "none")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UntrustedError, match=r"pytorch_model\.bin"):
        diff(a, tmp_path / "bin")
