"""The convert flow: from a checkpoint's URL or path to a Hugging Face directory, once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_retrain import artifacts_of, file_digests

from ckpt_core import PyTorchCheckpoint
from flows.convert import convert
from tasks.config import ExportSettings

pytestmark = [pytest.mark.timeout(600), pytest.mark.usefixtures("prefect_home")]


def test_a_checkpoint_becomes_an_export_once(checkpoint: Path):
    """A URL or a path is all it takes: weights, cast as asked, config and tokenizer; a second run writes nothing."""
    settings = ExportSettings(dtype="bfloat16")
    state = convert(checkpoint.as_uri(), export=settings, return_state=True)
    result = state.result()
    export = checkpoint.parent / "exports" / "step_0000000004-bfloat16"
    assert result["export"] == str(export)
    assert all(check["passed"] for check in result["checks"])
    assert json.loads((export / "config.json").read_text())["dtype"] == "bfloat16"
    assert (export / "tokenizer.json").read_bytes() == (checkpoint / "assets" / "tokenizer.json").read_bytes()
    saved = PyTorchCheckpoint.from_url(checkpoint)["module_state_dict"]
    written = load_file(export / "model.safetensors")
    assert torch.equal(written["model.norm.weight"], saved["model.norm.weight"].to(torch.bfloat16))
    keys = {artifact.key for artifact in artifacts_of(state.state_details.flow_run_id)}
    assert keys == {"validation-tiny", "export-tiny", "export-check-tiny"}

    before = file_digests(export), (export / "model.safetensors").stat().st_mtime_ns
    assert convert(str(checkpoint), export=settings) == result
    assert (file_digests(export), (export / "model.safetensors").stat().st_mtime_ns) == before


def test_a_damaged_checkpoint_is_refused_with_reasons(checkpoint: Path):
    """One flipped bit fails the flow run, shows as FAIL in the validation table, and nothing is exported."""
    shard = next((checkpoint / "model").glob("*.distcp"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    state = convert(str(checkpoint), return_state=True)
    assert state.is_failed()
    assert f"checkpoint {checkpoint.as_uri()} was refused. digests: " in state.message
    assert shard.name in state.message
    [table] = artifacts_of(state.state_details.flow_run_id)
    verdicts = {row["check"]: row["verdict"] for row in json.loads(table.data)}
    assert verdicts["digests"] == "FAIL"
    assert table.description == "a check failed"
    assert not (checkpoint.parent / "exports").exists()
