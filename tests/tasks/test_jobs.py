"""The heavy work of a flow, called as its child processes call it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from worker_support import TINY, prepare_tiny

from ckpt_core import PyTorchCheckpoint
from ckpt_core.errors import DamagedError, ExportExistsError
from ckpt_core.export import convert_shard
from tasks import jobs
from tasks.child import run_json
from tasks.process import ChildFailedError
from tasks.worker.model import build_model
from tasks.worker.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Text, tokenizer and held-out tokens."""
    return prepare_tiny(tmp_path_factory.mktemp("prepared"))


@pytest.fixture
def commit(tmp_path: Path, prepared: dict[str, Any]):
    """A function that commits a model with a change of its weights, and returns the step's URL."""

    def save(step: int = 1, change=lambda model: None) -> str:
        model = build_model(TINY, load_tokenizer(prepared["tokenizer"]), seed=3)
        with torch.no_grad():
            change(model)
        saved = PyTorchCheckpoint(model).save(tmp_path / "store", step=step, assets=prepared["tokenizer"])
        return str(saved.url)

    return save


def validate(url: str, **changes: Any) -> dict[str, Any]:
    """Validate with no held-out text and no limit, but for the changes; return the result with its checks by name."""
    request = {"url": url, "heldout": None, "max_heldout_loss": None, "allow_nonfinite": False}
    result = jobs.validate(request | changes)
    return {**result, "checks": {check["name"]: check for check in result["checks"]}}


def request_of(url: str, target: Path | str, **changes: Any) -> dict[str, Any]:
    """Return the request to convert with the default settings, but for the changes."""
    flags = dict.fromkeys(("allow_nonfinite", "merge_adapter", "trust_remote_code"), False)
    return {"url": url, "target": str(target), "dtype": None, "max_shard_bytes": 10**9, **flags, **changes}


def convert(url: str, target: Path | str, **changes: Any) -> dict[str, Any]:
    """Convert to a single file with the default settings, but for the changes; tell whether it was made before."""
    done = jobs.convert(request_of(url, target, **changes))
    return {**done["export"], "reused": done["reused"]}


def with_nan(model: torch.nn.Module) -> None:
    """Put one NaN into a model."""
    next(model.parameters())[0, 0] = math.nan


def halved(model: torch.nn.Module) -> None:
    """Make it another model."""
    for parameter in model.parameters():
        parameter.mul_(0.5)


def test_a_sound_checkpoint_passes(commit, prepared):
    """Digests, values, architecture and the measured loss are each a check."""
    result = validate(commit(), heldout=prepared["heldout_tokens"])
    of_the_step = ["manifest", "digests", "structure", "crc32", "values", "architecture"]
    assert list(result["checks"]) == [*of_the_step, "held-out loss"]
    assert all(check["passed"] for check in result["checks"].values())
    assert result["heldout_loss"] == pytest.approx(math.log(TINY.architecture["vocab_size"]), abs=0.5)


def test_a_loss_above_the_limit_fails(commit, prepared):
    """The check says by how much, and what to do."""
    result = validate(commit(), heldout=prepared["heldout_tokens"], max_heldout_loss=1.0)
    check = result["checks"]["held-out loss"]
    assert not check["passed"]
    assert "the limit is 1.0; train longer, or raise validation.max_heldout_loss" in check["detail"]


def test_a_nan_fails_unless_it_is_allowed(commit):
    """Weights that are no numbers stop the chain, and the loss is not computed from them."""
    url = commit(change=with_nan)
    refused = validate(url, heldout="never read")
    assert not refused["checks"]["values"]["passed"]
    assert refused["heldout_loss"] is None
    assert validate(url, allow_nonfinite=True)["checks"]["values"]["passed"]


def test_a_loss_that_is_no_number_fails(commit, prepared):
    """NaN weights that are allowed still do not pass an evaluation."""
    result = validate(commit(change=with_nan), heldout=prepared["heldout_tokens"], allow_nonfinite=True)
    assert result["checks"]["held-out loss"] == {
        "name": "held-out loss", "passed": False, "detail": "NaN; the training diverged.",
    }  # fmt: skip


def test_a_flipped_bit_fails(commit):
    """One changed bit in a shard is found by its digest, and the reason names the file."""
    url = commit()
    shard = next(Path(url.removeprefix("file://")).glob("model/*.distcp"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    check = validate(url)["checks"]["digests"]
    assert not check["passed"]
    assert shard.name in check["detail"]


def test_an_export_is_made_once(commit, tmp_path):
    """The same settings find it; other settings, or a damaged file, make it again."""
    url, target = commit(), tmp_path / "exports" / "one"
    made = convert(url, target)
    assert not made["reused"]
    assert made["path"] == str(target)
    before = (target / "model.safetensors").stat().st_mtime_ns
    assert convert(url, target)["reused"]
    assert (target / "model.safetensors").stat().st_mtime_ns == before
    cast = convert(url, target, dtype="bfloat16")
    assert not cast["reused"]
    assert {tensor.dtype for tensor in load_file(target / "model.safetensors").values()} == {torch.bfloat16}
    (target / "model.safetensors").write_bytes(b"half")
    assert not convert(url, target, dtype="bfloat16")["reused"]
    assert (target / "model.safetensors").stat().st_size > 4


def test_several_files_are_left_to_others(commit, tmp_path):
    """They are named, none of them again once it is written; what they make together is found again."""
    request = request_of(commit(), tmp_path / "export", max_shard_bytes=30_000)
    first, *others = begun = jobs.convert(request)["undone"]
    convert_shard(tmp_path / "export", first)
    assert jobs.convert(request) == {"target": request["target"], "undone": others, "export": None, "reused": False}
    assert len(others) > 1
    for name in others:
        convert_shard(tmp_path / "export", name)
    made = jobs.finish_conversion(request)
    assert made["files"].keys() >= set(begun)
    assert jobs.convert(request) == {"target": request["target"], "undone": [], "export": made, "reused": True}


def test_the_last_file_is_written_at_once(commit, tmp_path):
    """A conversion that was stopped before its last file needs no other process."""
    request = request_of(commit(), tmp_path / "export", max_shard_bytes=30_000)
    *others, last = jobs.convert(request)["undone"]
    for name in others:
        convert_shard(tmp_path / "export", name)
    assert last in jobs.convert(request)["export"]["files"]


def test_a_conversion_that_fails_leaves_nothing(commit, tmp_path):
    """Neither an export nor a part of one; the error names the tensor."""
    with pytest.raises(DamagedError, match="NaN"):
        convert(commit(change=with_nan), tmp_path / "exports" / "export")
    assert list((tmp_path / "exports").iterdir()) == []


@pytest.mark.parametrize("name", ["notes.txt", "export.json"])
def test_what_else_lies_at_the_target_is_left_alone(commit, tmp_path, name):
    """A directory that is not this checkpoint's export is never replaced."""
    target = tmp_path / "taken"
    target.mkdir()
    (target / name).write_text("[]")
    with pytest.raises(ExportExistsError, match="holds something else than an export, and is left alone"):
        convert(commit(), target)
    assert (target / name).read_text() == "[]"


def test_the_export_of_another_checkpoint_is_left_alone(commit, tmp_path):
    """It has to be deleted by hand, or another directory given."""
    target = tmp_path / "export"
    convert(commit(1), target)
    before = (target / "export.json").read_bytes()
    with pytest.raises(ExportExistsError, match="the export of another checkpoint"):
        convert(commit(2, halved), target)
    assert (target / "export.json").read_bytes() == before


def test_a_target_may_be_a_url(commit, tmp_path):
    """As a flow's other places are."""
    assert convert(commit(), (tmp_path / "an export").as_uri())["path"] == str(tmp_path / "an export")


def test_an_empty_directory_is_a_target(commit, tmp_path):
    """As `mkdir` leaves it."""
    (tmp_path / "empty").mkdir()
    assert not convert(commit(), tmp_path / "empty")["reused"]


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_an_export_equals_its_checkpoint(commit, tmp_path, dtype):
    """Keys, tensors and logits are the same, also after a cast."""
    url = commit()
    export = convert(url, tmp_path / "export", dtype=dtype)
    checks = jobs.check_export({"url": url, "export": export["path"]})["checks"]
    names = ["missing keys", "unexpected keys", "mismatched keys", "tensors", "logits"]
    assert [(check["name"], check["passed"]) for check in checks] == [(name, True) for name in names]


def test_a_changed_export_fails_its_gate(commit, tmp_path):
    """One different weight shows in the tensors; one missing tensor in the keys."""
    url = commit()
    file = Path(convert(url, tmp_path / "export")["path"]) / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    failed = {c["name"]: c["detail"] for c in checks_of(url, file.parent) if not c["passed"]}
    assert failed.keys() == {"tensors", "logits"}
    assert failed["tensors"] == "differ: model.norm.weight"
    del tensors["model.norm.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    assert "model.norm.weight" in next(c for c in checks_of(url, file.parent) if c["name"] == "missing keys")["detail"]


def checks_of(url: str, export: Path) -> list[dict[str, Any]]:
    """Return the checks of the export gate."""
    return jobs.check_export({"url": url, "export": str(export)})["checks"]


def test_an_unknown_job_is_named():
    """A misspelt name is an error that lists the jobs."""
    with pytest.raises(ChildFailedError, match=r"^job .train.: expected one of prepare, validate, convert, "):
        run_json("tasks.jobs", ["train", "{}"], on_line=lambda line: None)


def test_a_missing_checkpoint_is_named(tmp_path):
    """The error says where it was looked for."""
    with pytest.raises(FileNotFoundError, match="gone"):
        convert(str(tmp_path / "gone"), tmp_path / "export")
