"""A child process and its whole tree end with whatever dies first."""

import ctypes
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest
from programs.probe import MARK, PROGRAMS, marked, pid_of, wait_until, wait_until_gone

from tasks.process import ChildFailedError, run, shorten

FAMILY = [sys.executable, str(PROGRAMS / "family.py")]
SAVER = [sys.executable, str(PROGRAMS / "saver.py")]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(PROGRAMS.parents[2])}
FAMILY_SIZE = 5  # the reaper, the command, its child, its session, its daemon


class CancelledHere(BaseException):
    """Stands for Prefect's exceptions, which are no `Exception` either."""


class InThread(threading.Thread):
    """`run` in a thread of its own, with what it printed and what it raised."""

    def __init__(self, command, mark, **options) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.error: BaseException | None = None
        self._call: Callable[[], None] = lambda: run(command, on_line=self.lines.append, env={MARK: mark}, **options)
        self.start()

    def run(self) -> None:
        """The thread's work."""
        try:
            self._call()
        except BaseException as error:  # noqa: BLE001 - whatever it is, the test looks at it
            self.error = error

    def cancel(self) -> None:
        """Raise in that thread, as Prefect's cancel scope for threads does."""
        assert self.ident is not None
        code = ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_long(self.ident), ctypes.py_object(CancelledHere))
        assert code == 1


@pytest.fixture
def mark(request):
    """A name that all descendants of a test carry; none is left after it."""
    name = f"{request.node.name}-{os.getpid()}-{time.monotonic_ns()}"
    yield name
    wait_until_gone(name, seconds=15)


def start_supervisor(command, mark) -> subprocess.Popen[str]:
    """A process that runs `command` and has seen it print "ready"."""
    process = subprocess.Popen(
        [sys.executable, str(PROGRAMS / "supervisor.py"), *command],
        stdout=subprocess.PIPE,
        text=True,
        env={**ENVIRONMENT, MARK: mark},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def family_is_complete(mark) -> bool:
    """Whether all of `programs/family.py` is there."""
    return len(marked(mark)) == FAMILY_SIZE


def test_lines_of_both_streams_arrive(mark):
    """Standard output and error are one sequence of lines; `env` adds to the environment, `cwd` is the directory."""
    lines: list[str] = []
    run(["sh", "-c", "echo $HOME$X; echo oops >&2; pwd"], on_line=lines.append, env={"X": "!", MARK: mark}, cwd="/")
    assert lines == [os.environ["HOME"] + "!", "oops", "/"]


def test_lines_arrive_while_the_command_runs(mark, tmp_path):
    """A line does not wait for the end: here the command ends only after its first line was seen."""
    seen = tmp_path / "seen"
    script = 'echo first; while [ ! -e "$0" ]; do sleep 0.02; done'
    run(["sh", "-c", script, str(seen)], on_line=lambda _: seen.touch(), env={MARK: mark})


def test_a_megabyte_of_bad_bytes_arrives(mark):
    """A line larger than the pipe, and bytes that are not UTF-8, pass."""
    script = "import sys; sys.stdout.buffer.write(b'x' * (1 << 20) + b'\\n\\xff\\n')"
    lines: list[str] = []
    run([sys.executable, "-c", script], on_line=lines.append, env={MARK: mark})
    assert "".join(lines[:-1]) == "x" * (1 << 20)
    assert lines[-1] == "\ufffd"


def test_an_exit_code_is_an_error_with_the_last_lines(mark):
    """The error says which command, how it ended and what it printed last, and survives pickling."""
    with pytest.raises(ChildFailedError) as caught:
        run(["sh", "-c", "seq 9; exit 3"], on_line=lambda _: None, tail_lines=2, env={MARK: mark})
    assert str(caught.value) == "sh -c 'seq 9; exit 3' ended with exit code 3; its last lines:\n8\n9"
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSEGV", "SIGTERM"])
def test_a_deadly_signal_is_named(name, mark):
    """A command that dies of a signal is told apart from one that exits."""
    with pytest.raises(ChildFailedError, match=f"was ended by {name}.*; it printed nothing"):
        run(["sh", "-c", f"kill -{signal.Signals[name].value} $$"], on_line=lambda _: None, env={MARK: mark})


def test_a_command_that_is_not_there_is_named(mark):
    """The error for a missing program names it."""
    with pytest.raises(ChildFailedError, match="cannot start no-such-program: No such file or directory"):
        run(["no-such-program"], on_line=lambda _: None, env={MARK: mark})


def test_a_long_command_is_cut():
    """An error's first line stays readable."""
    assert shorten([sys.executable, "-m", "a b"]) == "python -m 'a b'"
    assert len(shorten(["x"] * 1000)) < 130


def test_what_a_command_leaves_behind_ends_with_it(mark):
    """Children, sessions and daemons, deaf ones too, are gone when `run` returns."""
    run([*FAMILY, "deaf", "exit"], on_line=lambda _: None, env={MARK: mark}, grace_s=0.5)
    assert not marked(mark)


def test_a_killed_supervisor_leaves_nothing(mark):
    """SIGKILL to the process that called `run` ends all descendants, daemons included."""
    supervisor = start_supervisor(FAMILY, mark)
    wait_until(lambda: len(marked(mark)) == FAMILY_SIZE + 1)
    supervisor.kill()
    wait_until_gone(mark)
    supervisor.communicate()


def test_a_killed_supervisor_still_lets_its_child_save(mark, tmp_path):
    """A child that prints while it saves does not die of the broken pipe."""
    supervisor = start_supervisor([*SAVER, str(tmp_path / "state")], mark)
    supervisor.kill()
    wait_until_gone(mark)
    supervisor.communicate()
    assert (tmp_path / "state").read_text() == "state"


def test_a_terminated_supervisor_lets_its_child_save(mark, tmp_path):
    """SIGTERM that becomes an exception gives the child time, and its last lines are still handed out."""
    supervisor = start_supervisor([*SAVER, str(tmp_path / "state")], mark)
    supervisor.terminate()
    output, _ = supervisor.communicate(timeout=30)
    assert output.splitlines()[-2:] == ["saved", "terminated"]
    assert supervisor.returncode == 15
    assert (tmp_path / "state").exists()
    assert not marked(mark)


def test_a_killed_group_leaves_nothing(mark):
    """SIGKILL to the supervisor's process group, the end of a Prefect cancellation, does not reach the reaper."""
    supervisor = subprocess.Popen(
        [sys.executable, str(PROGRAMS / "supervisor.py"), *FAMILY],
        stdout=subprocess.PIPE,
        env={**ENVIRONMENT, MARK: mark},
        start_new_session=True,
    )
    wait_until(lambda: len(marked(mark)) == FAMILY_SIZE + 1)
    os.killpg(supervisor.pid, signal.SIGKILL)
    wait_until_gone(mark)
    supervisor.communicate()


def test_a_killed_reaper_leaves_nothing(mark):
    """Even the process that cleans up may be killed."""
    thread = InThread([*FAMILY, "deaf"], mark)
    wait_until(lambda: "ready" in thread.lines and family_is_complete(mark))
    os.kill(pid_of(mark, r"-I -S \S+reaper.py"), signal.SIGKILL)
    thread.join(20)
    assert isinstance(thread.error, ChildFailedError)
    wait_until_gone(mark)


def test_a_cancelled_thread_stops_the_tree(mark):
    """An exception raised in the waiting thread from outside arrives soon, and passes when the tree is gone."""
    thread = InThread(FAMILY, mark)
    wait_until(lambda: "ready" in thread.lines and family_is_complete(mark))
    thread.cancel()
    thread.join(10)
    assert isinstance(thread.error, CancelledHere)
    assert not marked(mark)


def test_what_ignores_sigterm_is_killed_after_the_grace(mark):
    """The tree has `grace_s` seconds, not less, and then SIGKILL."""
    thread = InThread([*FAMILY, "deaf"], mark, grace_s=1.5)
    wait_until(lambda: "ready" in thread.lines and family_is_complete(mark))
    start = time.monotonic()
    thread.cancel()
    thread.join(20)
    assert time.monotonic() - start >= 1.5
    assert isinstance(thread.error, CancelledHere)
    assert not marked(mark)


def test_a_second_cancellation_does_not_wait(mark, tmp_path):
    """It passes at once; the tree ends all the same, with the time that it was given."""
    thread = InThread([*SAVER, str(tmp_path / "state")], mark)
    wait_until(lambda: "ready" in thread.lines)
    thread.cancel()
    wait_until(lambda: any("..." in line for line in thread.lines))
    thread.cancel()
    thread.join(20)
    assert isinstance(thread.error, CancelledHere)
    assert "saved" not in thread.lines
    wait_until_gone(mark)
    assert (tmp_path / "state").exists()


def test_a_signal_handler_that_raises_stops_the_tree(mark):
    """An exception out of a signal handler in the main thread, as on Ctrl-C, passes when the tree is gone."""

    def interrupt() -> None:
        wait_until(lambda: family_is_complete(mark))
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    timer = threading.Thread(target=interrupt)
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            run(FAMILY, on_line=lambda _: None, env={MARK: mark})
    finally:
        signal.signal(signal.SIGINT, before)
    timer.join()
    assert not marked(mark)


def test_a_failing_consumer_stops_the_tree(mark):
    """What `on_line` raises passes, once no descendant is left."""

    def on_line(line: str) -> None:
        raise OSError(f"cannot log {line}")

    with pytest.raises(OSError, match="cannot log ready"):
        run(FAMILY, on_line=on_line, env={MARK: mark})
    assert not marked(mark)
