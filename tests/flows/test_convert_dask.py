"""The convert flow's files, written by the workers of a real Dask cluster on this machine."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

import pytest
import torch
from small_bucket import bucket, contents  # noqa: F401 - a fixture
from small_convert import SMALL_FILES, converting, task_names, weights
from small_retrain import file_digests, tiny_model

from ckpt_core import PyTorchCheckpoint
from ckpt_core.export import convert_checkpoint
from ckpt_core.store import open_checkpoint
from tasks.config import ExportSettings

if TYPE_CHECKING:  # importing it changes how tracebacks are pickled, in every other test of this process
    from distributed import LocalCluster

pytestmark = [pytest.mark.timeout(600), pytest.mark.usefixtures("prefect_home")]


@pytest.fixture(scope="module")
def cluster(bucket: str) -> Iterator[LocalCluster]:  # noqa: F811 - the fixture
    """Two worker processes that reach the bucket, and no dashboard, whose port may be taken."""
    import distributed

    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        yield cluster


def on_dask(cluster: LocalCluster) -> ExportSettings:
    """Return settings for several files, written on the cluster."""
    return ExportSettings(max_shard_megabytes=SMALL_FILES, dask_address=cluster.scheduler_address)


def test_several_files_are_written_by_a_cluster(cluster: LocalCluster, checkpoint: Path, tmp_path: Path):
    """Both workers write, each file is a task run, and what comes out is what one process makes."""
    target = tmp_path / "export"
    state = converting(str(checkpoint), str(target), on_dask(cluster), return_state=True)
    assert state.is_completed(), state.message
    written = {f"write {file.name}": "Completed" for file in weights(target)}
    assert len(written) > 4
    assert task_names(state.state_details.flow_run_id).items() >= written.items()
    with cluster.get_client() as client:
        assert client.run(lambda: "ckpt_core.export.work" in sys.modules).keys() == client.nthreads().keys()
        assert all(client.run(lambda: "ckpt_core.export.work" in sys.modules).values())
    elsewhere = convert_checkpoint(
        open_checkpoint(checkpoint), tmp_path / "elsewhere", max_shard_bytes=int(SMALL_FILES * 1e6)
    ).path
    assert file_digests(elsewhere) == file_digests(target)


@pytest.mark.long
def test_several_files_are_written_to_a_bucket(
    cluster: LocalCluster,
    bucket: str,  # noqa: F811 - the fixture
    checkpoint: Path,
    tmp_path: Path,
):
    """The workers send each file by themselves, and what lies in the bucket is what processes make on a disk."""
    state = converting(str(checkpoint), f"{bucket}/dask/export", on_dask(cluster), return_state=True)
    assert state.is_completed(), state.message
    local = convert_checkpoint(open_checkpoint(checkpoint), tmp_path / "export", max_shard_bytes=int(SMALL_FILES * 1e6))
    assert contents(f"{bucket}/dask/export") == contents(str(local.path))
    written = {f"write {file.name}": "Completed" for file in weights(tmp_path / "export")}
    assert len(written) > 4
    assert task_names(state.state_details.flow_run_id).items() >= written.items()
    beside = {name.partition("/")[0] for name in contents(f"{bucket}/dask")}
    assert beside == {"export", "export.settings.json"}


@pytest.mark.long
def test_a_worker_that_dies_is_replaced(cluster: LocalCluster, checkpoint: Path, tmp_path: Path):
    """The scheduler gives its files to the others, and the flow run does not notice."""
    target, finished = tmp_path / "export", []
    killer = Thread(target=kill_a_worker, args=[cluster, tmp_path / ".converting-export", finished])
    killer.start()
    state = converting(str(checkpoint), str(target), on_dask(cluster), return_state=True)
    killer.join()
    assert state.is_completed(), state.message
    assert 0 < len(finished) < len(weights(target))


def kill_a_worker(cluster: LocalCluster, work: Path, finished: list[Path]) -> None:
    """Kill one of a cluster's two workers as soon as a file of a conversion is finished; tell which are by then."""
    deadline = time.monotonic() + 300
    while not (work / "done").is_dir() or not any((work / "done").iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    os.kill(cluster.workers[0].pid, signal.SIGKILL)
    finished += (work / "done").iterdir()


@pytest.mark.long
def test_an_error_in_one_file_is_the_flow_s(cluster: LocalCluster, tmp_path: Path, tokenizer: str):
    """A NaN fails the flow run with the error's name and text, and nothing has the target's name."""
    model = tiny_model(tokenizer)
    with torch.no_grad():
        model.model.norm.weight[3] = torch.nan
    saved = PyTorchCheckpoint(model).save(tmp_path / "store", run="tiny", step=4, assets=tokenizer)
    state = converting(str(saved.url), str(tmp_path / "export"), on_dask(cluster), return_state=True)
    assert state.is_failed()
    assert "DamagedError: " in state.message
    assert "model.norm.weight" in state.message
    assert "NaN" in state.message
    assert not (tmp_path / "export").exists()
