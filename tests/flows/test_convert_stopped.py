"""The convert flow, cancelled or killed while processes write its files: nothing runs on, a rerun does the rest."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_URL, PREFECT_TASKS_RUNNER_PROCESS_POOL_MAX_WORKERS
from small_convert import SMALL_FILES, converting, identities, one_process, weights
from small_retrain import PROGRAMS, REPOSITORY

from tasks.config import ExportSettings

pytestmark = [pytest.mark.timeout(600), pytest.mark.usefixtures("prefect_home")]


@pytest.mark.parametrize(
    "how", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.long)], ids=["cancelled", "killed"]
)
def test_a_stopped_flow_leaves_no_process(checkpoint: Path, tmp_path: Path, how: signal.Signals):
    """Cancelled or killed, it leaves no process and nothing with the target's name; a rerun writes the other files."""
    target, work = tmp_path / "export", tmp_path / ".converting-export"
    with (tmp_path / "log").open("wb") as log:
        flow = subprocess.Popen(
            [sys.executable, str(PROGRAMS / "convert_files.py"), str(checkpoint), str(target)],
            cwd=REPOSITORY, env=environment(), stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
        try:
            wait_until(lambda: any((work / "done").glob("*")) or flow.poll() is not None)
            flow.send_signal(how)
            assert flow.wait(60) != 0, (tmp_path / "log").read_text()
            wait_until(lambda: not members(flow.pid), seconds=30)
        finally:
            for pid in members(flow.pid):
                os.kill(pid, signal.SIGKILL)
    assert not target.exists()
    planned = len(list((work / "shards").iterdir()))
    done = [work / "export" / record.name for record in (work / "done").iterdir()]
    assert 0 < len(done) < planned
    before = identities(done)
    with one_process():
        converting(str(checkpoint), str(target), ExportSettings(max_shard_megabytes=SMALL_FILES))
    after = identities(weights(target))
    assert len(after) == planned
    assert {name: after[name] for name in before} == before
    assert not work.exists()


def environment() -> dict[str, str]:
    """Return the environment of a process that reports to this one's server, and finds these tests' modules."""
    path = os.pathsep.join([str(REPOSITORY), str(Path(__file__).parent)])
    url = PREFECT_API_URL.value()
    assert url
    one = {PREFECT_TASKS_RUNNER_PROCESS_POOL_MAX_WORKERS.name: "1"}
    return {**os.environ, **one, "PYTHONPATH": path, "PREFECT_API_URL": url}


def members(session: int) -> list[int]:
    """Return the processes of a session that still run."""
    found: list[int] = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, _, number = status.read_text().rpartition(")")[2].split()[:4]
            if int(number) == session and state != "Z":
                found.append(int(status.parent.name))
    return found


def wait_until(reached, *, seconds: float = 300) -> None:
    """Wait for what other processes do."""
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end, f"not reached in {seconds} s"
        time.sleep(0.005)
