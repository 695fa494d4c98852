"""Jobs that are forked from a process which has done their imports."""

import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
from programs.probe import MARK, PROGRAMS, marked, parent_of, wait_until, wait_until_gone

from tasks import zygote
from tasks.held import held_open
from tasks.process import ChildFailedError, ExecutedReaper, Start, Surroundings, run

PATH = os.pathsep.join([str(PROGRAMS), str(PROGRAMS.parents[2])])
ZYGOTE = " tasks.zygote "


class CancelledHere(BaseException):
    """Stands for Prefect's exceptions, which are no `Exception` either."""


@pytest.fixture
def mark(request: pytest.FixtureRequest):
    """A name that all descendants of a test carry; none is left after it, when the zygote has ended."""
    name = f"{request.node.name}-{os.getpid()}-{time.monotonic_ns()}"
    yield name
    zygote.end()
    wait_until_gone(name, seconds=15)


@pytest.fixture
def start(mark: str) -> Start:
    """How to start a job from a zygote that imports next to nothing."""
    return partial(zygote.fork_module, env=environment(mark), modules=["colorsys"])


def environment(mark: str) -> dict[str, str]:
    """Return what a test adds to the environment."""
    return {MARK: mark, "PYTHONPATH": PATH}


def job(module: str, *arguments: str) -> list[str]:
    """Return the command of a job."""
    return [sys.executable, "-u", "-m", module, *arguments]


def running(mark: str) -> dict[int, str]:
    """Return the processes of a test's jobs and their reapers; all are forks of the zygote."""
    found = marked(mark)
    parents = {pid: parent_of(pid) for pid in found}
    return {pid: line for pid, line in found.items() if parents[pid] != os.getpid()}


def run_lines(command: Sequence[str], start: Start, mark: str, **options) -> list[str]:
    """Run a command to its end; return its lines."""
    lines: list[str] = []
    run(command, on_line=lines.append, env=environment(mark), start=start, **options)
    return lines


@pytest.fixture
def shows(tmp_path):
    """A module that shows what a process finds when it starts."""
    (tmp_path / "shows.py").write_text(
        "import os, signal, sys\n"
        "print(sys.argv[1:], os.getcwd(), os.environ.get('X'), __name__, 'colorsys' in sys.modules)\n"
        "print(sorted(os.listdir('/proc/self/fd'))[:3], len(os.listdir('/proc/self/fd')), sys.stdin.read() == '')\n"
        "print([signal.getsignal(getattr(signal, n)).__class__.__name__ for n in ('SIGTERM', 'SIGINT', 'SIGCHLD')])\n"
        "print(signal.pthread_sigmask(signal.SIG_BLOCK, []), os.getpgrp() == os.getpid(), signal.set_wakeup_fd(-1))\n"
        "print('oops', file=sys.stderr)\n"
    )
    return f"{tmp_path}{os.pathsep}{PATH}"


def test_a_job_finds_what_an_executed_one_finds(mark, shows, tmp_path):
    """Arguments, directory, environment, streams, signals and open files are the same; the imports are done."""
    env = {MARK: mark, "PYTHONPATH": shows, "X": "1"}
    found = []
    for start in (partial(zygote.fork_module, env={MARK: mark, "PYTHONPATH": shows}, modules=["colorsys"]), None):
        lines: list[str] = []
        run(job("shows", "a b", "c"), on_line=lines.append, env=env, cwd=str(tmp_path), start=start)
        found.append(lines)
    forked, executed = found
    assert forked[0] == f"['a b', 'c'] {tmp_path} 1 __main__ True"
    assert executed[0] == f"['a b', 'c'] {tmp_path} 1 __main__ False"
    assert forked[1:] == executed[1:]
    assert forked[-1] == "oops"


def test_jobs_share_one_zygote(mark, start):
    """Each job is another process of the same parent's parent, and the second finds nothing of the first."""
    for _ in range(2):
        assert run_lines(job("answer", "nothing"), start, mark) == ["working"]
        assert list(marked(mark).values()) == [line for line in marked(mark).values() if ZYGOTE in line]
    assert len(marked(mark)) == 1


def test_a_change_of_what_imports_look_at_makes_another(mark, start):
    """Where the environment differs, a new zygote takes the old one's place."""
    run_lines(job("answer", "nothing"), start, mark)
    [first] = marked(mark)
    changed = partial(zygote.fork_module, env={**environment(mark), "HF_HOME": "/elsewhere"}, modules=["colorsys"])
    run_lines(job("answer", "nothing"), changed, mark)
    wait_until(lambda: first not in marked(mark))
    assert len(marked(mark)) == 1


def test_a_job_outlives_the_end_of_its_zygote(mark, start, tmp_path):
    """A zygote that another one replaces ends when its last job has, and the job is not disturbed."""

    def hear(line: str) -> None:
        if line == "ready":
            zygote.end()
            [saver] = [pid for pid in running(mark) if parent_of(parent_of(pid)) in marked(mark)]
            os.kill(saver, signal.SIGTERM)

    run(job("saver", str(tmp_path / "state")), on_line=hear, env=environment(mark), start=start)
    assert (tmp_path / "state").read_text() == "state"
    wait_until(lambda: not marked(mark))


def test_a_failing_job_is_told_as_an_executed_one(mark, start):
    """Exit codes, tracebacks and deadly signals arrive."""
    with pytest.raises(ChildFailedError, match=r"(?s)ended with exit code 1; .*KeyError: 'lost'$"):
        run_lines(job("answer", "crash"), start, mark)
    with pytest.raises(ChildFailedError, match="was ended by SIGKILL"):
        run_lines(job("answer", "killed after its result"), start, mark)
    with pytest.raises(ChildFailedError, match=r"(?s)ended with exit code 1; .*No module named no_such_module"):
        run_lines(job("no_such_module"), start, mark)


def test_what_a_job_leaves_behind_ends_with_it(mark, start):
    """Children, sessions and daemons, deaf ones too, are gone when `run` returns."""
    run_lines(job("family", "deaf", "exit"), start, mark, grace_s=0.5)
    assert not running(mark)


class InThread(threading.Thread):
    """A family that runs in a thread of its own, until it is cancelled by its consumer."""

    def __init__(self, start: Start, mark: str, **options) -> None:
        super().__init__()
        self.error: BaseException | None = None
        self.ready = threading.Event()
        self._call = partial(
            run, job("family", "deaf"), on_line=self._hear, env=environment(mark), start=start, **options
        )
        self.start()

    def _hear(self, line: str) -> None:
        self.ready.set()

    def run(self) -> None:
        """The thread's work."""
        try:
            self._call()
        except BaseException as error:  # noqa: BLE001 - whatever it is, the test looks at it
            self.error = error


def test_a_killed_reaper_leaves_nothing(mark, start):
    """What it had adopted goes to the zygote, which kills it; the next job has the same zygote."""
    thread = InThread(start, mark)
    assert thread.ready.wait(20)
    [parent] = [pid for pid, line in marked(mark).items() if parent_of(pid) == os.getpid()]
    [killed] = [pid for pid in running(mark) if parent_of(pid) == parent]
    os.kill(killed, signal.SIGKILL)
    thread.join(20)
    assert isinstance(thread.error, ChildFailedError)
    wait_until(lambda: not running(mark))
    run_lines(job("answer", "nothing"), start, mark)
    assert list(marked(mark)) == [parent]


def test_a_killed_zygote_ends_its_jobs(mark, start):
    """Its jobs fail, nothing of them is left, and the next job starts another zygote."""
    thread = InThread(start, mark, grace_s=0.5)
    assert thread.ready.wait(20)
    [parent] = [pid for pid in marked(mark) if parent_of(pid) == os.getpid()]
    os.kill(parent, signal.SIGKILL)
    thread.join(20)
    assert isinstance(thread.error, ChildFailedError)
    wait_until(lambda: not running(mark))
    assert run_lines(job("answer", "nothing"), start, mark) == ["working"]


def test_an_interrupted_caller_lets_its_job_save(mark, start, tmp_path):
    """What `on_line` raises asks the job to end, which has its time and hands out its last lines."""
    lines: list[str] = []

    def hear(line: str) -> None:
        lines.append(line[:10])
        if line == "ready":
            raise CancelledHere

    with pytest.raises(CancelledHere):
        run(job("saver", str(tmp_path / "state")), on_line=hear, env=environment(mark), start=start)
    assert (tmp_path / "state").read_text() == "state"
    assert lines[-1] == "saved"
    assert not running(mark)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_caller_that_dies_leaves_nothing(mark, number, tmp_path):
    """Zygote, reaper and job end, and the job had time to save."""
    state = tmp_path / "state"
    program = (
        "import sys; from functools import partial; from tasks import zygote; from tasks.process import run\n"
        "start = partial(zygote.fork_module, env={}, modules=['colorsys'])\n"
        f"job = [sys.executable, '-u', '-m', 'saver', {str(state)!r}]\n"
        "run(job, on_line=lambda line: print(line[:9], flush=True), start=start)\n"
    )
    caller = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env={**os.environ, **environment(mark)}
    )
    assert caller.stdout is not None
    assert caller.stdout.readline() == "ready\n"
    caller.send_signal(number)
    wait_until_gone(mark)
    caller.communicate()
    assert state.read_text() == "state"


def test_a_caller_that_gave_up_early_gets_nothing_started(mark, start, tmp_path):
    """A lifeline that is cut before the zygote has read the order starts no job."""
    receive, send = os.pipe()
    start([sys.executable, "-u", "-m", "answer", "nothing"], around(send, receive, mark)).close()
    os.close(send)
    assert os.read(receive, 100) == b""
    os.close(receive)
    wait_until(lambda: not running(mark))


def test_an_order_too_large_is_executed(mark, start):
    """A command that fits into no message is executed as any other."""
    receive, send = os.pipe()
    reaper = start([sys.executable, "-u", "-m", "answer", *["x" * 100_000] * 4], around(send, receive, mark))
    os.close(send)
    os.close(receive)
    assert isinstance(reaper, ExecutedReaper)
    reaper.close()
    reaper.wait(20)


def around(sink: int, kept: int, mark: str) -> Surroundings:
    """Return what a job finds."""
    return Surroundings(sink, [kept], {**os.environ, **environment(mark)}, str(Path.cwd()), 1.0)


def test_a_job_keeps_open_what_its_caller_holds(mark, start, tmp_path):
    """A lock that trees are to keep is taken while a job of its holder runs, and free once that has ended."""
    lock, taken = tmp_path / "lock", list[bool]()

    def hear(_: str) -> None:
        os.close(handle)
        taken.append(not is_free(lock))

    handle = os.open(lock, os.O_RDWR | os.O_CREAT)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with held_open(handle):
        run(job("answer", "nothing"), on_line=hear, env=environment(mark), start=start)
    assert taken == [True]
    wait_until(lambda: is_free(lock))


def is_free(lock: Path) -> bool:
    """Return whether nobody holds a lock."""
    with lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
