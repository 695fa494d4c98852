"""Ranks under torchrun end together, and the one that failed is named."""

import ctypes
import os
import pickle
import re
import signal
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

import pytest
from programs.probe import MARK, PROGRAMS, marked, parent_of, wait_until, wait_until_gone

from ckpt_core.errors import ArgumentError
from tasks import zygote
from tasks.process import ChildFailedError, Start
from tasks.torchrun import RankFailure, RanksFailedError, run_torchrun


class Job(threading.Thread):
    """`run_torchrun` with two ranks in a thread of its own."""

    def __init__(self, mark, module, *args, **options) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.error: BaseException | None = None
        env = environment(mark)
        self._call = lambda: run_torchrun(module, args, ranks=2, on_line=self.lines.append, env=env, **options)
        self.start()

    def run(self) -> None:
        """The thread's work."""
        try:
            self._call()
        except BaseException as error:  # noqa: BLE001 - whatever it is, the test looks at it
            self.error = error

    def pids(self) -> dict[int, int]:
        """Process id by rank, as each rank printed it."""
        found = [re.fullmatch(r"\[rank (\d)\] half a line, pid (\d+) of 2", line) for line in list(self.lines)]
        return {int(match[1]): int(match[2]) for match in found if match}

    def wait_for_ranks(self) -> dict[int, int]:
        """Process id by rank, once both run."""
        wait_until(lambda: len(self.pids()) == 2 or not self.is_alive())
        assert self.error is None
        return self.pids()

    def failure(self) -> str:
        """The message of the error that the job ended with."""
        self.join(60)
        assert isinstance(self.error, ChildFailedError)
        return str(self.error)


def environment(mark: str) -> dict[str, str]:
    """Return what a test adds to the environment."""
    return {MARK: mark, "PYTHONPATH": str(PROGRAMS)}


@pytest.fixture(params=["executed", "forked"])
def start(request: pytest.FixtureRequest, mark: str) -> Start | None:
    """How torchrun is started, and its ranks by it: executed, or as forks of a process that has imported torch."""
    if request.param == "executed":
        return None
    return partial(zygote.fork_module, env=environment(mark), modules=["torch.distributed.launcher.api"])


def left(mark: str) -> dict[int, str]:
    """Return what is left of a job."""
    return {pid: line for pid, line in marked(mark).items() if "zygote" not in line or parent_of(pid) != os.getpid()}


@pytest.fixture
def mark(request, tmp_path, monkeypatch):
    """A name that all descendants of a test carry; no process and no temporary file is left after it."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    name = f"{request.node.name}-{os.getpid()}-{time.monotonic_ns()}"
    yield name
    zygote.end()
    wait_until_gone(name, seconds=15)
    assert not list((tmp_path / "tmp").iterdir())


@pytest.mark.parametrize("start", [pytest.param("executed", marks=pytest.mark.long), "forked"], indirect=True)
def test_two_jobs_at_once_do_not_meet(mark, start, monkeypatch):
    """Concurrent jobs find ports of their own, and each sums over its own ranks, of one thread each."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    jobs = [Job(mark, "gloo", start=start) for _ in range(2)]
    for job in jobs:
        job.join(120)
        assert job.error is None
        sums = sorted(line for line in job.lines if "sum" in line)
        assert sums == ["[rank 0] sum 3.0, 1 thread", "[rank 1] sum 3.0, 1 thread"]


def test_a_good_job_prints_its_ranks_lines_and_no_noise(mark, start, tmp_path, monkeypatch):
    """Each line is whole and names its rank; one thread a rank unless the environment says otherwise."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    job = Job(mark, "rank", "end", str(tmp_path), run_id="the-run", start=start)
    job.join(60)
    assert job.error is None
    assert sorted(job.pids()) == [0, 1]
    rest = [line for line in job.lines if "half a line" not in line]
    assert sorted(rest) == [f"[rank {rank}] threads 1 run the-run" for rank in range(2)]


def test_a_rank_that_raises_is_named_with_its_traceback(mark, start, tmp_path):
    """The error shows the failing rank's last lines, not the other one's, which had time to save."""
    job = Job(mark, "rank", "raise", str(tmp_path), start=start)
    message = job.failure()
    assert message.startswith("rank: rank 1 of 2 ended with exit code 1; its last lines:\n")
    assert "forked_rank" not in message
    frame = r"\n  File .*rank.py\", line \d+, in <module>"
    assert re.search(frame + r".*\n.*\nValueError: no such batch: 7$", message)
    assert "rank 0" not in message
    error = pickle.loads(pickle.dumps(job.error))  # as results of tasks are
    assert isinstance(error, RanksFailedError)
    assert (str(error), error.failures) == (message, (RankFailure(1, 1, error.failures[0].lines),))
    assert not error.failures[0].died


def test_a_rank_that_is_killed_is_named_with_its_signal(mark, start, tmp_path):
    """SIGKILL to one rank ends the job; the others save, and the error names rank, signal and its last lines."""
    job = Job(mark, "rank", "wait", str(tmp_path), start=start)
    os.kill(job.wait_for_ranks()[1], signal.SIGKILL)
    message = job.failure()
    assert message.startswith("rank: rank 1 of 2 was ended by SIGKILL")
    assert f"half a line, pid {job.pids()[1]} of 2" in message
    assert (tmp_path / "saved_0").exists()


def test_a_killed_torchrun_takes_its_ranks_along(mark, start, tmp_path):
    """SIGKILL to torchrun itself ends its ranks, which save first, and is an error with what they printed last."""
    job = Job(mark, "rank", "wait", str(tmp_path), start=start)
    os.kill(parent_of(job.wait_for_ranks()[0]), signal.SIGKILL)
    message = job.failure()
    assert message.startswith("torchrun of rank was ended by SIGKILL")
    assert "[rank 0] saving" in message
    assert {path.name for path in tmp_path.iterdir()} >= {"saved_0", "saved_1"}
    assert not left(mark)


def test_a_cancelled_job_saves_and_ends(mark, start, tmp_path):
    """Cancellation gives each rank the grace to save; one that ignores SIGTERM is killed after it."""
    job = Job(mark, "rank", "deaf", str(tmp_path), grace_s=5, start=start)
    job.wait_for_ranks()
    assert ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_long(job.ident or 0), ctypes.py_object(SystemExit)) == 1
    job.join(60)
    assert isinstance(job.error, SystemExit)
    assert "[rank 0] saving" in job.lines
    assert (tmp_path / "saved_0").exists()
    assert not (tmp_path / "saved_1").exists()
    assert not left(mark)


def test_no_rank_is_an_error():
    """A job needs a rank."""
    with pytest.raises(ArgumentError, match="ranks is 0; expected 1 or more"):
        run_torchrun("rank", [], ranks=0, on_line=print)


def test_this_process_needs_neither_torch_nor_prefect():
    """The supervising side imports nothing heavy."""
    for name in ("lines", "process", "child", "torchrun", "reaper", "addresses", "nodes", "node", "elastic"):
        text = Path(PROGRAMS.parents[2], "tasks", f"{name}.py").read_text()
        assert not re.search(r"^\s*(import|from) (torch|prefect)\b", text, re.MULTILINE)
