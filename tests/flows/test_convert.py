"""The convert flow: from a checkpoint's URL or path to a Hugging Face directory, once."""

from __future__ import annotations

import json
import multiprocessing
import time
from pathlib import Path
from threading import Thread

import pytest
import torch
from safetensors.torch import load_file
from small_convert import SMALL_FILES, converting, identities, one_process, task_names, weights
from small_retrain import artifacts_of, file_digests, tiny_model

from ckpt_core import PyTorchCheckpoint
from flows.convert import convert
from tasks.config import ExportSettings

pytestmark = [pytest.mark.timeout(600), pytest.mark.usefixtures("prefect_home")]


def test_a_checkpoint_becomes_an_export_once(checkpoint: Path):
    """A URL or a path is all it takes: weights, cast as asked, config and tokenizer; a second run finds it all."""
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
    again = convert(str(checkpoint), export=settings, return_state=True)
    assert again.result() == result
    assert (file_digests(export), (export / "model.safetensors").stat().st_mtime_ns) == before
    cached = dict.fromkeys(["validate tiny", "convert tiny", "check export of tiny"], "Cached")
    assert task_names(again.state_details.flow_run_id) == cached
    assert {artifact.key for artifact in artifacts_of(again.state_details.flow_run_id)} == keys


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
    assert table.description == "FAILED: digests, crc32"
    assert not (checkpoint.parent / "exports").exists()


def test_several_files_are_written_by_processes(checkpoint: Path, tmp_path: Path):
    """Each file is a task run; together they hold what the checkpoint does, and they are found again."""
    settings, target = ExportSettings(max_shard_megabytes=SMALL_FILES / 2, dtype="bfloat16"), tmp_path / "export"
    state = converting(str(checkpoint), str(target), settings, return_state=True)
    assert state.is_completed(), state.message
    files = weights(target)
    written = {f"write {file.name}": "Completed" for file in files}
    assert len(written) > 4
    others = {"convert tiny": "Completed", "finish export of tiny": "Completed"}
    assert task_names(state.state_details.flow_run_id) == written | others
    saved = PyTorchCheckpoint.from_url(checkpoint)["module_state_dict"]
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert tensors.keys() | {"lm_head.weight"} == saved.keys() | {"lm_head.weight"}
    assert all(torch.equal(tensor, saved[name].to(torch.bfloat16)) for name, tensor in tensors.items())
    assert {path.name for path in tmp_path.iterdir()} >= {"export", "export.settings.json"}
    before = identities(files)
    again = converting(str(checkpoint), str(target), settings, return_state=True)
    assert again.result() == state.result()
    assert identities(files) == before
    assert task_names(again.state_details.flow_run_id) == {"convert tiny": "Cached"}


@pytest.mark.long
def test_a_rerun_after_a_killed_process_keeps_finished_files(checkpoint: Path, tmp_path: Path):
    """The flow run fails and says what to do, nothing has the target's name, and the next one writes the rest."""
    settings, target = ExportSettings(max_shard_megabytes=SMALL_FILES), tmp_path / "export"
    work = tmp_path / ".converting-export"
    with one_process():
        killer = Thread(target=kill_after_one_file, args=[work])
        killer.start()
        state = converting(str(checkpoint), str(target), settings, return_state=True)
        killer.join()
    assert state.is_failed()
    assert f"{target}: a process that wrote files of it died" in state.message
    assert not target.exists()
    planned = len(list((work / "shards").iterdir()))
    done = [work / "export" / record.name for record in (work / "done").iterdir()]
    assert 0 < len(done) < planned
    before = identities(done)
    converting(str(checkpoint), str(target), settings)
    after = identities(weights(target))
    assert len(after) == planned
    assert {name: after[name] for name in before} == before
    assert not work.exists()


def kill_after_one_file(work: Path) -> None:
    """Kill the processes that this one has started as soon as a file of a conversion is finished."""
    deadline = time.monotonic() + 300
    while not (work / "done").is_dir() or not any((work / "done").iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    for process in multiprocessing.active_children():
        process.kill()


@pytest.mark.long
def test_an_error_in_one_file_is_the_flow_s(tmp_path: Path, tokenizer: str):
    """A NaN in one of several files fails the flow run with the error's name and text; nothing is left."""
    model = tiny_model(tokenizer)
    with torch.no_grad():
        model.model.norm.weight[3] = torch.nan
    saved = PyTorchCheckpoint(model).save(tmp_path / "store", run="tiny", step=4, assets=tokenizer)
    settings, target = ExportSettings(max_shard_megabytes=SMALL_FILES), tmp_path / "exports" / "export"
    state = converting(str(saved.url), str(target), settings, return_state=True)
    assert state.is_failed()
    assert "DamagedError: " in state.message
    assert "model.norm.weight" in state.message
    assert "NaN" in state.message
    assert list(target.parent.iterdir()) == []
