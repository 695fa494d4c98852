"""The reaper alone, in the moments that `run` cannot be made to hit."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
from programs.probe import MARK, marked, wait_until, wait_until_gone

from tasks.process import REAPER


@pytest.fixture
def mark(request):
    """A name that all descendants of a test carry; none is left after it."""
    name = f"{request.node.name}-{os.getpid()}-{time.monotonic_ns()}"
    yield name
    wait_until_gone(name, seconds=15)


def start(parent: int, mark: str, *command: str) -> subprocess.Popen[bytes]:
    """A reaper that believes that its caller is `parent`."""
    receive, send = os.pipe()
    try:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", str(REAPER), str(parent), "1", str(receive), *command],
            stdin=subprocess.PIPE,
            pass_fds=[receive],
            env={**os.environ, MARK: mark},
        )
    finally:
        os.close(receive)
        os.close(send)


def test_a_caller_that_died_first_gets_nothing_started(mark, tmp_path):
    """A caller's death before the reaper asked to hear of it is noticed."""
    done = tmp_path / "done"
    with start(os.getppid(), mark, "touch", str(done)) as reaper:
        assert reaper.wait(20) == 1
    assert not done.exists()


def test_a_closed_lifeline_ends_the_tree(mark):
    """A caller that lives on but dropped its end, interrupted while it started the reaper, wants nothing more."""
    with start(os.getpid(), mark, "sleep", "600") as reaper:
        wait_until(lambda: any(line.startswith("sleep") for line in marked(mark).values()))
        assert reaper.stdin is not None
        reaper.stdin.close()
        assert reaper.wait(20) == -15
    assert not marked(mark)


def test_the_command_inherits_neither_pipes_nor_ignored_signals(mark, tmp_path):
    """The command sees standard streams only, an empty input, and default signals."""
    report = tmp_path / "report"
    script = "ls -l /proc/self/fd; grep Sig[BI] /proc/self/status; cat; exit 7"
    with report.open("wb") as file:
        receive, send = os.pipe()
        reaper = subprocess.Popen(
            [sys.executable, "-I", "-S", str(REAPER), str(os.getpid()), "1", str(receive), "sh", "-c", script],
            stdin=subprocess.PIPE,
            stdout=file,
            pass_fds=[receive],
            env={**os.environ, MARK: mark},
        )
        with reaper:
            assert reaper.wait(20) == 7
        os.close(receive)
        os.close(send)
    text = report.read_text()
    assert "pipe:" not in text
    assert "0 -> /dev/null" in text
    blocked, ignored = (int(mask, 16) for mask in re.findall(r"Sig(?:Blk|Ign):\t(\w+)", text))
    assert blocked == 0
    assert not any(ignored >> (number - 1) & 1 for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGTERM))
