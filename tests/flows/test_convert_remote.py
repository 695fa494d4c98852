"""The convert flow with a checkpoint and an export in a bucket; files are written by a process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_bucket import bucket, contents  # noqa: F401 - a fixture
from small_convert import SMALL_FILES, converting, one_process, task_names
from small_retrain import tiny_model

from ckpt_core import PyTorchCheckpoint
from ckpt_core.export import convert_checkpoint
from ckpt_core.store import open_checkpoint
from flows.convert import convert
from tasks.config import ExportSettings

pytestmark = [pytest.mark.timeout(600), pytest.mark.usefixtures("prefect_home")]
SEVERAL = ExportSettings(max_shard_megabytes=SMALL_FILES)


def test_a_checkpoint_in_a_bucket_becomes_an_export_there(bucket: str, tmp_path: Path, tokenizer: str):  # noqa: F811 - the fixture
    """Validated, written by a process, and checked; it lies beside the run's steps, and the next run finds it."""
    step = PyTorchCheckpoint(tiny_model(tokenizer)).save(f"{bucket}/store", run="tiny", step=4, assets=tokenizer)
    with one_process():
        state = convert(str(step.url), export=SEVERAL, return_state=True)
    result = state.result()
    assert result["export"] == f"{bucket}/store/tiny/exports/step_0000000004"
    assert all(check["passed"] for check in result["checks"])
    local = convert_checkpoint(
        open_checkpoint(str(step.url)), tmp_path / "export", max_shard_bytes=int(SMALL_FILES * 1e6)
    )
    assert contents(result["export"]) == contents(str(local.path))
    written = [name for name in task_names(state.state_details.flow_run_id) if name.startswith("write ")]
    assert len(written) == len(list(local.path.glob("*.safetensors"))) > 4
    again = converting(str(step.url), result["export"], SEVERAL, return_state=True)
    assert task_names(again.state_details.flow_run_id) == {"convert tiny": "Cached"}
    beside = {name.partition("/")[0] for name in contents(f"{bucket}/store/tiny/exports")}
    assert beside == {"step_0000000004", "step_0000000004.settings.json"}


@pytest.mark.long
def test_an_error_in_one_file_leaves_nothing_in_the_bucket(bucket: str, tmp_path: Path, tokenizer: str):  # noqa: F811 - the fixture
    """A NaN in one of several files fails the flow run with the error's text, and no object of it is left."""
    model = tiny_model(tokenizer)
    with torch.no_grad():
        model.model.norm.weight[3] = torch.nan
    step = PyTorchCheckpoint(model).save(tmp_path / "store", run="tiny", step=4, assets=tokenizer)
    state = converting(str(step.url), f"{bucket}/broken/export", SEVERAL, return_state=True)
    assert state.is_failed()
    assert "model.norm.weight: holds NaN or Inf" in state.message
    assert contents(f"{bucket}/broken") == {}
