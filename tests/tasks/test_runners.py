"""Where the files of an export are written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from prefect.settings import PREFECT_TASKS_RUNNER_PROCESS_POOL_MAX_WORKERS, temporary_settings
from prefect.task_runners import ProcessPoolTaskRunner

from ckpt_core.errors import ArgumentError
from ckpt_core.workers import count_workers
from tasks.runners import task_runner

ORPHAN = """
import multiprocessing, os, time
from concurrent.futures import ProcessPoolExecutor
from tasks.runners import end_with_parent

if __name__ == "__main__":
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), end_with_parent) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        time.sleep(600)
"""


def test_processes_are_as_many_as_prefect_is_told():
    """By default as many as there are cores for this process, at most eight."""
    assert task_runner(None) == ProcessPoolTaskRunner(max_workers=count_workers())
    with temporary_settings({PREFECT_TASKS_RUNNER_PROCESS_POOL_MAX_WORKERS: 5}):
        assert task_runner(None) == ProcessPoolTaskRunner(max_workers=5)


def test_an_address_chooses_dask():
    """The scheduler is not looked for before there is something to do."""
    from prefect_dask.task_runners import DaskTaskRunner

    assert task_runner("tcp://10.0.0.5:8786") == DaskTaskRunner(address="tcp://10.0.0.5:8786")


def test_a_missing_dask_is_named(monkeypatch):
    """The error says what to install."""
    monkeypatch.setitem(sys.modules, "prefect_dask.task_runners", None)
    with pytest.raises(ArgumentError, match=r"prefect-dask is missing: pip install 'ckptflow\[dask\]'"):
        task_runner("tcp://10.0.0.5:8786")


def test_a_process_of_the_pool_ends_with_its_flow(tmp_path: Path):
    """Also when the flow's process is killed, and can tell nobody."""
    program = tmp_path / "orphan.py"
    program.write_text(ORPHAN)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen([sys.executable, str(program)], stdout=subprocess.PIPE, env=environment) as flow:
        assert flow.stdout is not None
        worker = int(flow.stdout.readline())
        assert _is_running(worker)
        flow.send_signal(signal.SIGKILL)
        flow.stdout.close()
    deadline = time.monotonic() + 60
    while _is_running(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _is_running(worker)


def _is_running(pid: int) -> bool:
    """Whether there is such a process; one that has ended may wait to be buried."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
