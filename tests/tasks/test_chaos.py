"""Training survives `ckpt-chaos`: killed at any file event, it resumes from the newest checkpoint, and ends the same.

https://pypi.org/project/ckpt-chaos: it runs a training command once, then a copy of it for each event (a file opened
for writing, a rename, a directory made), killed there; then again to its end, and compares what came of it.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from worker_support import REPOSITORY, prepare_tiny

PROGRAMS = Path(__file__).parent / "programs"
FAIL_ON = "HARD_FAIL,SILENT_DIVERGENCE,LOST_WORK"

pytestmark = pytest.mark.skipif(importlib.util.find_spec("ckpt_chaos") is None, reason="needs ckpt-chaos, of PyPI")


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The socket of a server that runs ranks; it ends with the module."""
    directory = tmp_path_factory.mktemp("chaos")
    path = f"{REPOSITORY}:{Path(__file__).parent}"
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with subprocess.Popen(
        [sys.executable, str(PROGRAMS / "chaos_server.py"), str(directory / "socket")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
    ) as server:  # fmt: skip
        server.stdin.write(json.dumps(prepare_tiny(directory / "data")) + "\n")
        server.stdin.flush()
        assert server.stdout.readline() == "ready\n"
        yield directory / "socket"
        server.stdin.close()
        server.wait(30)


@pytest.mark.parametrize("long", [False, pytest.param(True, marks=pytest.mark.long)], ids=["short", "long"])
@pytest.mark.parametrize(("ranks", "crashed"), [(1, 0), (2, 0), (2, 1)], ids=["one", "first of two", "second of two"])
def test_chaos(address, tmp_path, capsys, ranks, crashed, long):
    """Killed, torn or asked to end at any file event, training resumes from the newest step, and ends the same."""
    rank = [sys.executable, "-I", "-S", str(PROGRAMS / "chaos_rank.py"), str(address), "{out}"]
    options = {
        "--work": tmp_path / "work",
        "--ranks": ranks,
        "--crash-rank": crashed,
        "--modes": "before,torn,term",
        "--max-points": 10**6 if long else 9 if ranks == 1 else 7,
        "--jobs": 2,
        "--checkpoint-glob": "{out}/tiny/step_*",
        "--step-regex": r"step (\d+)/",  # of the first line: a step after the one that was restored, or itself
        "--result-cmd": f"{sys.executable} {PROGRAMS / 'chaos_result.py'} {{out}}",
        "--timeout": 60,
        "--fail-on": FAIL_ON,
    }
    command = [sys.executable, "-m", "ckpt_chaos", "run", "--ckpt-ignore-size"]  # manifests name paths and times
    command += [str(part) for pair in options.items() for part in pair]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [*command, "--", *rank], capture_output=True, text=True, timeout=1800, check=False, env=environment
    )
    verdicts = {verdict: int(count) for verdict, count in re.findall(r"\b([A-Z_]+): +(\d+)", done.stdout)}
    with capsys.disabled():
        print(f"\nckpt-chaos, rank {crashed} of {ranks}: {verdicts}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(verdicts) == {"PASS"}
    assert verdicts["PASS"] > 5
