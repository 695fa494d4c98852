"""Programs in the background: started once, known again, and stopped with all that they started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deployments.programs import Program, stop

PARENT = """
import subprocess, sys, time
subprocess.Popen(["sleep", "600"], start_new_session=True)
print("begun", flush=True)
time.sleep(600)
"""
STUBBORN = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("begun", flush=True)
time.sleep(600)
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[str], Program]]:
    """A function that starts a Python program of that source, and waits until it has begun."""
    started: list[Program] = []

    def begin(source: str) -> Program:
        program = Program("a", (sys.executable, "-c", source), tmp_path)
        started.append(program)
        program.start(os.environ, tmp_path)
        end = time.monotonic() + 30
        while "begun" not in program.last_lines():
            assert time.monotonic() < end
            time.sleep(0.05)
        return program

    yield begin
    stop(started, 0)


def test_a_program_is_known_again(start: Callable[[str], Program], tmp_path: Path):
    """Who comes later finds its process by the pid file, and its processes by their mark."""
    program = start(PARENT)
    again = Program("a", ("anything",), tmp_path)
    assert again.pid == program.pid
    assert len(again.processes()) == 2
    assert Program("b", (), tmp_path).pid is None


def test_what_a_program_started_ends_too(start: Callable[[str], Program]):
    """A descendant in a session of its own is killed, and the program is named as one that had to be."""
    program = start(PARENT)
    assert stop([program], 1) == ["a"]
    assert program.processes() == set()
    assert program.pid is None


def test_a_program_that_ignores_sigterm_is_killed(start: Callable[[str], Program]):
    """It has as long as it was given."""
    program, begun = start(STUBBORN), time.monotonic()
    assert stop([program], 1) == ["a"]
    assert program.processes() == set()
    assert 1 <= time.monotonic() - begun < 10


def test_a_program_that_heeds_sigterm_is_not_killed(start: Callable[[str], Program]):
    """It ends within its time."""
    assert stop([start("import time; print('begun', flush=True); time.sleep(600)")], 30) == []


def test_a_process_that_is_not_ours_is_left_alone(tmp_path: Path):
    """A pid file that outlived its process, and whose number another process has, stops nobody."""
    with subprocess.Popen(["sleep", "600"]) as stranger:
        (tmp_path / "a.pid").write_text(str(stranger.pid))
        program = Program("a", (), tmp_path)
        assert program.pid is None
        assert stop([program], 1) == []
        assert stranger.poll() is None
        stranger.send_signal(signal.SIGKILL)
